"""Register data sets from a config (``DATASETS.REGISTER``), and check them before a run."""

import difflib
import logging
import os
from itertools import zip_longest
from typing import Dict, List, Optional, Sequence

import pycocotools.mask as mask_util

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin import _PREDEFINED_SPLITS_COCO
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..errors import NATSError
from .annotations import Annotations, Needs, parse, read_annotations, reading
from .images import look_at_images

logger = logging.getLogger(__name__)

_needs: Dict[str, Needs] = {}  # of the data sets in DATASETS.REGISTER, as the last config has them


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
        _needs[name] = _needs_of(cfg, name)
        if name in DatasetCatalog.list():
            old = MetadataCatalog.get(name)
            if (old.get("json_file"), old.get("image_root")) != (json_file, image_root):
                raise NATSError(f"DATASETS.REGISTER: the name {name!r} is taken: choose another")
            continue
        DatasetCatalog.register(name, lambda name=name: _load(name))
        MetadataCatalog.get(name).set(
            json_file=json_file, image_root=image_root, evaluator_type="coco"
        )


def _needs_of(cfg: CfgNode, name: str) -> Needs:
    to_train = name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.CALIBRATION)
    masks = ""
    if cfg.MODEL.MASK_ON:
        masks = "polygon" if to_train and cfg.INPUT.MASK_FORMAT == "polygon" else "any"
    return Needs(masks, to_train)


def _load(name: str) -> List[dict]:
    """Detectron2's dataset dicts of a registered name."""
    meta = MetadataCatalog.get(name)
    annotations = read_annotations(meta.json_file, _needs[name])
    # Metadata cannot be set twice to different values: a file may have been corrected meanwhile
    for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
        meta.__dict__.pop(key, None)
    meta.thing_classes = annotations.class_names
    meta.thing_dataset_id_to_contiguous_id = annotations.label_of
    records = to_records(annotations, meta.image_root)
    objects = sum(len(record["annotations"]) for record in records)
    logger.info(f"{meta.json_file}: {len(records)} images, {objects} objects")
    return records


def to_records(annotations: Annotations, image_root: str) -> List[dict]:
    """Detectron2's dataset dicts, in the order of the image ids."""
    labels, of_image = annotations.label_of, {}
    for annotation in annotations.content.get("annotations", ()):
        of_image.setdefault(annotation["image_id"], []).append(annotation)
    records = []
    for image in sorted(annotations.content["images"], key=lambda image: image["id"]):
        objects = []
        for annotation in of_image.get(image["id"], ()):
            made = {key: annotation[key] for key in ("iscrowd", "bbox")}
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


# -- before a run ---------------------------------------------------------------------------------


def check_datasets(names: Sequence[str], key: str) -> None:
    """Check that each data set is registered, and that its files exist.

    Raises:
        NATSError: names `key`, the file that was looked for, and how to get it.
    """
    for name in names:
        known = DatasetCatalog.list()
        if name not in known:
            close = " or ".join(difflib.get_close_matches(name, known, 3))
            raise NATSError(
                f"{key}: no data set {name!r} is registered{close and f', did you mean {close}'}? "
                "Register your own data with DATASETS.REGISTER"
            )
        meta = MetadataCatalog.get(name)
        for what, path, is_there in (
            ("annotation file", meta.get("json_file"), PathManager.isfile),
            ("image folder", meta.get("image_root"), PathManager.isdir),
        ):
            # whether there is a file at https:// is seen when it is fetched
            if path and not path.startswith("http") and not is_there(path):
                cure = "Correct DATASETS.REGISTER, a list of [name, annotation json, image folder]"
                if name.startswith("coco_"):
                    cure = "Set DETECTRON2_DATASETS to the folder that contains coco/"
                if name in ("coco_2014_valminusminival", "coco_2014_minival"):
                    cure = "Make it from COCO's own downloads with tools/make_val35k.py"
                raise NATSError(
                    f"{key}: {name}: {what} not found, looked for {os.path.abspath(path)}. {cure}"
                )


def check_data(cfg: CfgNode, keys: Sequence[str], classes: Optional[Sequence[str]] = None) -> None:
    """Check that a run's data sets can be used, and that all mean the same by a label.

    Detectron2's own data sets are taken as published.

    Args:
        keys: of ``cfg.DATASETS``, such as TRAIN. Of each, the class names are compared with those
            of the first, or with `classes`.
        classes: names of the classes that the detector was trained on, if known.

    Raises:
        NATSError: names the data set, the first class that differs or the first image or annotation
            that cannot be used, and the cure.
    """
    expected, whose = classes, "the detector"
    keypoints, sigmas = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, cfg.TEST.KEYPOINT_OKS_SIGMAS
    if cfg.MODEL.KEYPOINT_ON and cfg.DATASETS.TEST and keypoints not in (17, len(sigmas)):
        raise NATSError(f"evaluation needs {keypoints} numbers in TEST.KEYPOINT_OKS_SIGMAS")
    published = {name for splits in _PREDEFINED_SPLITS_COCO.values() for name in splits}
    for key in keys:
        check_datasets(cfg.DATASETS[key], f"DATASETS.{key}")
        for name in cfg.DATASETS[key]:
            place, meta = f"DATASETS.{key}: {name}", MetadataCatalog.get(name)
            if name not in _needs and name not in published and meta.get("json_file"):
                if meta.get("evaluator_type") == "coco":  # registered in Python
                    read_annotations(meta.json_file, _needs_of(cfg, name))
            records = DatasetCatalog.get(name)
            if not len(records):
                raise NATSError(f"{place} contains no images")
            look_at_images(records, name, cfg.RUN.MAX_BAD_DATA)
            if key != "TEST" and cfg.MODEL.KEYPOINT_ON and not meta.get("keypoint_names"):
                raise NATSError(
                    f"{place}: keypoints need names and a map of those that mirroring swaps, which "
                    "DATASETS.REGISTER cannot give. Register the data set in Python, and set "
                    "keypoint_names and keypoint_flip_map in its metadata"
                )
            names = meta.get("thing_classes")
            if names is not None:
                if expected is None:
                    expected, whose = names, place
                check_same_classes(names, expected, place, whose)
                _check_number_of_classes(
                    cfg, name, len(names), len(meta.get("stuff_classes", ())) or None
                )


def check_registered_classes(cfg: CfgNode) -> None:
    """Check that all of ``DATASETS.REGISTER`` have the classes of those in ``DATASETS.TEST``.

    An evaluation does not read what a detector was trained on, but may know it from here.

    Raises:
        NATSError: names the first class that differs.
    """
    tested = [name for name, *_ in cfg.DATASETS.REGISTER if name in cfg.DATASETS.TEST]
    for name, json_file, _ in cfg.DATASETS.REGISTER:
        if tested and name not in tested and os.path.isfile(json_file):
            with reading(json_file) as path:
                names = Annotations(parse(path)).class_names
            expected = MetadataCatalog.get(tested[0]).thing_classes
            check_same_classes(expected, names, f"DATASETS.TEST: {tested[0]}", name)


def check_same_classes(
    names: Sequence[str], expected: Sequence[str], place: str, whose: str
) -> None:
    """Raise NATSError, which names the first class that differs."""
    for label, pair in enumerate(zip_longest(names, expected)):
        if pair[0] != pair[1]:
            own, other = ("not there" if name is None else repr(name) for name in pair)
            raise NATSError(
                f"{place}: class {label} is {own}, of {whose} it is {other}. Write the same "
                "categories, with the same ids, into all annotation files, also those that do not "
                "occur in one of them"
            )


def _check_number_of_classes(cfg: CfgNode, name: str, things: int, stuff: Optional[int]) -> None:
    """Compare with what the model is told, by the keys that its architecture reads."""
    architecture = cfg.MODEL.META_ARCHITECTURE
    for node, architectures, count in (
        ("ROI_HEADS", ("GeneralizedRCNN", "PanopticFPN"), things),
        ("RETINANET", ("RetinaNet",), things),
        ("SEM_SEG_HEAD", ("PanopticFPN", "SemanticSegmentor"), stuff),
    ):
        told = cfg.MODEL[node].NUM_CLASSES
        if architecture in architectures and count is not None and told != count:
            key = f"MODEL.{node}.NUM_CLASSES"
            raise NATSError(f"{name} has {count} classes, the model {told}: set {key} {count}")
