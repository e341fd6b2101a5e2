"""Choose the evaluator of a data set, as Detectron2's own training script does."""

import os
from importlib.util import find_spec
from typing import Callable, Dict, List, Tuple

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


def _coco_evaluator(cfg: CfgNode, name: str, folder: str) -> COCOEvaluator:
    name = evaluated_name(cfg, name, folder)
    # not what it converted for an earlier run, which may have had other data under this name
    return COCOEvaluator(name, output_dir=folder, allow_cached_coco=False)


def _panoptic_evaluators(cfg: CfgNode, name: str, folder: str) -> List[DatasetEvaluator]:
    semantic = SemSegEvaluator(name, output_dir=folder)
    return [semantic, _coco_evaluator(cfg, name, folder), COCOPanopticEvaluator(name, folder)]


# Kind of data set → the package that Detectron2 imports when it evaluates it, and the evaluators.
_KINDS: Dict[str, Tuple[str, Callable[[CfgNode, str, str], List[DatasetEvaluator]]]] = {
    "coco": ("", lambda *place: [_coco_evaluator(*place)]),
    "sem_seg": ("", lambda _, name, folder: [SemSegEvaluator(name, output_dir=folder)]),
    "coco_panoptic_seg": ("panopticapi", _panoptic_evaluators),
    "lvis": ("lvis", lambda _, name, folder: [LVISEvaluator(name, output_dir=folder)]),
    "pascal_voc": ("", lambda _, name, __: [PascalVOCDetectionEvaluator(name)]),
    "cityscapes_instance": (
        "cityscapesscripts",
        lambda _, name, __: [CityscapesInstanceEvaluator(name)],
    ),
    "cityscapes_sem_seg": (
        "cityscapesscripts",
        lambda _, name, __: [CityscapesSemSegEvaluator(name)],
    ),
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
    _, build = _KINDS[MetadataCatalog.get(dataset_name).evaluator_type]
    return DatasetEvaluators(build(cfg, dataset_name, os.path.join(cfg.OUTPUT_DIR, "inference")))
