"""Write the plain config of a searched detector, and on request its weights."""

import argparse
import os
from functools import partial
from typing import Optional

import torch

from ..architecture import Architecture
from ..command import run_tool, tool_parser, write
from ..config import load_config
from ..errors import NATSError
from ..export import (
    export_config,
    frozen_weights,
    load_detector_config,
    read_search,
    write_config,
)
from ..files import write_atomically
from ..transform import searched_layers

EPILOG = """
examples:
  the detector that was searched, from the search's output folder:
    $ %(prog)s output/search
  another detector with the searched backbone; --config-file takes a path or a zoo name:
    $ %(prog)s output/search --output mask.yaml \\
        --config-file COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml
  an undecided search: only groups with a clear preference for another dilation leave (1, 1):
    $ %(prog)s output/search --margin 0.1 --output output/search/margin.yaml
  with the super-network's own weights, to start from instead of ImageNet's (voted order):
    $ %(prog)s output/search --order voted --weights output/search/frozen.pth
"""


def main(args: argparse.Namespace) -> None:
    folder = args.source if os.path.isdir(args.source) else os.path.dirname(args.source)
    architecture = Architecture.load(
        os.path.join(folder, "architecture.yaml") if os.path.isdir(args.source) else args.source
    )
    search_config = os.path.join(folder, "config.yaml")
    searched = load_config(search_config) if os.path.isfile(search_config) else None
    if args.order or args.weights or args.margin is not None:
        checkpoint, backbone = read_search(folder)
    if args.order or args.margin is not None:
        search = dict(architecture.search)
        order, margin = search.pop("order", "paper"), search.pop("margin", 0.0)
        architecture = Architecture.decode(
            searched_layers(backbone),
            args.order or order,
            margin if args.margin is None else args.margin,
            **search,
        )
    if not args.config_file and searched is None:
        raise NATSError(f"{folder or '.'} has no config.yaml: name the detector with --config-file")
    cfg = export_config(load_detector_config(args.config_file, searched), architecture)
    if args.weights:
        frozen = frozen_weights(checkpoint, backbone, architecture)
        content = {"model": frozen, "__author__": "detectron2-nats"}
        cfg.MODEL.WEIGHTS = args.weights
        save = partial(torch.save, content)
        write(args.weights, lambda: write_atomically(args.weights, save))
    path = args.output or os.path.join(folder, "retrain.yaml")
    write(path, lambda: write_config(cfg, path))


def run(prog: Optional[str] = None) -> None:
    """The command; `prog` is its name in the help."""
    parser = tool_parser(__doc__, EPILOG, prog)
    parser.add_argument("source", help="a search's output folder, or an architecture file")
    parser.add_argument(
        "--config-file",
        default="",
        help="detector to export: a path or a zoo name (default: the one that was searched)",
    )
    parser.add_argument(
        "--output", default="", help="config to write (default: SOURCE/retrain.yaml)"
    )
    parser.add_argument(
        "--order", choices=["paper", "voted"], help="decode the last checkpoint in this order"
    )
    parser.add_argument(
        "--margin", type=float, help="decode the last checkpoint with this SEARCH.DECODE_MARGIN"
    )
    parser.add_argument(
        "--weights", default="", metavar="FILE", help="also write the super-network's weights"
    )
    run_tool(main, parser.parse_args())
