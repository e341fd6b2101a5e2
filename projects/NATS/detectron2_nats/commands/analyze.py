"""Print an architecture and its cost: the backbone's parameters, FLOPs and activations."""

import argparse

from detectron2.modeling import build_backbone

from ..backbone import architecture_from_config
from ..search.export import detector_of, export_config
from ..search.folder import SearchFolder
from ..show.cost import backbone_cost, cost_table
from .cli import run_tool, tool_parser

EPILOG = """
examples:
  a search's output folder:
    $ %(prog)s output/search
  an architecture file, in any detector (a path or a zoo name):
    $ %(prog)s architecture.yaml \\
        --config-file COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml --size 800 1216
"""


def main(args: argparse.Namespace) -> None:
    folder = SearchFolder(args.source)
    architecture = folder.architecture()
    cfg = export_config(detector_of(folder, args.config_file), architecture)
    plain = cfg.clone()
    plain.MODEL.BACKBONE.NAME = cfg.MODEL.NATS.BASE_BACKBONE
    costs = [backbone_cost(build_backbone(c), *args.size) for c in (plain, cfg)]
    print(architecture_from_config(cfg).summary())
    height, width = args.size
    print(f"\nbackbone {cfg.MODEL.NATS.BASE_BACKBONE}, one image of {height} x {width} pixels:\n")
    print(cost_table(*costs))


def _pixels(text: str) -> int:
    if not text.isdecimal() or not 32 <= int(text) <= 16384:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 32 to 16384 pixels")
    return -(-int(text) // 32) * 32  # Detectron2 pads images to multiples of the stride


def run() -> None:
    parser = tool_parser(__doc__, EPILOG, "nats-analyze")
    parser.add_argument("source", help="a search's output folder, or an architecture file")
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
