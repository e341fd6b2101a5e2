"""Choose the evaluator of a data set, as Detectron2's own training script does."""

import os
from importlib.util import find_spec
from typing import Any, Dict, List, Tuple, Type

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

from ..errors import NATSError

# Kind of data set → the package that Detectron2 imports when it evaluates it, and what evaluates it
_KINDS: Dict[str, Tuple[str, List[Type[DatasetEvaluator]]]] = {
    "coco": ("", [COCOEvaluator]),
    "sem_seg": ("", [SemSegEvaluator]),
    "coco_panoptic_seg": ("panopticapi", [SemSegEvaluator, COCOEvaluator, COCOPanopticEvaluator]),
    "lvis": ("lvis", [LVISEvaluator]),
    "pascal_voc": ("", [PascalVOCDetectionEvaluator]),
    "cityscapes_instance": ("cityscapesscripts", [CityscapesInstanceEvaluator]),
    "cityscapes_sem_seg": ("cityscapesscripts", [CityscapesSemSegEvaluator]),
}


def check_evaluator(dataset_name: str) -> None:
    """Check that a registered data set can be evaluated here.

    Raises:
        NATSError: nothing evaluates its kind, or a package is missing.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in _KINDS:
        raise NATSError(
            f"no evaluator for data set {dataset_name!r} of type {kind!r}: expected evaluator_type "
            f"{', '.join(_KINDS)} in its metadata"
        )
    package, _ = _KINDS[kind]
    if package and not find_spec(package):
        raise NATSError(
            f"the evaluation of {dataset_name!r} needs {package}, which is not installed here: "
            "install it, or leave the data set out of DATASETS.TEST"
        )


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """The evaluator of a registered data set. It writes results to ``OUTPUT_DIR/inference``.

    Raises:
        NATSError: see :func:`check_evaluator`.
    """
    check_evaluator(dataset_name)
    kind = MetadataCatalog.get(dataset_name).evaluator_type
    evaluators = []
    for evaluator in _KINDS[kind][1]:
        options: Dict[str, Any] = {}
        if not kind.startswith(("pascal_voc", "cityscapes")):
            options["output_dir"] = os.path.join(cfg.OUTPUT_DIR, "inference")
        if evaluator is COCOEvaluator:
            # not what it converted for an earlier run, which may have had other data so named
            options["allow_cached_coco"] = False
            options["max_dets_per_image"] = max(100, cfg.TEST.DETECTIONS_PER_IMAGE)
        evaluators.append(evaluator(dataset_name, **options))
    return DatasetEvaluators(evaluators)
