"""Read COCO annotation files: the one place that checks them, and whose result all else reads.

A file is refused where it can be read in two ways. Single annotations and images that cannot be
used are left out, with one warning, as long as they are few. What can be computed is filled in.
"""

import hashlib
import json
import logging
import math
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any, Callable, Dict, Hashable, List, Mapping, Optional, Set

from ..errors import NATSError, one_line, shown

# What reading raises for a file of another format.
_MALFORMED = (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError)
_SLACK = 1.0  # pixels by which a box may leave its image; tools round differently

logger = logging.getLogger(__name__)
_warned: Set[str] = set()  # a file is read several times, each warning given once


@dataclass(frozen=True)
class Needs:
    """What a config needs of an annotation file.

    Attributes:
        max_bad: share of the annotations, and of the images, that may be unusable.
        masks: "" if only boxes are read; "any" if masks are; "polygon" if they must be polygons.
        to_train: whether it must contain annotations. (Of test images without any, Detectron2 only
            writes the predictions.)
    """

    max_bad: float = 0.01
    masks: str = ""
    to_train: bool = False


@dataclass
class Annotations:
    """The usable part of an annotation file.

    Attributes:
        content: in COCO's format, complete. Ids of annotations are whole numbers from 1.
        changed: whether it differs from the file by more than masks that are not read.
    """

    content: Dict[str, Any]
    changed: bool = False

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
    """Read and check a COCO annotation file.

    Raises:
        NATSError: it is not in COCO's format, ids occur twice, or too much of it cannot be used.
    """
    try:
        with open(_local(json_file)) as file:
            content = json.load(file)
        found = Annotations(content)
        _check_categories(json_file, found)
        images = _usable_images(json_file, found, needs)
        _usable_annotations(json_file, found, needs, images)
        return found
    except NATSError:
        raise
    except OSError as error:
        raise NATSError(f"{json_file}: cannot be read: {error.strerror or error}") from None
    except _MALFORMED as error:
        raise NATSError(f"{json_file}: not COCO's annotation format ({one_line(error)})") from None


def _local(path: str) -> str:
    if "://" not in path:
        return path
    from detectron2.utils.file_io import PathManager  # all else here does without Detectron2

    return PathManager.get_local_path(path)


def read_class_names(json_file: str) -> List[str]:
    """The names of a file's classes; its images and annotations are not looked at.

    Raises:
        NATSError: it cannot be read, or has no list of categories.
    """
    try:
        with open(_local(json_file)) as file:
            return Annotations(json.load(file)).class_names
    except (OSError, *_MALFORMED) as error:
        raise NATSError(f"{json_file}: not COCO's annotation format ({one_line(error)})") from None


def _refuse_twice(json_file: str, what: str, entries: List[dict], place: Callable[[dict], str]):
    seen: Dict[Hashable, dict] = {}
    for entry in entries:
        first = seen.setdefault(entry["id"], entry)
        if first is not entry:
            raise NATSError(
                f"{json_file}: {what} id {entry['id']!r} occurs twice, for {place(first)} and "
                f"{place(entry)}: give each {what} an id of its own. (Were files merged?)"
            )


def _check_categories(json_file: str, found: Annotations) -> None:
    categories = found.content["categories"]
    _refuse_twice(json_file, "category", categories, lambda c: shown(c["name"]))
    if not categories:
        raise NATSError(f"{json_file}: its list of categories is empty")
    if not all(isinstance(category["name"], str) for category in categories):
        raise TypeError("a category's name is not a string")
    sorted(category["id"] for category in categories)  # raises where they mix numbers and words


def _usable_images(json_file: str, found: Annotations, needs: Needs) -> Dict[Any, dict]:
    """Image id → image. Leaves out those without a size."""
    images = found.content["images"]
    _refuse_twice(json_file, "image", images, lambda image: image["file_name"])
    faults = {}
    for place, image in enumerate(images):
        if not isinstance(image["file_name"], str):
            raise TypeError(f"file_name {image['file_name']!r} is not a string")
        sides = [image.get("width"), image.get("height")]
        if all(_is_number(side) and side >= 1 and side == int(side) for side in sides):
            image["width"], image["height"] = map(int, sides)
        else:
            width, height = map(shown, sides)
            faults[place] = f"{image['file_name']}: width {width}, height {height} is no size"
    _leave_out(json_file, "images", faults, len(images), needs, "write the images' sizes in pixels")
    files = Counter(image["file_name"] for image in images)
    repeated = [name for name, count in files.items() if count > 1]
    if repeated:
        _warn(
            f"{json_file}: {len(repeated)} image files are listed more than once, under other ids, "
            f"the first {repeated[0]}: each entry counts as an image of its own"
        )
    found.changed |= bool(faults)
    found.content["images"] = [image for i, image in enumerate(images) if i not in faults]
    return {image["id"]: image for image in images}


def _usable_annotations(
    json_file: str, found: Annotations, needs: Needs, images: Mapping[Any, dict]
) -> None:
    if "annotations" not in found.content:
        if needs.to_train:
            raise NATSError(f"{json_file}: contains no annotations, which training needs")
        return
    annotations = found.content["annotations"]
    given = [annotation for annotation in annotations if annotation.get("id") is not None]
    _refuse_twice(json_file, "annotation", given, lambda a: _place(a, images))
    categories = {category["id"] for category in found.content["categories"]}
    unusable = images.keys() - {image["id"] for image in found.content["images"]}
    faults, boxes_at_fault, without_image = {}, [], set()
    for index, annotation in enumerate(annotations):
        if annotation.get("image_id") in unusable:
            without_image.add(index)
            continue
        fault = _fault_of_box(annotation, images, categories)
        if fault.startswith("box"):
            boxes_at_fault.append((annotation["bbox"], images[annotation["image_id"]]))
        if not fault:
            found.changed |= _fill_in(annotation)
            mask = annotation.get("segmentation")
            fault = _fault_of_mask(annotation, needs, images[annotation["image_id"]])
            found.changed |= bool(needs.masks) and annotation.get("segmentation") is not mask
        if fault:
            place = f"id {shown(annotation.get('id'))}, {_place(annotation, images)}"
            faults[index] = f"({place}): {fault}"
    cure = _likely_cause(boxes_at_fault) or "repair the file"
    _leave_out(json_file, "annotations", faults, len(annotations), needs, cure)
    left_out = faults.keys() | without_image
    usable = [a for i, a in enumerate(annotations) if i not in left_out]
    if any(not _is_id(annotation.get("id")) for annotation in usable):
        # COCOeval takes id 0 for "no match", negative ones for free, and keeps them as numbers
        for number, annotation in enumerate(usable, start=1):
            annotation["id"] = number
        found.changed = True
    found.changed |= len(usable) < len(annotations)
    found.content["annotations"] = usable
    if needs.to_train and not any(a["iscrowd"] == 0 for a in usable):
        crowds = f", only {len(usable)} crowds (iscrowd 1)" if usable else ""
        raise NATSError(f"{json_file}: contains no object to learn from{crowds}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_id(value: Any) -> bool:
    return type(value) is int and value > 0


def _place(annotation: dict, images: Mapping[Any, dict]) -> str:
    image = images.get(annotation.get("image_id"))
    return image["file_name"] if image else "no listed image"


def _fault_of_box(annotation: dict, images: Mapping[Any, dict], categories: Set[Any]) -> str:
    """Why an annotation cannot be used, apart from its mask; "" if it can."""
    if annotation.get("image_id") not in images:
        return f"image id {shown(annotation.get('image_id'))} is not listed"
    if annotation.get("category_id") not in categories:
        category = shown(annotation.get("category_id"))
        return f"category {category} is not in the list of categories"
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return f"bbox {shown(box)} is not [x, y, width, height]"
    x, y, w, h = box
    if w <= 0 or h <= 0:
        return f"box {box} has no size"
    image = images[annotation["image_id"]]
    width, height = image["width"], image["height"]
    if min(x, y) < -_SLACK or x + w > width + _SLACK or y + h > height + _SLACK:
        return f"box {box} leaves its image of {width}×{height} px"
    if max(box) <= 1 and min(width, height) > 2:
        return f"box {box} is smaller than a pixel, in the corner of its image"
    if annotation.get("ignore"):
        return "it says ignore, which Detectron2 does not know: write iscrowd 1, or leave it out"
    if annotation.get("iscrowd", 0) not in (0, 1):
        return f"iscrowd {shown(annotation['iscrowd'])} is not 0 or 1"
    return ""


def _likely_cause(boxes: List[tuple]) -> str:
    """What most of the bad boxes have in common, as a guess and a cure; "" if nothing."""

    def inside(x0: float, y0: float, x1: float, y1: float, width: int, height: int) -> bool:
        in_image = x1 <= width + _SLACK and y1 <= height + _SLACK
        return -_SLACK <= min(x0, y0) and x0 < x1 and y0 < y1 and in_image

    counts: Counter = Counter()
    for (a, b, c, d), image in boxes:
        size = image["width"], image["height"]
        if 0 <= min(a, b, c, d) and max(a, b, c, d) <= 1:
            counts["shares of the image: write pixels"] += 1
        elif inside(a, b, c, d, *size):
            counts["x1 y1 x2 y2: write x y width height"] += 1
        elif inside(a - c / 2, b - d / 2, a + c / 2, b + d / 2, *size):
            counts["the box's centre, width and height: write x y width height"] += 1
        elif inside(a, b, a + c, b + d, *reversed(size)):
            counts["boxes of images with width and height swapped"] += 1
    if not counts:
        return ""
    cause, count = counts.most_common(1)[0]
    return f"it looks like {cause}" if count > len(boxes) / 2 else ""


def _fill_in(annotation: dict) -> bool:
    """Complete what only the evaluator reads; returns whether anything changed."""
    before = annotation.get("iscrowd"), annotation.get("area")
    annotation["iscrowd"] = int(annotation.get("iscrowd", 0))
    if not _is_number(annotation.get("area")) or annotation["area"] <= 0:
        # AP of small, medium and large objects goes by it
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    return before != (annotation["iscrowd"], annotation["area"])


def _fault_of_mask(annotation: dict, needs: Needs, image: dict) -> str:
    """Why its mask cannot be used; "" if it can, or is not read. Removes what is not read."""
    if not needs.masks:
        annotation.pop("segmentation", None)
        return ""
    mask = annotation.get("segmentation")
    if not mask:
        return "it has no segmentation, and MODEL.MASK_ON is True"
    if isinstance(mask, dict):
        if needs.masks == "polygon" and not annotation["iscrowd"]:
            return "its segmentation is an RLE: set INPUT.MASK_FORMAT bitmask"
        return _fault_of_rle(mask, image)
    polygons = mask if isinstance(mask, list) else []
    usable = [p for p in polygons if isinstance(p, list) and len(p) % 2 == 0 and len(p) >= 6]
    if not usable or not all(_is_number(value) for polygon in usable for value in polygon):
        return f"segmentation {shown(mask)} is not a list of polygons [x1, y1, x2, y2, x3, y3, …]"
    x, y, w, h = annotation["bbox"]
    for start, low, high in ((0, x, x + w), (1, y, y + h)):
        values = [value for polygon in usable for value in polygon[start::2]]
        if max(values) < low - _SLACK or min(values) > high + _SLACK:
            return f"segmentation {shown(mask)} lies outside its box {annotation['bbox']}"
    if len(usable) < len(mask):  # Detectron2 leaves them out, too
        annotation["segmentation"] = usable
    return ""


def _fault_of_rle(mask: dict, image: dict) -> str:
    size, counts = mask.get("size"), mask.get("counts")
    if repr(size) != repr([image["height"], image["width"]]):
        return f"its mask has size {shown(size)}, its image [{image['height']}, {image['width']}]"
    runs = _runs(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        return f"its RLE has counts {shown(counts)}"
    return "" if sum(runs) == size[0] * size[1] else "its RLE does not fill its size"


def _runs(text: str) -> Optional[List[int]]:
    """COCO's compressed counts as numbers; None if they end too early or have other characters.

    pycocotools does not check them: it reads past their end, or does not come to one.
    """
    runs: List[int] = []
    value = bits = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            return None
        value |= (code & 31) << bits
        bits += 5
        if code & 32:  # more of this number follows
            continue
        if code & 16:
            value -= 1 << bits
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = bits = 0
    return None if bits else runs


def _leave_out(
    json_file: str, what: str, faults: Mapping[int, str], total: int, needs: Needs, cure: str
) -> None:
    """Warn of what is left out, or refuse the file where it is too much."""
    if not faults:
        return
    first = next(iter(faults.values()))
    summary = f"{json_file}: {len(faults)} of {total} {what} cannot be used, the first {first}"
    if len(faults) > needs.max_bad * total:
        raise NATSError(
            f"{summary}. {cure[0].upper()}{cure[1:]}, or raise RUN.MAX_BAD_DATA ({needs.max_bad})"
        )
    _warn(f"{summary}. They are left out")


def _warn(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning(message)


def to_records(annotations: Annotations, image_root: str) -> List[dict]:
    """Detectron2's dataset dicts, in the order of the image ids."""
    import pycocotools.mask as mask_util

    from detectron2.structures import BoxMode

    labels, of_image = annotations.label_of, {}
    for annotation in annotations.content.get("annotations", ()):
        of_image.setdefault(annotation["image_id"], []).append(annotation)
    records = []
    for image in sorted(annotations.content["images"], key=lambda image: image["id"]):
        objects = []
        for annotation in of_image.get(image["id"], ()):
            made = {key: annotation[key] for key in ("iscrowd", "bbox") if key in annotation}
            made["category_id"] = labels[annotation["category_id"]]
            mask = annotation.get("segmentation")
            if mask:
                if isinstance(mask, dict) and isinstance(mask["counts"], list):
                    mask = mask_util.frPyObjects(mask, *mask["size"])
                made["segmentation"] = mask
            objects.append({**made, "bbox_mode": BoxMode.XYWH_ABS})
        path = os.path.join(image_root, image["file_name"])
        sizes = {"height": image["height"], "width": image["width"]}
        records.append(
            {"file_name": path, **sizes, "image_id": image["id"], "annotations": objects}
        )
    return records


def digest(records: List[dict]) -> str:
    """Tells one data set from another: of images' names and sizes, and of their annotations.

    Folders do not count, so that data may be moved.
    """
    made = hashlib.sha256()
    for record in records:
        named = {**record, "file_name": os.path.basename(record["file_name"])}
        made.update(json.dumps(named, sort_keys=True, default=str).encode())
    return made.hexdigest()[:16]
