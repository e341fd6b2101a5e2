"""What :mod:`.look` needs of a Detectron2 detector: backbone, images and objects of a config."""

import logging
from typing import List, Sequence

import numpy as np
from torch import nn

from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.modeling import build_model
from detectron2.structures import BoxMode

from ..config import load_config
from ..data.registry import check_datasets, register_datasets
from ..engine.checkpoint import SafeCheckpointer
from ..engine.machine import set_usable_device
from ..errors import NATSError
from .objects import InputSize, Record


class _QuietCheckpointer(SafeCheckpointer):
    """Heads have no part in how far a backbone sees: keeps what of the backbone is missing."""

    missing: Sequence[str] = ()

    def _log_incompatible_keys(self, incompatible) -> None:
        self.missing = [k for k in incompatible.missing_keys if k.startswith("backbone.")]


class Detector:
    """A config's detector with its weights.

    Args:
        config: a path or a zoo name.
        weights: a file; "" for the config's MODEL.WEIGHTS.
        opts: KEY VALUE pairs.

    Attributes:
        cfg: the config.
        backbone: on MODEL.DEVICE, or the CPU where there is no GPU.
        size: of its input.
        normalisation: mean, deviation and order of the channels, for :func:`.objects.normalised`.
        untrained: names of the backbone's tensors that the weights do not hold.

    Raises:
        NATSError: bad input.
    """

    def __init__(self, config: str, weights: str, opts: Sequence[str]):
        self.cfg: CfgNode = load_config(config, opts)
        set_usable_device(self.cfg)
        model = build_model(self.cfg).eval()
        checkpointer = _QuietCheckpointer(model, "")
        # what the file has beyond the model, such as a classifier's last stage, is no news either
        checkpointer.logger = logging.getLogger(f"{__name__}.weights")
        checkpointer.logger.setLevel(logging.ERROR)
        checkpointer.load(weights or self.cfg.MODEL.WEIGHTS, checkpointables=[])
        self.untrained = list(checkpointer.missing)
        self.backbone: nn.Module = getattr(model, "backbone", model)
        self.size = InputSize(self.cfg.INPUT.MIN_SIZE_TEST, self.cfg.INPUT.MAX_SIZE_TEST)
        mean, deviation = self.cfg.MODEL.PIXEL_MEAN, self.cfg.MODEL.PIXEL_STD
        self.normalisation = list(mean), list(deviation), self.cfg.INPUT.FORMAT

    def records(self) -> List[Record]:
        """The images and objects of the first of DATASETS.TEST and TRAIN.

        Raises:
            NATSError: both are empty, there is no such data set, or it cannot be read.
        """
        register_datasets(self.cfg)
        names = [*self.cfg.DATASETS.TEST, *self.cfg.DATASETS.TRAIN][:1]
        if not names:
            raise NATSError(
                "DATASETS.TEST and TRAIN are empty: name the data with --annotations and --images"
            )
        check_datasets(names, "DATASETS")
        return [_record(r) for r in get_detection_dataset_dicts(names, filter_empty=False)]


def _record(record: dict) -> Record:
    boxes = [
        BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        for annotation in record.get("annotations", [])
        if not annotation.get("iscrowd")
    ]
    array = np.array(boxes, dtype=float).reshape(-1, 4)
    array = array[(array[:, 2:] > array[:, :2]).all(axis=1)]
    return Record(record["file_name"], record["height"], record["width"], array)
