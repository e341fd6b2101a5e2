#!/usr/bin/env python
"""Print an architecture and its cost: the backbone's parameters, FLOPs and activations."""

import argparse
import os

from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from detectron2_nats.architecture import Architecture
from detectron2_nats.command import run_tool, tool_parser
from detectron2_nats.config import load_config
from detectron2_nats.errors import NATSError
from detectron2_nats.export import export_config, load_detector_config
from detectron2_nats.files import read_yaml
from detectron2_nats.results.cost import backbone_cost, cost_table

EPILOG = """
examples:
  a search's output folder:
    $ python tools/analyze.py output/search
  an exported config:
    $ python tools/analyze.py output/search/retrain.yaml
  an architecture file, in any detector (a path or a zoo name):
    $ python tools/analyze.py architecture.yaml \\
        --config-file COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml --size 800 1216
"""


def main(args: argparse.Namespace) -> None:
    cfg = _searched_config(args.source, args.config_file)
    plain = cfg.clone()
    plain.MODEL.BACKBONE.NAME = cfg.MODEL.NATS.BASE_BACKBONE
    costs = [backbone_cost(build_backbone(c), *args.size) for c in (plain, cfg)]
    print(Architecture.from_config(cfg.MODEL.NATS.ARCHITECTURE).summary())
    height, width = args.size
    print(f"\nbackbone {cfg.MODEL.NATS.BASE_BACKBONE}, one image of {height} x {width} pixels:\n")
    print(cost_table(*costs))


def _searched_config(source: str, config_file: str) -> CfgNode:
    """The detector with the searched backbone, from any kind of SOURCE."""
    folder = source if os.path.isdir(source) else os.path.dirname(source)
    path = os.path.join(folder, "architecture.yaml") if os.path.isdir(source) else source
    content = read_yaml(path)
    if isinstance(content, dict) and "MODEL" in content:
        exported = load_config(path)
        if not exported.MODEL.NATS.ARCHITECTURE:
            raise NATSError(f"{path} has no MODEL.NATS.ARCHITECTURE: give an exported config")
        if not config_file:
            return exported
        architecture = Architecture.from_config(exported.MODEL.NATS.ARCHITECTURE)
    else:
        architecture = Architecture.load(path)
    search_config = os.path.join(folder, "config.yaml")
    searched = load_config(search_config) if os.path.isfile(search_config) else None
    if not config_file and searched is None:
        raise NATSError(f"{folder or '.'} has no config.yaml: name the detector with --config-file")
    return export_config(load_detector_config(config_file, searched), architecture)


def _pixels(text: str) -> int:
    if not text.isdecimal() or not 32 <= int(text) <= 16384:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 32 to 16384 pixels")
    return -(-int(text) // 32) * 32  # Detectron2 pads images to whole strides


if __name__ == "__main__":
    parser = tool_parser(__doc__, EPILOG)
    parser.add_argument(
        "source", help="a search's output folder, an architecture file, or an exported config"
    )
    parser.add_argument(
        "--config-file", default="", help="config of the detector: a path or a zoo name"
    )
    parser.add_argument(
        "--size",
        nargs=2,
        type=_pixels,
        default=(800, 1216),
        metavar=("HEIGHT", "WIDTH"),
        help="size of the image, rounded up to multiples of 32 (%(default)s)",
    )
    run_tool(main, parser.parse_args())
