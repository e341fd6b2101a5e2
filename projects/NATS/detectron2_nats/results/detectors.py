"""Compare two detectors: their receptive fields, and what they detect."""

import argparse
from typing import Any, Dict, List

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.ops import nms

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    MetadataCatalog,
    detection_utils,
    get_detection_dataset_dicts,
)
from detectron2.modeling import build_model

from ..config import load_config
from ..data.registry import check_datasets, register_datasets
from ..engine.checkpoint import SafeCheckpointer
from ..errors import NATSError
from . import plot

__all__ = ["compared"]

_FIELD_IMAGES = 16
"""Receptive fields are averaged over this many images."""


class _Network:
    """A detector with its weights.

    Attributes:
        cfg: its config.
        model: in eval mode.
    """

    def __init__(self, config: str, weights: str):
        self.cfg = load_config(config)
        if not torch.cuda.is_available():
            self.cfg.MODEL.DEVICE = "cpu"
        self.model = build_model(self.cfg).eval()
        SafeCheckpointer(self.model, "").load(weights, checkpointables=[])

    def detect(self, record: dict, threshold: float) -> List[tuple]:
        """(box, class index, score) of each detection, boxes in pixels of the image file.

        Of boxes that overlap by more than a half, only the best is kept, whatever their classes.

        Args:
            record: a dataset dict.
            threshold: lowest score that is kept.
        """
        batch = [DatasetMapper(self.cfg, is_train=False)(dict(record))]
        with torch.no_grad():
            instances = self.model(batch)[0]["instances"].to("cpu")
        instances = instances[instances.scores >= threshold]
        instances = instances[nms(instances.pred_boxes.tensor, instances.scores, 0.5)]
        return list(
            zip(
                instances.pred_boxes.tensor.tolist(),
                instances.pred_classes.tolist(),
                instances.scores.tolist(),
            )
        )

    def receptive_fields(self, records: List[dict], side: int) -> Dict[str, np.ndarray]:
        """The backbone's receptive fields, on images resized to squares of `side` pixels."""
        images = []
        for record in records:
            pixels = detection_utils.read_image(record["file_name"], self.cfg.INPUT.FORMAT)
            pixels = torch.from_numpy(pixels.copy()).float().permute(2, 0, 1)
            images.append(F.interpolate(pixels[None], (side, side), mode="bilinear")[0])
        mean, std = (
            torch.tensor(v).view(3, 1, 1)
            for v in (self.cfg.MODEL.PIXEL_MEAN, self.cfg.MODEL.PIXEL_STD)
        )
        batch = ((torch.stack(images) - mean) / std).to(self.model.device)
        return plot.effective_receptive_fields(self.model.backbone, batch)


def compared(args: argparse.Namespace) -> Dict[str, Any]:
    """Name → figure, for the two detectors that the options of tools/plot.py name."""
    networks = {"plain": _Network(*args.plain), "searched": _Network(*args.searched)}
    cfg = networks["plain"].cfg
    records, class_names = _test_images(cfg, args.dataset, _FIELD_IMAGES)
    side = args.field_size or min(512, max(256, cfg.INPUT.MIN_SIZE_TEST // 32 * 32))
    side = -(-side // 32) * 32  # an FPN adds its levels, which must fit
    fields = {name: network.receptive_fields(records, side) for name, network in networks.items()}
    records, class_names = _test_images(cfg, args.dataset, args.images)
    pictures = [detection_utils.read_image(r["file_name"], "RGB") for r in records]
    detections = {
        name: [network.detect(r, args.threshold) for r in records]
        for name, network in networks.items()
    }
    return {
        "receptive_fields": plot.plot_receptive_fields(fields, args.title),
        "detections": plot.plot_detections(pictures, detections, class_names, args.title),
    }


def _test_images(cfg: CfgNode, dataset: str, count: int):
    """`count` records, spread evenly over the data set, and the names of its classes."""
    register_datasets(cfg)
    name = dataset or (cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else "")
    if not name:
        raise NATSError("DATASETS.TEST is empty: name the images with --dataset")
    check_datasets([name], "--dataset")
    records = get_detection_dataset_dicts(name, filter_empty=False)
    chosen = np.linspace(0, len(records) - 1, min(count, len(records))).round().astype(int)
    class_names = MetadataCatalog.get(name).get("thing_classes", [])
    return [records[i] for i in chosen], class_names
