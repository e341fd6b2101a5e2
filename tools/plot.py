#!/usr/bin/env python
"""Draw an architecture, α's history, effective receptive fields and detections."""

import argparse
import os
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
from detectron2_nats.architecture import Architecture
from detectron2_nats.command import run_tool, tool_parser
from detectron2_nats.config import load_config
from detectron2_nats.data.registry import check_datasets, register_datasets
from detectron2_nats.engine.checkpoint import SafeCheckpointer
from detectron2_nats.errors import NATSError
from detectron2_nats.results import plot

EPILOG = """
examples:
  architecture.png and history.png of a search:
    $ python tools/plot.py output/search --output output/pictures
  architecture.svg of an architecture file:
    $ python tools/plot.py architecture.yaml --output output/pictures --format svg
  also receptive_fields.png and detections.png, from two trained detectors:
    $ python tools/plot.py output/search --output output/pictures --images 4 \\
        --plain configs/quickstart/base.yaml output/plain/model_final.pth \\
        --searched output/search/retrain.yaml output/searched/model_final.pth
"""

_FIELD_IMAGES = 16
"""Number of images over which receptive fields are averaged."""


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
        """(box in pixels of the file's image, class, score) of each detection.

        Where boxes of any class overlap by more than a half, only the best is kept.
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
        """Those of its backbone, on images resized to squares of `side` pixels."""
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


def main(args: argparse.Namespace) -> None:
    formats = ["png", "svg"] if args.format == "both" else [args.format]
    if (args.plain is None) != (args.searched is None):
        raise NATSError("give both --plain and --searched, or neither")
    is_folder = os.path.isdir(args.source)
    folder = args.source if is_folder else os.path.dirname(args.source)
    architecture = Architecture.load(
        os.path.join(folder, "architecture.yaml") if is_folder else args.source
    )
    figures = {"architecture": plot.plot_architecture(architecture, args.title)}
    metrics = os.path.join(folder, "metrics.json")
    if is_folder and os.path.isfile(metrics):
        verdict = architecture.search.get("decidedness", {}).get("verdict", "")
        figures["history"] = plot.plot_history(plot.read_history(metrics), args.title or verdict)
    if args.plain:
        figures.update(_compare(args))
    output = args.output or os.path.join(folder, "pictures")
    paths = []
    for name, figure in figures.items():
        try:
            paths += plot.save(figure, output, name, formats)
        except OSError as error:
            raise NATSError(f"{output}: cannot be written: {error.strerror or error}") from None
    for path in paths:
        print(f"wrote {path}")


def _compare(args: argparse.Namespace) -> Dict[str, Any]:
    networks = {"plain": _Network(*args.plain), "searched": _Network(*args.searched)}
    cfg = networks["plain"].cfg
    records, class_names = _test_images(cfg, args.dataset, _FIELD_IMAGES)
    side = args.field_size or min(512, max(256, cfg.INPUT.MIN_SIZE_TEST // 32 * 32))
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
    """Returns `count` records spread evenly over the data set, and its class names."""
    register_datasets(cfg)
    name = dataset or (cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else "")
    if not name:
        raise NATSError("DATASETS.TEST is empty: name the images with --dataset")
    check_datasets([name], "--dataset")
    records = get_detection_dataset_dicts(name, filter_empty=False)
    chosen = np.linspace(0, len(records) - 1, min(count, len(records))).round().astype(int)
    class_names = MetadataCatalog.get(name).get("thing_classes", [])
    return [records[i] for i in chosen], class_names


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 to 4096")
    return int(text)


if __name__ == "__main__":
    parser = tool_parser(__doc__, EPILOG)
    parser.add_argument("source", help="a search's output folder, or an architecture file")
    parser.add_argument("--output", default="", help="folder to write (default: SOURCE/pictures)")
    parser.add_argument("--format", choices=["png", "svg", "both"], default="png", help="(png)")
    parser.add_argument("--title", default="", help="a line above each picture")
    pair = {"nargs": 2, "metavar": ("CONFIG", "WEIGHTS")}
    parser.add_argument("--plain", **pair, help="config and weights of the plain detector")
    parser.add_argument("--searched", **pair, help="config and weights of the searched detector")
    parser.add_argument("--dataset", default="", help="source of images (default: DATASETS.TEST)")
    parser.add_argument(
        "--images", type=_count, default=4, help="number of images with detections (%(default)s)"
    )
    parser.add_argument(
        "--field-size",
        type=_count,
        help="side of the images for receptive fields, in pixels (default: 256 to 512)",
    )
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="lowest score that is drawn (%(default)s)"
    )
    run_tool(main, parser.parse_args())
