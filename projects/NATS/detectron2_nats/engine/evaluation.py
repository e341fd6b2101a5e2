"""Choose the evaluator of a data set, as Detectron2's own training script does."""

import functools
import os
from importlib.util import find_spec

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

from ..data.registry import evaluated_name
from ..errors import NATSError

_PACKAGES = {  # kind of data set → what Detectron2 imports when it evaluates it
    "coco": "",
    "sem_seg": "",
    "coco_panoptic_seg": "panopticapi",
    "lvis": "lvis",
    "pascal_voc": "",
    "cityscapes_instance": "cityscapesscripts",
    "cityscapes_sem_seg": "cityscapesscripts",
}


def check_evaluator(dataset_name: str) -> None:
    """Check that a registered data set can be evaluated here.

    Raises:
        NATSError: nothing evaluates its kind, or a package is missing.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in _PACKAGES:
        raise NATSError(
            f"no evaluator for data set {dataset_name!r} of type {kind!r}: expected evaluator_type "
            f"{', '.join(_PACKAGES)} in its metadata"
        )
    if _PACKAGES[kind] and not find_spec(_PACKAGES[kind]):
        raise NATSError(
            f"the evaluation of {dataset_name!r} needs {_PACKAGES[kind]}, which is not installed "
            "here: install it, or leave the data set out of DATASETS.TEST"
        )


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """The evaluator of a registered data set. It writes results to ``OUTPUT_DIR/inference``.

    Raises:
        NATSError: see :func:`check_evaluator`.
    """
    check_evaluator(dataset_name)
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    coco = functools.partial(_coco_evaluator, cfg, dataset_name, folder)
    sem_seg = functools.partial(SemSegEvaluator, dataset_name, output_dir=folder)
    builders = {
        "coco": [coco],
        "sem_seg": [sem_seg],
        "coco_panoptic_seg": [sem_seg, coco, lambda: COCOPanopticEvaluator(dataset_name, folder)],
        "lvis": [lambda: LVISEvaluator(dataset_name, output_dir=folder)],
        "pascal_voc": [lambda: PascalVOCDetectionEvaluator(dataset_name)],
        "cityscapes_instance": [lambda: CityscapesInstanceEvaluator(dataset_name)],
        "cityscapes_sem_seg": [lambda: CityscapesSemSegEvaluator(dataset_name)],
    }
    kind = MetadataCatalog.get(dataset_name).evaluator_type
    return DatasetEvaluators([build() for build in builders[kind]])


def _coco_evaluator(cfg: CfgNode, dataset_name: str, folder: str) -> COCOEvaluator:
    name = evaluated_name(cfg, dataset_name, folder)
    # not what it converted for an earlier run, which may have had other data under this name
    return COCOEvaluator(name, output_dir=folder, allow_cached_coco=False)
