"""Cut COCO annotations into folds, so that every image is tested once."""

import json
import os
from typing import Any, Dict, Mapping, Sequence

import numpy as np

from detectron2_nats import NATSError

CALIBRATION_SHARE = 0.3
"""Of the images that are not tested: the share on which a search trains α."""


def merged_annotations(paths: Sequence[str]) -> Dict[str, Any]:
    """Merge several COCO annotation files. Images and annotations get new ids.

    Whether the annotations are sound is checked by each run that reads the folds.

    Raises:
        NATSError: a file is not in COCO's format, categories differ, or an image is in two files.
    """
    merged: Dict[str, Any] = {"images": [], "annotations": [], "categories": None}
    files = set()
    for path in paths:
        content = _read(path)
        if merged["categories"] not in (None, content["categories"]):
            raise NATSError(f"{path}: its categories differ from those of {paths[0]}")
        merged["categories"] = content["categories"]
        new_ids = {}
        for image in content["images"]:
            if image["file_name"] in files:
                raise NATSError(f"{path}: {image['file_name']} is in two files")
            files.add(image["file_name"])
            new_ids[image["id"]] = len(files)
            merged["images"].append({**image, "id": len(files)})
        for annotation in content["annotations"]:
            new = {"id": len(merged["annotations"]) + 1}
            new["image_id"] = new_ids.get(annotation["image_id"])
            if new["image_id"] is None:
                raise NATSError(f"{path}: annotation {annotation['id']} is of no image in it")
            merged["annotations"].append({**annotation, **new})
    return merged


def _read(path: str) -> Dict[str, Any]:
    """The images, annotations and categories of a file; categories by id and name alone."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        categories = [{"id": c["id"], "name": c["name"]} for c in content["categories"]]
        {image["file_name"]: image["id"] for image in content["images"]}
        {annotation["id"]: annotation["image_id"] for annotation in content["annotations"]}
    except OSError as error:
        raise NATSError(f"{path}: cannot be read: {error.strerror}") from None
    except (KeyError, TypeError, ValueError):
        raise NATSError(f"{path}: not COCO's annotation format") from None
    return {**content, "categories": sorted(categories, key=lambda category: category["id"])}


def cut(annotations: Mapping[str, Any], folds: int) -> Dict[str, Dict[str, Any]]:
    """Cut annotations into the splits of each fold.

    Every image is in the test split of exactly one fold. `rest` is all other images of a fold, on
    which a detector is trained. For a search, `calibration` is 30 % of `rest` and `train` the
    remainder. The same input gives the same splits.

    Returns:
        "fold_0/test", "fold_0/rest", … → annotations.

    Raises:
        NATSError: there are fewer than three images per fold.
    """
    images = annotations["images"]
    if len(images) < 3 * folds:
        raise NATSError(f"{len(images)} images are too few for {folds} folds")
    order = np.random.default_rng(0).permutation(len(images))
    splits = {}
    for fold in range(folds):
        test = [i for place, i in enumerate(order) if place % folds == fold]
        rest = [i for place, i in enumerate(order) if place % folds != fold]
        count = max(1, round(CALIBRATION_SHARE * len(rest)))
        parts = {"test": test, "rest": rest, "calibration": rest[:count], "train": rest[count:]}
        for name, numbers in parts.items():
            splits[f"fold_{fold}/{name}"] = _part(annotations, [images[i] for i in sorted(numbers)])
    return splits


def _part(annotations: Mapping[str, Any], images: Sequence[Mapping]) -> Dict[str, Any]:
    ids = {image["id"] for image in images}
    kept = [a for a in annotations["annotations"] if a["image_id"] in ids]
    return {"images": images, "annotations": kept, "categories": annotations["categories"]}


def options(folder: str, fold: int, images: str, training: str) -> list:
    """KEY VALUE pairs that make a run read the splits that lie in FOLDER/fold_K.

    Args:
        images: the folder of the images.
        training: "rest", or for a search "train".
    """
    names = {split: f"study_{fold}_{split}" for split in ("test", "rest", "calibration", "train")}
    register = [
        [name, os.path.join(folder, f"fold_{fold}", f"{split}.json"), images]
        for split, name in names.items()
    ]
    return [
        *("DATASETS.REGISTER", repr(register)),
        *("DATASETS.TRAIN", repr((names[training],))),
        *("DATASETS.CALIBRATION", repr((names["calibration"],))),
        *("DATASETS.TEST", repr((names["test"],))),
    ]
