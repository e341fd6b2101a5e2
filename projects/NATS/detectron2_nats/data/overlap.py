"""Find images that two splits share: by file, by COCO image number, by content."""

import functools
import hashlib
import logging
import os
import re
from collections import defaultdict
from typing import Dict, Mapping, Sequence

from detectron2.data import DatasetCatalog

from ..errors import NATSError

_FEW = 5000  # up to this many files of both splits together, all are compared by content
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
    few = len(one) + len(other) <= _FEW
    by_path, by_name, by_size = {}, defaultdict(list), defaultdict(list)
    for file in one:
        by_path[os.path.realpath(file)] = file
        by_name[_name(file)].append(file)
        if few:
            by_size[_size(file)].append(file)
    digest = functools.lru_cache(maxsize=None)(_digest)
    shared: Dict[str, str] = {}
    for file in other:
        namesakes = by_name.get(_name(file), [])
        same = [by_path[path] for path in [os.path.realpath(file)] if path in by_path]
        same += [f for f in namesakes if _is_coco(f) or _is_coco(file)]
        if not same and (few or namesakes):
            size = _size(file)
            alike = by_size.get(size, []) if few else [f for f in namesakes if _size(f) == size]
            same = [f for f in alike if size and digest(f) == digest(file)]
        if same:
            shared[file] = same[0]
    return shared


def _name(file: str) -> str:
    return re.sub(r"^COCO_[a-z]+\d{4}_(?=\d{12}\.jpg$)", "", os.path.basename(file))


def _is_coco(file: str) -> bool:
    return _name(file) != os.path.basename(file)


def _size(file: str) -> int:
    """In bytes; 0 if it is missing, which the loader reports."""
    return os.path.getsize(file) if os.path.isfile(file) else 0


def _digest(file: str) -> bytes:
    with open(file, "rb") as opened:
        return hashlib.blake2b(opened.read()).digest()


def check_disjoint(train: Sequence[str], calibration: Sequence[str]) -> None:
    """Check that no image is in both splits: α needs images that the weights are not trained on.

    Raises:
        NATSError: names up to ten shared images.
    """
    shared = shared_images(train, calibration)
    if shared:
        cure = "Leave them out of one of the two"
        if any(_is_coco(file) and not _is_coco(same) for file, same in shared.items()):
            cure = (
                "coco_2017_train, which the zoo's configs train on, contains "
                "coco_2014_valminusminival: set DATASETS.TRAIN \"('coco_2014_train',)\""
            )
        raise NATSError(
            f"DATASETS.TRAIN and DATASETS.CALIBRATION share {_summary(shared)}. α must be trained "
            f"on images that the weights are not trained on. {cure}"
        )


def warn_of_test_images(names: Sequence[str], files: Sequence[str], key: str) -> None:
    """Warn if the test data sets `names` contain images that are in `files`, the files of `key`."""
    records = (record for name in names for record in DatasetCatalog.get(name))
    test = [record["file_name"] for record in records if "file_name" in record]
    shared = shared_images(files, test)
    if shared:
        logger.warning(
            f"DATASETS.TEST and {key} share {_summary(shared)}. AP on them does not tell how well "
            "the detector works on new images"
        )


def _summary(shared: Mapping[str, str]) -> str:
    """The number of images and the first ten; if there are more, the log names all."""
    names = [file + (f" ({same})" if same != file else "") for file, same in shared.items()]
    if len(names) <= _MOST_NAMED:
        return f"{len(names)} images: {', '.join(names)}"
    logger.warning("\n".join(["in two splits:", *names]))
    return f"{len(names)} images: {', '.join(names[:_MOST_NAMED])}, … (the log names all)"
