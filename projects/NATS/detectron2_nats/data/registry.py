"""Register data sets from a config (``DATASETS.REGISTER``), and check them before a run."""

import difflib
import json
import logging
import math
import os
import tempfile
from typing import List, Optional, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager

from ..errors import NATSError, one_line

# What Detectron2's reader and our checks raise for a file of another format.
_MALFORMED = (AssertionError, AttributeError, KeyError, RecursionError, TypeError, ValueError)

logger = logging.getLogger(__name__)


def register_datasets(cfg: CfgNode) -> None:
    """Register every [name, annotation json, image folder] of ``DATASETS.REGISTER``, repeatably.

    Raises:
        NATSError: an entry is malformed, or its name is taken by other files.
    """
    for entry in cfg.DATASETS.REGISTER:
        is_list = isinstance(entry, (list, tuple)) and len(entry) == 3
        if not is_list or not all(isinstance(part, str) and part for part in entry):
            raise NATSError(
                f"DATASETS.REGISTER: expected [name, annotation json, image folder], got {entry!r}"
            )
        name, json_file, image_root = entry
        if name in DatasetCatalog.list():
            old = MetadataCatalog.get(name)
            if (old.get("json_file"), old.get("image_root")) != (json_file, image_root):
                raise NATSError(f"DATASETS.REGISTER: the name {name!r} is taken: choose another")
            continue
        share = cfg.RUN.MAX_BAD_DATA
        DatasetCatalog.register(
            name, lambda n=name, j=json_file, r=image_root, s=share: _load(n, j, r, s)
        )
        MetadataCatalog.get(name).set(
            json_file=json_file, image_root=image_root, evaluator_type="coco"
        )


def _load(name: str, json_file: str, image_root: str, max_bad_share: float) -> List[dict]:
    """Read a COCO annotation file, without the annotations that cannot be used."""
    try:
        content = _without_bad(json_file, max_bad_share)
        if content is None:
            return load_coco_json(json_file, image_root, name)
        with tempfile.TemporaryDirectory() as folder:  # Detectron2's reader takes a path
            copy = os.path.join(folder, os.path.basename(json_file))
            with open(copy, "w") as file:
                json.dump(content, file)
            return load_coco_json(copy, image_root, name)
    except NATSError:
        raise
    except _MALFORMED as error:
        raise NATSError(f"{json_file}: not COCO's annotation format ({one_line(error)})") from None


def _without_bad(json_file: str, max_bad_share: float) -> Optional[dict]:
    """The file's content without bad annotations, with one warning; None if all are good.

    Raises:
        NATSError: more than `max_bad_share` of the annotations are bad.
    """
    with open(json_file) as file:
        content = json.load(file)
    images = {image["id"]: image["file_name"] for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    annotations = content["annotations"]
    bad = {i: why for i, a in enumerate(annotations) if (why := _fault(a, images, categories))}
    if not bad:
        return None
    first, why = next(iter(bad.items()))
    where = images.get(annotations[first].get("image_id"), "no listed image")
    summary = (
        f"{json_file}: {len(bad)} of {len(annotations)} annotations cannot be used, the first "
        f"(id {annotations[first].get('id')}, {where}): {why}"
    )
    if len(bad) > max_bad_share * len(annotations):
        raise NATSError(f"{summary}. Repair the file, or raise RUN.MAX_BAD_DATA ({max_bad_share})")
    logger.warning(f"{summary}. They are skipped.")
    content["annotations"] = [a for i, a in enumerate(annotations) if i not in bad]
    return content


def _fault(annotation: dict, images, categories) -> str:
    """Why an annotation cannot be used; "" if it can."""
    if annotation["image_id"] not in images:
        return f"image id {annotation['image_id']} is not listed"
    if annotation["category_id"] not in categories:
        return f"category {annotation['category_id']} is not in the list of categories"
    box = annotation["bbox"]
    if len(box) != 4 or not all(math.isfinite(value) for value in box):
        return f"box {box} is not [x, y, width, height]"
    if box[2] <= 0 or box[3] <= 0:
        return f"box {box} has no size"
    return ""


def check_datasets(names: Sequence[str], key: str) -> None:
    """Check that each data set is registered, and that its files exist.

    Raises:
        NATSError: names `key`, the file that was looked for, and how to get it.
    """
    for name in names:
        known = DatasetCatalog.list()
        if name not in known:
            close = difflib.get_close_matches(name, known, 3)
            raise NATSError(
                f"{key}: no data set {name!r} is registered"
                + (f", did you mean {' or '.join(close)}" if close else "")
                + "? Register your own data with DATASETS.REGISTER"
            )
        meta = MetadataCatalog.get(name)
        for what, path in (
            ("annotation file", meta.get("json_file")),
            ("image folder", meta.get("image_root")),
        ):
            if path is not None and not PathManager.exists(path):
                raise NATSError(
                    f"{key}: {name}: {what} not found, looked for {os.path.abspath(path)}. "
                    + _how_to_get(name)
                )


def _how_to_get(name: str) -> str:
    if name in ("coco_2014_valminusminival", "coco_2014_minival"):
        return "Make it from COCO's own downloads with tools/make_val35k.py"
    if name.startswith("coco_"):
        return "Download COCO and set DETECTRON2_DATASETS to the folder that contains coco/"
    return "Correct the path in DATASETS.REGISTER"
