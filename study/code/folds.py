"""Cut annotations into folds, so that every image is tested once."""

import contextlib
import io
import json
import os
from typing import Any, Dict, Mapping, Sequence

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ...data.annotations import Needs, read_annotations
from ...errors import NATSError
from ...files import write_atomically


def merged_annotations(paths: Sequence[str], needs: Needs = Needs()) -> Dict[str, Any]:
    """Merge several COCO annotation files. Images and annotations get new ids.

    Raises:
        NATSError: a file is not in COCO's format, categories differ, or an image is in two files.
    """
    merged: Dict[str, Any] = {"images": [], "annotations": [], "categories": None}
    files = set()
    for path in paths:
        content = read_annotations(path, needs).content
        categories = [{"id": c["id"], "name": c["name"]} for c in content["categories"]]
        categories.sort(key=lambda category: category["id"])
        if merged["categories"] not in (None, categories):
            raise NATSError(f"{path}: its categories differ from those of {paths[0]}")
        merged["categories"] = categories
        new_ids = {}
        for image in content["images"]:
            if image["file_name"] in files:
                raise NATSError(f"{path}: {image['file_name']} is in two files")
            files.add(image["file_name"])
            new_ids[image["id"]] = len(merged["images"]) + 1
            merged["images"].append({**image, "id": new_ids[image["id"]]})
        for annotation in content["annotations"]:
            image_id = new_ids[annotation["image_id"]]
            new = {"id": len(merged["annotations"]) + 1, "image_id": image_id}
            merged["annotations"].append({**annotation, **new})
    return merged


def write_folds(annotations: Mapping[str, Any], folds: int, folder: str) -> None:
    """Write all.json, and FOLDER/fold_K/{test,train,calibration,rest}.json for each fold K.

    Every image is in the test split of exactly one fold. `rest` is all other images of a fold, on
    which a detector is retrained. For a search, `calibration` is 30 % of `rest` and `train` the
    remainder. The same input gives the same files.

    Raises:
        NATSError: there are fewer than three images per fold.
    """
    images = list(annotations["images"])
    if len(images) < 3 * folds:
        raise NATSError(f"{len(images)} images are too few for {folds} folds")
    order = np.random.default_rng(0).permutation(len(images))
    write_atomically(os.path.join(folder, "all.json"), json.dumps(annotations))
    for fold in range(folds):
        test = [i for place, i in enumerate(order) if place % folds == fold]
        rest = [i for place, i in enumerate(order) if place % folds != fold]
        cut = max(1, round(0.3 * len(rest)))
        for name, chosen in {
            "test": test,
            "rest": rest,
            "calibration": rest[:cut],
            "train": rest[cut:],
        }.items():
            kept = [images[i] for i in sorted(chosen)]
            ids = {image["id"] for image in kept}
            content = {
                "images": kept,
                "annotations": [a for a in annotations["annotations"] if a["image_id"] in ids],
                "categories": annotations["categories"],
            }
            path = os.path.join(folder, f"fold_{fold}", f"{name}.json")
            write_atomically(path, json.dumps(content))


def pooled_ap(annotation_file: str, result_files: Sequence[str]) -> float:
    """AP, in percent, of the detections of all folds together; each image was tested once."""
    detections = []
    for path in result_files:
        with open(path) as file:
            detections += json.load(file)
    if not detections:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotation_file)
        evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * float(evaluation.stats[0])
