#!/usr/bin/env python
"""Make COCO's two parts of val2014: "minival" (5,000 images) and "val35k" (35,504 images).

Detectron2 registers them as coco_2014_minival and coco_2014_valminusminival. COCO's own downloads
contain only instances_val2014.json and instances_val2017.json. Minival is the part of val2014 with
the image ids of val2017. Image names stay those of val2014.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from detectron2_nats import NATSError

EPILOG = """
example:
  $ DETECTRON2_DATASETS=/data python tools/make_val35k.py
"""

MINIVAL = "instances_minival2014.json"
VAL35K = "instances_valminusminival2014.json"
EXPECTED = {MINIVAL: 5000, VAL35K: 35504}
"""File → the number of its images in the real COCO."""


def load_instances(path: Path) -> dict:
    """The content of a COCO annotation file.

    Raises:
        NATSError: the file is missing, or is not an annotation file.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        for key in ("images", "annotations", "categories"):
            if not isinstance(content[key], list):
                raise TypeError(key)
    except FileNotFoundError:
        raise NATSError(
            f"{path} is missing. Unpack COCO's annotations (annotations_trainval2014.zip and "
            "annotations_trainval2017.zip of https://cocodataset.org/#download) there, or name "
            "another folder with --annotations"
        ) from None
    except (KeyError, TypeError, ValueError):
        raise NATSError(f"{path} is not a COCO instances file") from None
    return content


def split(val2014: dict, minival_ids: set) -> dict:
    """Cut val2014 into its two parts.

    Args:
        val2014: COCO annotations.
        minival_ids: the ids of the images in minival.

    Returns:
        File name → annotations, in the order of `val2014`. Everything but images and annotations
        is in both parts.

    Raises:
        NATSError: some of the ids are not in `val2014`, or a part would be empty.
    """
    ids = {image["id"] for image in val2014["images"]}
    unknown = minival_ids - ids
    if unknown:
        raise NATSError(
            f"{len(unknown)} of the {len(minival_ids)} images of val2017 are not in val2014, such "
            f"as id {min(unknown)}: the two files are from different data sets"
        )
    parts = {}
    for name, part_ids in ((MINIVAL, minival_ids), (VAL35K, ids - minival_ids)):
        if not part_ids:
            raise NATSError(f"{name} would have no images: val2017 has none or all of val2014's")
        parts[name] = {
            **val2014,
            "images": [image for image in val2014["images"] if image["id"] in part_ids],
            "annotations": [a for a in val2014["annotations"] if a["image_id"] in part_ids],
        }
    return parts


def default_annotations() -> Path:
    """Where Detectron2 looks for COCO's annotations."""
    root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    return Path(root) / "coco" / "annotations"


def parse_args(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--annotations",
        type=Path,
        default=default_annotations(),
        metavar="DIR",
        help="folder with instances_val2014.json and instances_val2017.json; the two new files are "
        "written there (default: $DETECTRON2_DATASETS/coco/annotations, here %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="replace existing files")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    present = [name for name in EXPECTED if (args.annotations / name).exists()]
    if present and not args.force:
        raise NATSError(f"{args.annotations / present[0]} exists; --force replaces it")
    val2014 = load_instances(args.annotations / "instances_val2014.json")
    val2017 = load_instances(args.annotations / "instances_val2017.json")
    parts = split(val2014, {image["id"] for image in val2017["images"]})
    for name, part in parts.items():
        count = len(part["images"])
        if count != EXPECTED[name]:
            print(
                f"warning: {name} has {count} images, in COCO it has {EXPECTED[name]}",
                file=sys.stderr,
            )
        print(f"{name}: {count} images, {len(part['annotations'])} annotations")
    for name, part in parts.items():
        path = args.annotations / name
        try:
            # json.dumps is several times as fast as json.dump
            Path(f"{path}.new").write_text(json.dumps(part))
            os.replace(f"{path}.new", path)
        except OSError as error:
            raise NATSError(f"{path}: cannot be written: {error.strerror or error}") from None
        print(f"wrote {path}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except NATSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
