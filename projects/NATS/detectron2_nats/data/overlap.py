"""Find images that two splits share: by file, by COCO image number, by content."""

import contextlib
import hashlib
import logging
import os
import re
from typing import Dict, Iterable, Iterator, List, Sequence, Tuple

from detectron2.data import DatasetCatalog
from detectron2.utils import comm

from ..errors import NATSError

_FEW = 5000  # up to this many files of both splits together, all are compared by content
_MOST_READ = 5000  # in larger splits: up to this many names that both contain, spread evenly
_MOST_NAMED = 10  # shared images that a message names

logger = logging.getLogger(__name__)


def shared_images(one: Sequence[str], other: Sequence[str]) -> Dict[str, str]:
    """Find the images of `other` that are also in `one`.

    Two files are the same image if they are

    - the same file, also through links;
    - the same COCO image number: COCO's releases call an image ``COCO_val2014_000000000042.jpg`` or
      ``000000000042.jpg``. Two names of the short form can belong to other data, so their content
      is compared instead;
    - equal in content. All files are compared if they are few, else those of the same name.

    Returns:
        file of `other` → file of `one`.
    """
    shared: Dict[str, str] = {}
    by_path = {os.path.realpath(file): file for file in one}
    by_name: Dict[str, List[str]] = {}
    for file in one:
        by_name.setdefault(_name(file), []).append(file)
    for file in other:
        namesakes = by_name.get(_name(file), [])
        same = [f for f in namesakes if _is_coco(f) or _is_coco(file)]
        same += filter(None, [by_path.get(os.path.realpath(file))])
        if same:
            shared[file] = same[0]

    rest = [file for file in other if file not in shared]
    if len(one) + len(other) > _FEW:
        names = sorted({_name(file) for file in rest} & by_name.keys())
        names = set(names[:: len(names) // _MOST_READ + 1])
        one = [file for name in names for file in by_name[name]]
        rest = [file for file in rest if _name(file) in names]
    shared.update(_same_content(one, rest))
    return shared


def _name(file: str) -> str:
    return re.sub(r"^COCO_[a-z]+\d{4}_(?=\d{12}\.jpg$)", "", os.path.basename(file))


def _is_coco(file: str) -> bool:
    return _name(file) != os.path.basename(file)


def _same_content(one: Sequence[str], other: Sequence[str]) -> Iterator[Tuple[str, str]]:
    """(file of `other`, file of `one`). Reads only files whose size occurs in both splits."""
    sizes, other_sizes = _by_size(one), _by_size(other)
    for size in sizes.keys() & other_sizes.keys():
        contents = {_digest(file): file for file in sizes[size]}
        for file in other_sizes[size]:
            same = contents.get(_digest(file))
            if same:
                yield file, same


def _by_size(files: Iterable[str]) -> Dict[int, List[str]]:
    found: Dict[int, List[str]] = {}
    for file in files:
        with contextlib.suppress(OSError):  # the loader reports missing files
            found.setdefault(os.path.getsize(file), []).append(file)
    found.pop(0, None)  # empty files are not images
    return found


def _digest(file: str) -> bytes:
    try:
        with open(file, "rb") as opened:
            return hashlib.blake2b(opened.read()).digest()
    except OSError:
        return file.encode()  # differs from every other file's


def check_disjoint(train: Sequence[str], calibration: Sequence[str]) -> None:
    """Check that no image is in both splits: α needs images that the weights are not trained on.

    Raises:
        NATSError: on all ranks; names up to ten shared images. The log names all.
    """
    message = ""
    if comm.is_main_process():
        shared = shared_images(train, calibration)
        if shared:
            message = (
                f"DATASETS.TRAIN and DATASETS.CALIBRATION share {_summary(shared)}. α must be "
                "trained on images that the weights are not trained on. "
            )
            if any(_is_coco(file) and not _is_coco(same) for file, same in shared.items()):
                message += (
                    "coco_2017_train, which the zoo's configs train on, contains "
                    "coco_2014_valminusminival: set DATASETS.TRAIN \"('coco_2014_train',)\""
                )
            else:
                message += "Leave them out of one of the two"
                if len(shared) > _MOST_NAMED:
                    message += "; the log names all"
                    logger.error("\n".join(["in both splits:", *_named(shared)]))
    message = comm.all_gather(message)[0]
    if message:
        raise NATSError(message)


def warn_of_test_images(names: Sequence[str], files: Sequence[str], key: str) -> None:
    """Warn if the test data sets `names` contain images that are in `files`, the files of `key`."""
    if names and comm.is_main_process():
        records = (record for name in names for record in DatasetCatalog.get(name))
        test = [record["file_name"] for record in records if "file_name" in record]
        shared = shared_images(files, test)
        if shared:
            logger.warning(
                f"DATASETS.TEST and {key} share {_summary(shared)}. AP on them does not tell how "
                "well the detector works on new images"
            )


def _summary(shared: Dict[str, str]) -> str:
    names = _named(shared)
    more = ", …" if len(names) > _MOST_NAMED else ""
    return f"{len(names)} images: {', '.join(names[:_MOST_NAMED])}{more}"


def _named(shared: Dict[str, str]) -> List[str]:
    return [file + (f" ({same})" if same != file else "") for file, same in shared.items()]
