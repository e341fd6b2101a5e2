"""What two detectors detect, side by side."""

import argparse
from typing import Any, List

import torch
from torchvision.ops import nms

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.modeling import build_model

from ..backbone import check_same_dilations
from ..config import load_config
from ..config.comparing import falls_back_to_cpu
from ..data.images import ImageMapper, read_image, readable
from ..data.registry import check_datasets, check_same_classes, register_datasets
from ..engine.checkpoint import SafeCheckpointer
from ..errors import NATSError
from ..look.objects import evenly
from . import pictures


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
        checkpointer = SafeCheckpointer(self.model, "")
        loaded = checkpointer.load(weights, checkpointables=[])
        checkpointer.check_complete()
        check_same_dilations(self.cfg, loaded, weights)
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


def detections_figure(args: argparse.Namespace) -> Any:
    """The picture of what the two detectors that the options of nats-plot name detect."""
    pairs = {"plain": args.plain, "searched": args.searched}
    networks = {name: _Network(*pair, args.opts) for name, pair in pairs.items()}
    records, class_names = _test_records(networks["plain"].cfg, args.dataset)
    for name, network in networks.items():
        if network.classes:
            check_same_classes(class_names, network.classes, "the images", name)
    chosen = readable(evenly(records, args.images))
    images = [read_image(r["file_name"], "RGB") for r in chosen]
    detections = {
        name: [network.detect(r, args.threshold) for r in chosen]
        for name, network in networks.items()
    }
    return pictures.plot_detections(images, detections, class_names, args.title)


def _test_records(cfg: CfgNode, dataset: str):
    """The records of the data set, and the names of its classes."""
    register_datasets(cfg)
    name = dataset or (cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else "")
    if not name:
        raise NATSError("DATASETS.TEST is empty: name the images with --dataset")
    check_datasets([name], "--dataset")
    records = get_detection_dataset_dicts(name, filter_empty=False)
    return records, MetadataCatalog.get(name).get("thing_classes", [])
