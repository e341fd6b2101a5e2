"""Write the plain config of a searched detector, and if asked for, its weights."""

import argparse
import os

from ..errors import NATSError
from ..search.export import (
    detector_of,
    export_config,
    frozen_weights,
    write_config,
    write_weights,
)
from ..search.folder import SearchFolder
from .cli import run_tool, tool_parser, whole_number, write

EPILOG = """
examples:
  retrain.yaml once more, from the search's output folder:
    $ %(prog)s output/search
  another detector with the searched backbone; --config-file takes a path or a zoo name:
    $ %(prog)s output/search --output mask.yaml \\
        --config-file COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml
  of an undecided search: only groups that clearly prefer another dilation leave (1, 1):
    $ %(prog)s output/search --margin 0.1 --output output/search/margin.yaml
  with the super-network's own weights, to start from instead of ImageNet's (voted order):
    $ %(prog)s output/search --order voted --weights output/search/frozen.pth
"""


def main(args: argparse.Namespace) -> None:
    folder = SearchFolder(args.source)
    architecture = folder.architecture()
    given = {"order": args.order, "margin": args.margin, "at_most": args.at_most}
    given = {key: value for key, value in given.items() if value is not None}
    if given:
        search = {"order": "paper", **architecture.search, **given}
        architecture = folder.decode(**search)
    cfg = export_config(detector_of(folder, args.config_file), architecture)
    if args.weights:
        frozen = frozen_weights(*folder.supernet, architecture)
        cfg.MODEL.WEIGHTS = args.weights
        write(args.weights, lambda: write_weights(frozen, architecture, args.weights))
    elif os.path.isdir(args.source) and not given and not args.config_file:
        if folder.cfg.SEARCH.RETRAIN_WEIGHTS == "supernet":  # as the search writes it at its end
            cfg.MODEL.WEIGHTS = folder.file("frozen.pth")
            if not folder.has("frozen.pth"):
                raise NATSError(
                    f"{args.source} has no frozen.pth, because the search has not ended: add "
                    f"--weights {cfg.MODEL.WEIGHTS} to write the newest checkpoint's"
                )
    path = args.output or folder.file("retrain.yaml")
    write(path, lambda: write_config(cfg, path))


def run() -> None:
    parser = tool_parser(__doc__, EPILOG, "nats-export")
    parser.add_argument("source", help="a search's output folder, or an architecture file")
    parser.add_argument(
        "--config-file",
        default="",
        help="detector to export: a path or a zoo name (default: SEARCH.RETRAIN_CONFIG, or the one "
        "that was searched)",
    )
    parser.add_argument(
        "--output",
        default="",
        help="config to write (default: retrain.yaml in SOURCE, or beside it)",
    )
    parser.add_argument(
        "--order", choices=["paper", "voted"], help="decode the newest checkpoint in this order"
    )
    parser.add_argument(
        "--margin", type=float, help="decode the newest checkpoint with this SEARCH.DECODE_MARGIN"
    )
    parser.add_argument(
        "--at-most",
        type=whole_number(64),
        metavar="K",
        help="decode it with this SEARCH.DECODE_AT_MOST: K dilations in each conv; 1 gives plain "
        "convs, which every exporter knows",
    )
    parser.add_argument(
        "--weights", default="", metavar="FILE", help="also write the super-network's weights"
    )
    run_tool(main, parser.parse_args())
