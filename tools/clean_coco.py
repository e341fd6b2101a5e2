#!/usr/bin/env python
"""Write a clean copy of a COCO annotation file that is refused, and say what was changed.

Boxes are cut to their images; iscrowd (0) and area (of the box) are filled in; what says ignore
becomes a crowd; annotations are numbered anew. What cannot be used is left out. Where a file can be
read in two ways, an option says how.
"""

import argparse
import json
import math
import os
import sys
from collections import defaultdict
from typing import Any, DefaultDict, Dict, Iterator, List, Optional

from PIL import Image

from detectron2_nats import NATSError
from detectron2_nats.data import annotations as checks
from detectron2_nats.data.images import shown_size
from detectron2_nats.errors import one_line, shown
from detectron2_nats.files import write_atomically

EXAMPLE = "example: python tools/clean_coco.py train.json clean.json --boxes xyxy --images images"

BOXES = {
    "xywh": lambda a, b, c, d, w, h: [a, b, c, d],
    "xyxy": lambda a, b, c, d, w, h: [a, b, c - a, d - b],
    "centre": lambda a, b, c, d, w, h: [a - c / 2, b - d / 2, c, d],
    "shares": lambda a, b, c, d, w, h: [a * w, b * h, c * w, d * h],
    "centre-shares": lambda a, b, c, d, w, h: [(a - c / 2) * w, (b - d / 2) * h, c * w, d * h],
}
"""How four numbers in an image of w × h pixels may be meant → [x, y, width, height]."""

Changes = DefaultDict[str, List[str]]
"""What was done → where."""


def read_sizes(images: List[dict], folder: Optional[str], changes: Changes) -> None:
    """Take from its file what is no size, or has width and height exchanged."""
    for image in images:
        size, fault = (image.get("width"), image.get("height")), checks.size_fault(image)
        in_file, reason = None, "add --images FOLDER"
        if folder:
            try:
                with open(os.path.join(folder, image["file_name"]), "rb") as file:
                    in_file = shown_size(Image.open(file))
            except Exception as error:  # Pillow raises all kinds of errors for a damaged file
                reason = one_line(error)
        if fault and not in_file:
            raise NATSError(f"{image['file_name']}: {fault[0]}: {shown(size)}: {reason}")
        if in_file and in_file != size and (fault or in_file == size[::-1]):
            image["width"], image["height"] = in_file
            changes["size as in the image's file"].append(f"{image['file_name']}: {shown(size)}")


def read_boxes(content: Dict[str, Any], layout: Optional[str], changes: Changes) -> None:
    """Convert all boxes. Without a layout, refuse where more than a tenth are at fault."""
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    total, good = 0, dict.fromkeys(BOXES, 0)
    for annotation in content.get("annotations", ()):
        box, size = annotation.get("bbox"), sizes.get(annotation.get("image_id"))
        if size and is_box(annotation):
            total += 1
            for name, convert in BOXES.items():
                good[name] += not checks.box_fault(convert(*box, *size), *size)
            if layout and layout != "xywh":
                annotation["bbox"] = BOXES[layout](*box, *size)
                changes[f"box read as {layout}"].append(f"{box}, now {annotation['bbox']}")
    bad = total - good["xywh"]
    if not layout and bad > 0.1 * total:
        better = [f"--boxes {name}" for name in BOXES if good[name] >= 0.9 * total]
        raise NATSError(
            f"{bad} of {total} boxes are not x, y, width, height in their image. "
            + (f"They would be with {' or '.join(better)}. " if better else "")
            + "If width and height of images are exchanged: --images FOLDER. To clean the boxes as "
            "they are: --boxes xywh"
        )


def repair(annotation: dict, image: dict, masks: str) -> Iterator[str]:
    """Repair of an annotation with a box what can be repaired; gives what was done."""
    size = image["width"], image["height"]
    x, y, w, h = box = annotation["bbox"]
    left, top = max(x, 0), max(y, 0)
    cut = [left, top, min(x + w, size[0]) - left, min(y + h, size[1]) - top]
    if checks.box_fault(box, *size) and not checks.box_fault(cut, *size):
        annotation["bbox"] = box = cut
        yield "box cut to its image"
    if annotation.pop("ignore", 0):
        annotation["iscrowd"] = 1
        yield "ignore, now iscrowd 1"
    if annotation.get("iscrowd") is None:
        annotation["iscrowd"] = 0
        yield "iscrowd missing, now 0"
    area, of_box = annotation.get("area"), math.prod(box[2:])
    if not checks.is_numbers([area]) or area <= 0:
        annotation["area"] = of_box
        yield "area missing, now the box's"
    annotation["area"] = min(annotation["area"], of_box) if box is cut else annotation["area"]
    if type(annotation.get("id")) is not int or annotation["id"] < 1:
        annotation["id"] = 1
        yield "id not a whole number from 1"
    mask = annotation.get("segmentation")
    polygons = [part for part in mask if checks.is_polygon(part)] if isinstance(mask, list) else []
    if masks and polygons and len(polygons) < len(mask):
        annotation["segmentation"] = polygons
        yield "part of a segmentation that is no polygon left out"


def clean(json_file: str, content: Dict[str, Any], args: argparse.Namespace) -> Changes:
    """Clean the content of a file, in place."""
    changes: Changes = defaultdict(list)
    checks.check_lists(json_file, content)
    read_sizes(content["images"], args.images, changes)
    read_boxes(content, args.boxes, changes)
    images = {image["id"]: image for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    masks, kept = "any" if args.masks else "", []
    for annotation in content.get("annotations", ()):
        image = images.get(annotation.get("image_id"))
        name = image["file_name"] if image else "no image"
        place = f"{name}, id {shown(annotation.get('id'))}"
        done = list(repair(annotation, image, masks)) if image and is_box(annotation) else []
        fault = checks.annotation_fault(annotation, image, categories, masks)
        if fault:
            changes[f"left out: {fault[0]}"].append(f"{place}: {shown(fault[1])}")
        else:
            kept.append(annotation)
            for words in done:
                changes[words].append(place)
    if content.get("annotations") and not kept:
        raise NATSError(f"{json_file}: nothing would remain: {next(iter(changes))}")
    if len({annotation["id"] for annotation in kept}) < len(kept):
        for number, annotation in enumerate(kept, start=1):
            annotation["id"] = number
        changes["annotation numbered anew"] += ["from 1"] * len(kept)
    if "annotations" in content:
        content["annotations"] = kept
    checks.check_annotations(json_file, content, checks.Needs(masks))
    return changes


def is_box(annotation: dict) -> bool:
    box = annotation.get("bbox")
    return checks.is_numbers(box) and len(box) == 4


def main(arguments: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("input", metavar="IN", help="annotation file")
    parser.add_argument("output", metavar="OUT", help="file to write")
    parser.add_argument("--boxes", choices=BOXES, help="how all boxes are meant")
    parser.add_argument("--images", metavar="FOLDER", help="read sizes that are wrong from files")
    parser.add_argument("--masks", action="store_true", help="also clean what MODEL.MASK_ON reads")
    args = parser.parse_args(arguments)
    try:
        with checks.reading(args.input) as path:
            content = checks.parse(path)
            changes = clean(args.input, content, args)
        write_atomically(args.output, json.dumps(content))
    except (NATSError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for done, places in changes.items():
        print(f"{len(places)} × {done} (first: {places[0]})")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
