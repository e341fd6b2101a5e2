"""How far a detector sees; and what two of them detect, side by side."""

import argparse
from typing import Any, Dict, List

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.ops import nms

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.modeling import build_model
from detectron2.structures import BoxMode

from ..config import falls_back_to_cpu, load_config
from ..data.images import ImageMapper, read_image, readable
from ..data.registry import check_datasets, check_same_classes, register_datasets
from ..engine.checkpoint import SafeCheckpointer
from ..errors import NATSError
from . import pictures
from .receptive_field import effective_receptive_fields, mass_side

_FIELD_IMAGES = 16
"""Receptive fields are averaged over this many images."""


class _Network:
    """A detector with its weights.

    Attributes:
        cfg: its config.
        model: in eval mode.
    """

    def __init__(self, config: str, weights: str, opts: List[str]):
        self.cfg = load_config(config, opts)
        falls_back_to_cpu(self.cfg)
        self.model = build_model(self.cfg).eval()
        loaded = SafeCheckpointer(self.model, "").load(weights, checkpointables=[])
        self.classes: List[str] = loaded.get("classes") or []  # empty where nobody wrote them

    def detect(self, record: dict, threshold: float) -> List[tuple]:
        """(box, class index, score) of each detection, boxes in pixels of the image file.

        Of boxes that overlap by more than a half, only the best is kept, whatever their classes.

        Args:
            record: a dataset dict.
            threshold: lowest score that is kept.
        """
        batch = [ImageMapper(self.cfg, is_train=False)(record)]
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
            pixels = read_image(record["file_name"], self.cfg.INPUT.FORMAT)
            pixels = torch.from_numpy(pixels.copy()).float().permute(2, 0, 1)
            images.append(F.interpolate(pixels[None], (side, side), mode="bilinear")[0])
        mean, std = (
            torch.tensor(v).view(-1, 1, 1)
            for v in (self.cfg.MODEL.PIXEL_MEAN, self.cfg.MODEL.PIXEL_STD)
        )
        batch = ((torch.stack(images) - mean) / std).to(self.model.device)
        return effective_receptive_fields(self.model.backbone, batch)


def detector_figures(args: argparse.Namespace) -> Dict[str, Any]:
    """Name → figure, for the one or two detectors that the options of nats-plot name."""
    pairs = {"plain": args.plain, "searched": args.searched}
    networks = {name: _Network(*pair, args.opts) for name, pair in pairs.items() if pair}
    cfg = networks["plain"].cfg
    records, class_names = _test_records(cfg, args.dataset)
    side = args.field_size or min(512, max(256, cfg.INPUT.MIN_SIZE_TEST // 32 * 32))
    side = -(-side // 32) * 32  # an FPN adds its levels, which must fit
    chosen = readable(_evenly(records, _FIELD_IMAGES))
    fields = {name: network.receptive_fields(chosen, side) for name, network in networks.items()}
    for name, stages in fields.items():
        seen = ", ".join(f"{stage} {mass_side(field)}" for stage, field in stages.items())
        print(f"{name} sees, in pixels: {seen}")
    objects = object_sizes(cfg, records)
    if objects:
        print(objects)
    figures = {"receptive_fields": pictures.plot_receptive_fields(fields, args.title or objects)}
    if args.searched:
        for name, network in networks.items():
            if network.classes:
                check_same_classes(class_names, network.classes, "the images", name)
        chosen = readable(_evenly(records, args.images))
        images = [read_image(r["file_name"], "RGB") for r in chosen]
        detections = {
            name: [network.detect(r, args.threshold) for r in chosen]
            for name, network in networks.items()
        }
        figures["detections"] = pictures.plot_detections(
            images, detections, class_names, args.title
        )
    return figures


def _test_records(cfg: CfgNode, dataset: str):
    """The records of the data set, and the names of its classes."""
    register_datasets(cfg)
    name = dataset or (cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else "")
    if not name:
        raise NATSError("DATASETS.TEST is empty: name the images with --dataset")
    check_datasets([name], "--dataset")
    records = get_detection_dataset_dicts(name, filter_empty=False)
    return records, MetadataCatalog.get(name).get("thing_classes", [])


def _evenly(records: List[dict], count: int) -> List[dict]:
    """`count` records, spread evenly."""
    chosen = np.linspace(0, len(records) - 1, min(count, len(records))).round().astype(int)
    return [records[i] for i in chosen]


def object_sizes(cfg: CfgNode, records: List[dict]) -> str:
    """How long the objects' longer sides are, in pixels of the images that the network is given.

    Returns:
        One line; "" if the data set has no boxes.
    """
    sides = []
    for record in records:
        height, width = record["height"], record["width"]
        scale = min(
            cfg.INPUT.MIN_SIZE_TEST / min(height, width),
            cfg.INPUT.MAX_SIZE_TEST / max(height, width),
        )
        for annotation in record.get("annotations", []):
            box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
            sides.append(scale * max(box[2] - box[0], box[3] - box[1]))
    if not sides:
        return ""
    low, half, high = np.quantile(sides, (0.1, 0.5, 0.9))
    return f"objects' longer sides: half up to {half:.0f} px, eight of ten {low:.0f} to {high:.0f}"
