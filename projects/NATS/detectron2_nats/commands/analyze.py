"""Print an architecture and its cost: the backbone's parameters, FLOPs and activations."""

import argparse
import os
from typing import Optional

from detectron2.config import CfgNode
from detectron2.modeling import build_backbone

from ..architecture import Architecture
from ..command import run_tool, tool_parser
from ..config import load_config
from ..errors import NATSError
from ..export import export_config, load_detector_config
from ..files import read_yaml
from ..results.cost import backbone_cost, cost_table

EPILOG = """
examples:
  a search's output folder:
    $ %(prog)s output/search
  an exported config:
    $ %(prog)s output/search/retrain.yaml
  an architecture file, in any detector (a path or a zoo name):
    $ %(prog)s architecture.yaml \\
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
    content = read_yaml(path) if os.path.exists(path) else None  # else perhaps one that is shipped
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


def run(prog: Optional[str] = None) -> None:
    """The command; `prog` is its name in the help."""
    parser = tool_parser(__doc__, EPILOG, prog)
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
