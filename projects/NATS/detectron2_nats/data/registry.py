"""Register data sets from a config (``DATASETS.REGISTER``), and check them before a run."""

import difflib
import json
import logging
import os
from typing import Callable, Dict, Iterator, List, Optional, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin import _PREDEFINED_SPLITS_COCO
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..errors import NATSError
from ..files import write_atomically
from .annotations import Annotations, Needs, read_annotations, read_class_names, to_records
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
    return Needs(cfg.RUN.MAX_BAD_DATA, masks, to_train)


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


def evaluated_name(cfg: CfgNode, name: str, folder: str) -> str:
    """The name of a data set whose annotation file is clean, for Detectron2's evaluator.

    It reads the file itself. Where cleaning has changed it, the clean one is written to `folder`
    and registered under another name.
    """
    annotations = _own_annotations(cfg, name)
    if annotations is None or not annotations.changed:
        return name
    meta = MetadataCatalog.get(name)
    path = os.path.join(folder, f"annotations_{name}.json")
    os.makedirs(folder, exist_ok=True)
    write_atomically(path, json.dumps(annotations.content))
    cleaned = f"{name} (cleaned)"
    MetadataCatalog.pop(cleaned, None)
    MetadataCatalog.get(cleaned).set(
        json_file=path,
        image_root=meta.get("image_root"),
        evaluator_type="coco",
        thing_classes=annotations.class_names,
        thing_dataset_id_to_contiguous_id=annotations.label_of,
    )
    return cleaned


def _own_annotations(cfg: CfgNode, name: str) -> Optional[Annotations]:
    """What an own annotation file contains; None of Detectron2's sets, taken as published."""
    meta = MetadataCatalog.get(name)
    builtin = any(name in splits for splits in _PREDEFINED_SPLITS_COCO.values())
    if builtin or not meta.get("json_file") or meta.get("evaluator_type") != "coco":
        return None
    return read_annotations(meta.json_file, _needs.get(name) or _needs_of(cfg, name))


# -- before a run ---------------------------------------------------------------------------------


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
        json_file, folder = meta.get("json_file"), meta.get("image_root")
        if json_file and folder and os.path.isdir(json_file) and os.path.isfile(folder):
            raise NATSError(
                f"{key}: {name}: {json_file} is a folder and {folder} a file: in DATASETS.REGISTER "
                "the annotation file comes before the image folder"
            )
        for what, path, is_there in (
            ("annotation file", json_file, PathManager.isfile),
            ("image folder", folder, PathManager.isdir),
        ):
            if path is not None and not _told(is_there, path):
                raise NATSError(
                    f"{key}: {name}: {what} not found, looked for {os.path.abspath(path)}. "
                    + _how_to_get(name)
                )


def _told(is_there: Callable[[str], bool], path: str) -> bool:
    try:
        return is_there(path)
    except NotImplementedError:  # of https:// it is seen when the file is fetched
        return True


def _how_to_get(name: str) -> str:
    if name in ("coco_2014_valminusminival", "coco_2014_minival"):
        return "Make it from COCO's own downloads with tools/make_val35k.py"
    if name.startswith("coco_"):
        return "Download COCO and set DETECTRON2_DATASETS to the folder that contains coco/"
    return "Correct the path in DATASETS.REGISTER"


def check_data(cfg: CfgNode, keys: Sequence[str], classes: Optional[Sequence[str]] = None) -> None:
    """Check that a run's data sets can be used, and that all mean the same by a label.

    Call it on all ranks. All data sets are read once.

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
    for key in keys:
        check_datasets(cfg.DATASETS[key], f"DATASETS.{key}")
        for name in cfg.DATASETS[key]:
            records = DatasetCatalog.get(name)
            if name not in _needs:  # registered in Python: its file has not been read here
                _own_annotations(cfg, name)
            if not len(records):
                raise NATSError(f"DATASETS.{key}: {name} contains no images")
            _on_main_process(look_at_images, records, name, cfg.RUN.MAX_BAD_DATA)
            meta = MetadataCatalog.get(name)
            if key != "TEST" and cfg.MODEL.KEYPOINT_ON and not meta.get("keypoint_names"):
                raise NATSError(
                    f"DATASETS.{key}: {name}: keypoints need names and a map of those that "
                    "mirroring swaps, which DATASETS.REGISTER cannot give. Register the data set "
                    "in Python, and set keypoint_names and keypoint_flip_map in its metadata"
                )
            names = meta.get("thing_classes")
            if names is None:
                continue
            if expected is not None:
                check_same_classes(names, expected, f"DATASETS.{key}: {name}", whose)
            else:
                expected, whose = names, f"DATASETS.{key}: {name}"
            check_number_of_classes(cfg, name, len(names), len(meta.get("stuff_classes", ())))


def check_registered_classes(cfg: CfgNode) -> None:
    """Check that all of ``DATASETS.REGISTER`` have the classes of the first of ``DATASETS.TEST``.

    An evaluation does not read what a detector was trained on, but may know it from here.

    Raises:
        NATSError: names the first class that differs.
    """
    test = [entry for entry in cfg.DATASETS.REGISTER if entry[0] in cfg.DATASETS.TEST]
    for name, json_file, _ in cfg.DATASETS.REGISTER if test else ():
        if os.path.isfile(json_file):
            tested = MetadataCatalog.get(test[0][0]).thing_classes
            place = f"DATASETS.TEST: {test[0][0]}"
            check_same_classes(tested, read_class_names(json_file), place, name)


def check_same_classes(
    names: Sequence[str], expected: Sequence[str], place: str, whose: str
) -> None:
    """Raise NATSError, which names the first class that differs."""
    for label, (own, other) in enumerate(_pairs(names, expected)):
        if own != other:
            raise NATSError(
                f"{place}: class {label} is {own or 'not there'}, of {whose} it is "
                f"{other or 'not there'}. Write the same categories, with the same ids, into all "
                "annotation files, also those that do not occur in one of them"
            )


def _pairs(one: Sequence[str], other: Sequence[str]) -> Iterator[tuple]:
    for label in range(max(len(one), len(other))):
        yield tuple(repr(names[label]) if label < len(names) else "" for names in (one, other))


def check_number_of_classes(cfg: CfgNode, name: str, things: int, stuff: int = 0) -> None:
    """Compare with what the model is told, by the keys that its architecture reads.

    Raises:
        NATSError: names the key to set.
    """
    architecture = cfg.MODEL.META_ARCHITECTURE
    read = {}
    if architecture in ("GeneralizedRCNN", "PanopticFPN"):
        read["ROI_HEADS"] = things
    if architecture == "RetinaNet":
        read["RETINANET"] = things
    if architecture in ("PanopticFPN", "SemanticSegmentor") and stuff:
        read["SEM_SEG_HEAD"] = stuff
    for node, there in read.items():
        told = cfg.MODEL[node].NUM_CLASSES
        if told != there:
            key = f"MODEL.{node}.NUM_CLASSES"
            raise NATSError(f"{name} has {there} classes, the model {told}: set {key} {there}")


def _on_main_process(check, *args) -> None:
    """Call a check on the main process; if it raises, all ranks do."""
    message = ""
    if comm.is_main_process():
        try:
            check(*args)
        except NATSError as error:
            message = str(error)
    message = comm.all_gather(message)[0]
    if message:
        raise NATSError(message)
