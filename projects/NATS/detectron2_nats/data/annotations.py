"""Read COCO annotation files, which are used as they are, or refused; once in each process.

Nothing is repaired here: tools/clean_coco.py writes a clean file.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import pickle
import re
import shlex
from collections import Counter
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from ..errors import NATSError, one_line, shown

# What reading raises for a file of another format.
_MALFORMED = (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError)
_SLACK = 1.0  # pixels by which a box may leave its image; tools round differently
_NO_SIZE = "width, height are not whole numbers of pixels"
_IS_RLE = "segmentation is an RLE, and INPUT.MASK_FORMAT polygon"

Fault = Tuple[str, Any]
"""What is wrong, and the value of which it is."""


@dataclass(frozen=True)
class Needs:
    """What a config needs of an annotation file.

    Attributes:
        masks: "" if only boxes are read; "any" if masks are; "polygon" if they must be polygons.
        to_train: whether it must contain objects. (Of test images without any, Detectron2 only
            writes the predictions.)
    """

    masks: str = ""
    to_train: bool = False


@dataclass
class Annotations:
    """The content of an annotation file, in COCO's format; without masks if they are not read."""

    content: Dict[str, Any]

    @property
    def class_names(self) -> List[str]:
        """In the order of the labels that a network is trained on: by category id."""
        categories = sorted(self.content["categories"], key=lambda category: category["id"])
        return [category["name"] for category in categories]

    @property
    def label_of(self) -> Dict[Any, int]:
        """Category id → label."""
        ids = sorted(category["id"] for category in self.content["categories"])
        return {id: label for label, id in enumerate(ids)}


def read_annotations(json_file: str, needs: Needs) -> Annotations:
    """Read and check a COCO annotation file. A process parses it once, until it changes.

    Raises:
        NATSError: it is not in COCO's format, or something in it cannot be used as it is.
    """
    with reading(json_file) as path:
        file = os.stat(path)
        content = _checked(json_file, path, file.st_mtime_ns, file.st_size, needs)
        return Annotations(pickle.loads(content))


@functools.lru_cache(maxsize=16)
def _checked(json_file: str, path: str, mtime_ns: int, size: int, needs: Needs) -> bytes:
    """The content, in bytes: each loader process would copy objects, page by page."""
    content = parse(path)
    check_annotations(json_file, content, needs)
    if not needs.masks:
        for annotation in content.get("annotations", ()):
            annotation.pop("segmentation", None)
    return pickle.dumps(content)


def parse(path: str) -> Any:
    """The content of a JSON file, unchecked."""
    with open(path) as file:
        return json.load(file)


@contextlib.contextmanager
def reading(json_file: str) -> Iterator[str]:
    """Gives the absolute path; what a file of another format raises in the block is a NATSError."""
    try:
        path = json_file
        if "://" in json_file:
            from detectron2.utils.file_io import PathManager  # all else here does without it

            path = PathManager.get_local_path(json_file)
        yield os.path.abspath(path)
    except NATSError:
        raise
    except OSError as error:
        raise NATSError(f"{json_file}: cannot be read: {error.strerror or error}") from None
    except _MALFORMED as error:
        raise NATSError(f"{json_file}: not COCO's annotation format ({one_line(error)})") from None


def digest(records: List[dict]) -> str:
    """Tells one data set from another: of images' names and sizes, and of their annotations.

    Folders do not count, so that data may be moved.
    """
    made = hashlib.sha256()
    for record in records:
        named = {**record, "file_name": os.path.basename(record["file_name"])}
        made.update(json.dumps(named, sort_keys=True, default=str).encode())
    return made.hexdigest()[:16]


# -- checks ---------------------------------------------------------------------------------------


def check_annotations(json_file: str, content: Dict[str, Any], needs: Needs) -> None:
    """Check the content of an annotation file.

    Raises:
        NATSError: the first fault, how many there are, and the cure. Content of another format
            raises all kinds of errors: see :func:`reading`.
    """
    check_lists(json_file, content)
    annotations = content.get("annotations", [])
    named = [annotation for annotation in annotations if annotation.get("id") is not None]
    _refuse_twice(json_file, "annotation", named, "id")
    faults = list(_faults(content, needs))
    if faults:
        place, what, value = faults[0]
        count = sum(fault[1] == what for fault in faults)
        raise NATSError(
            f"{json_file}: {place}: {what}: {shown(value)} ({count} such, {len(faults)} faults in "
            f"all). {_cure(json_file, what, needs)}"
        )
    if needs.to_train and not any(annotation["iscrowd"] == 0 for annotation in annotations):
        crowds = f", only {len(annotations)} crowds (iscrowd 1)" if annotations else ""
        raise NATSError(f"{json_file}: contains no object to learn from{crowds}")


def _cure(json_file: str, what: str, needs: Needs) -> str:
    if what == _IS_RLE:
        return "Set INPUT.MASK_FORMAT bitmask"
    command = ["python", "tools/clean_coco.py", json_file]
    command += [os.path.splitext(json_file)[0] + "_clean.json"]
    command += ["--images", "FOLDER"] * (what == _NO_SIZE) + ["--masks"] * bool(needs.masks)
    return f"Write a clean file: {shlex.join(command)}"


def check_lists(json_file: str, content: Mapping[str, Any]) -> None:
    """Check what cannot be cleaned: categories, and images that cannot be told apart."""
    categories, images = content["categories"], content["images"]
    for what, entries, name in (("category", categories, "name"), ("image", images, "file_name")):
        if not all(isinstance(entry[name], str) for entry in entries):
            raise TypeError(f"the {name} of a {what} is not a string")
        for key in ("id", name):
            _refuse_twice(json_file, what, entries, key)
        sorted(entry["id"] for entry in entries)  # raises where they mix numbers and words
    if not categories:
        raise NATSError(f"{json_file}: its list of categories is empty")


def _refuse_twice(json_file: str, what: str, entries: Sequence[dict], key: str) -> None:
    for value, count in Counter(entry[key] for entry in entries).most_common(1):
        if count > 1:
            raise NATSError(
                f"{json_file}: {what} {key} {shown(value)} occurs {count} times: give each {what} "
                "its own. (Were files merged?)"
            )


def _faults(content: Mapping[str, Any], needs: Needs) -> Iterator[Tuple[str, str, Any]]:
    """(place, what is wrong, value) of each image and annotation that has a fault."""
    images = {image["id"]: image for image in content["images"]}
    without_size = {id for id, image in images.items() if size_fault(image)}
    for id in without_size:
        yield images[id]["file_name"], *size_fault(images[id])
    categories = {category["id"] for category in content["categories"]}
    for annotation in content.get("annotations", ()):
        image = images.get(annotation.get("image_id"))
        if image is None or image["id"] not in without_size:
            fault = annotation_fault(annotation, image, categories, needs.masks)
            if fault:
                name = image["file_name"] if image else "no image"
                yield f"{name}, annotation id {shown(annotation.get('id'))}", *fault


def size_fault(image: Mapping[str, Any]) -> Optional[Fault]:
    """What is wrong with an image's width and height, if anything."""
    size = image.get("width"), image.get("height")
    return None if all(type(side) is int and side > 0 for side in size) else (_NO_SIZE, size)


def annotation_fault(
    annotation: Mapping[str, Any], image: Optional[dict], categories: set, masks: str
) -> Optional[Fault]:
    """The first thing that is wrong with an annotation, if anything is.

    Args:
        image: that of the annotation, which has a size; None if it is not listed.
        categories: all ids.
        masks: see :class:`Needs`.
    """
    id, area, iscrowd = (annotation.get(key) for key in ("id", "area", "iscrowd"))
    if image is None:
        return "image_id is not listed", annotation.get("image_id")
    if annotation.get("category_id") not in categories:
        return "category_id is not listed", annotation.get("category_id")
    fault = box_fault(annotation.get("bbox"), image["width"], image["height"])
    if fault:
        return fault
    if annotation.get("ignore"):
        return "ignore is not known to Detectron2", annotation["ignore"]
    if iscrowd not in (0, 1):
        return "iscrowd is not 0 or 1", iscrowd
    if not is_numbers([area]) or area <= 0:
        return "area is not a number above 0", area
    if type(id) is not int or id < 1:  # COCO's evaluation takes 0 for "no match"
        return "id is not a whole number from 1", id
    return _mask_fault(annotation, image, masks) if masks else None


def box_fault(box: Any, width: int, height: int) -> Optional[Fault]:
    """What is wrong with an object's box in an image of this size, if anything."""
    if not is_numbers(box) or len(box) != 4:
        return "bbox is not [x, y, width, height]", box
    x, y, w, h = box
    if w <= 0 or h <= 0:
        return "box has no size", box
    if min(x, y) < -_SLACK or x + w > width + _SLACK or y + h > height + _SLACK:
        return "box leaves its image of [width, height]", (box, [width, height])
    if max(box) <= 1 and min(width, height) > 2:
        return "box is smaller than a pixel, in the corner of its image", box
    return None


def is_numbers(value: Any) -> bool:
    """Whether it is a list of finite numbers."""
    is_list = isinstance(value, list)
    return is_list and all(type(v) in (int, float) and math.isfinite(v) for v in value)


def is_polygon(value: Any) -> bool:
    """Whether it is [x1, y1, x2, y2, x3, y3, …]."""
    return is_numbers(value) and len(value) >= 6 and len(value) % 2 == 0


def _mask_fault(annotation: Mapping[str, Any], image: dict, masks: str) -> Optional[Fault]:
    mask, box = annotation.get("segmentation"), annotation["bbox"]
    if not mask:
        return "segmentation is missing, and MODEL.MASK_ON is True", mask
    if isinstance(mask, dict):
        if masks == "polygon" and not annotation["iscrowd"]:
            return _IS_RLE, mask
        size = [image["height"], image["width"]]
        return None if _is_rle(mask, size) else ("segmentation is no RLE of its image's size", mask)
    if not isinstance(mask, list) or not all(map(is_polygon, mask)):
        return "segmentation is not a list of polygons [x1, y1, x2, y2, x3, y3, …]", mask
    for axis in (0, 1):
        values = [value for polygon in mask for value in polygon[axis::2]]
        low, high = box[axis] - _SLACK, box[axis] + box[axis + 2] + _SLACK
        if max(values) < low or min(values) > high:
            return "segmentation lies outside its box", mask
    return None


def _is_rle(mask: Mapping[str, Any], size: List[int]) -> bool:
    """Whether pycocotools, which checks little, can read it as a mask of [height, width]."""
    counts = mask.get("counts")
    if mask.get("size") != size:
        return False
    if isinstance(counts, list):
        return all(type(run) is int and run >= 0 for run in counts) and sum(counts) == math.prod(
            size
        )
    # whole numbers only: it would read past the end of another string
    if not isinstance(counts, str) or not re.fullmatch("([P-o]{0,5}[0-O])+", counts):
        return False
    import pycocotools.mask as mask_util

    try:
        again = mask_util.encode(mask_util.decode({"size": size, "counts": counts}))
    except ValueError:
        return False
    return again["counts"].decode() == counts
