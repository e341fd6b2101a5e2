#!/usr/bin/env python3
"""Make COCO's two parts of val2014, "minival" (5,000 images) and "val35k" (35,504 images).

Detectron2 registers them as coco_2014_minival and coco_2014_valminusminival, but COCO's own
downloads contain only instances_val2014.json and instances_val2017.json. Minival is the part of
val2014 that has the image ids of val2017. Image names stay those of val2014.
"""

import argparse
import json
import os
import sys
from pathlib import Path

MINIVAL = "instances_minival2014.json"
VAL35K = "instances_valminusminival2014.json"
# Number of images of each part in the real COCO.
EXPECTED = {MINIVAL: 5000, VAL35K: 35504}


class SplitError(Exception):
    """Bad input; the message is one line."""


def load_instances(path: Path) -> dict:
    """
    Returns:
        a COCO annotation file's content, with distinct image ids and no annotation of an image
        that the file does not list.

    Raises:
        SplitError: the file is missing or is not such a file.
    """
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
    except FileNotFoundError:
        raise SplitError(
            f"{path} is missing. Unpack COCO's annotations (annotations_trainval2014.zip and "
            "annotations_trainval2017.zip of https://cocodataset.org/#download) there, or name "
            "another folder with --annotations"
        ) from None
    except ValueError as e:
        raise SplitError(f"{path} is not JSON: {e}") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise SplitError(f"{path} is not a COCO instances file: it has no list '{key}'")
    try:
        image_ids = [image["id"] for image in content["images"]]
        annotated_ids = {annotation["image_id"] for annotation in content["annotations"]}
    except (KeyError, TypeError):
        raise SplitError(f"{path}: an image has no 'id' or an annotation no 'image_id'") from None
    if len(set(image_ids)) != len(image_ids):
        raise SplitError(f"{path} lists {len(image_ids) - len(set(image_ids))} image ids twice")
    strangers = annotated_ids - set(image_ids)
    if strangers:
        raise SplitError(
            f"{path} annotates {len(strangers)} images that it does not list, such as id "
            f"{min(strangers)}"
        )
    return content


def split(val2014: dict, minival_ids: set) -> dict:
    """
    Args:
        val2014: COCO annotations.
        minival_ids: ids of some of its images.

    Returns:
        annotations of the two parts by their file names, in the order of `val2014`. Everything
        but images and annotations is in both.

    Raises:
        SplitError: some of the ids are not in `val2014`, or a part would be empty.
    """
    ids = {image["id"] for image in val2014["images"]}
    unknown = minival_ids - ids
    if unknown:
        raise SplitError(
            f"{len(unknown)} of the {len(minival_ids)} images of val2017 are not in val2014, such "
            f"as id {min(unknown)}: the two files are from different data sets"
        )
    parts = {}
    for name, part_ids in ((MINIVAL, minival_ids), (VAL35K, ids - minival_ids)):
        if not part_ids:
            raise SplitError(f"{name} would have no images: val2017 has none or all of val2014's")
        parts[name] = {
            **val2014,
            "images": [image for image in val2014["images"] if image["id"] in part_ids],
            "annotations": [a for a in val2014["annotations"] if a["image_id"] in part_ids],
        }
    return parts


def write_all(parts: dict, folder: Path) -> None:
    """Write every part under another name, then rename it: no file is ever incomplete."""
    asides = {folder / name: folder / f".{name}.{os.getpid()}" for name in parts}
    try:
        for path, aside in asides.items():
            with open(aside, "w", encoding="utf-8") as f:
                f.write(json.dumps(parts[path.name]))  # several times as fast as json.dump
        for path, aside in asides.items():
            os.replace(aside, path)
    finally:
        for aside in asides.values():
            aside.unlink(missing_ok=True)


def default_annotations() -> Path:
    """Where Detectron2 looks for COCO's annotations."""
    root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    return Path(root) / "coco" / "annotations"


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: DETECTRON2_DATASETS=/data python tools/make_val35k.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        present = [name for name in EXPECTED if (args.annotations / name).exists()]
        if present and not args.force:
            raise SplitError(f"{args.annotations / present[0]} exists; --force replaces it")
        val2014 = load_instances(args.annotations / "instances_val2014.json")
        val2017 = load_instances(args.annotations / "instances_val2017.json")
        parts = split(val2014, {image["id"] for image in val2017["images"]})
        write_all(parts, args.annotations)
    except (SplitError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    for name, part in parts.items():
        count = len(part["images"])
        if count != EXPECTED[name]:
            print(
                f"warning: {name} has {count} images, in COCO it has {EXPECTED[name]}",
                file=sys.stderr,
            )
        print(f"{name}: {count} images, {len(part['annotations'])} annotations")
    for name in parts:
        print(args.annotations / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
