#!/usr/bin/env python
"""Write the plain config (and the weights) of a searched detector."""

import argparse
import os
import sys

import torch

from detectron2_nats.architecture import Architecture
from detectron2_nats.errors import NATSError
from detectron2_nats.export import (
    decode_search,
    export_config,
    export_weights,
    load_config,
    load_detector_config,
    read_search,
    write_config,
)
from detectron2_nats.files import write_atomically

EPILOG = """
examples:
  the searched detector itself, from a search's output folder:
    $ python tools/export.py output/search
  another detector with the searched backbone; --config-file takes a path or a zoo name:
    $ python tools/export.py output/search --output mask.yaml \\
        --config-file COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml
  also the super-network's own weights, to start from instead of ImageNet's (voted order):
    $ python tools/export.py output/search --order voted --weights output/search/frozen.pth
"""


def main(args: argparse.Namespace) -> None:
    folder = args.source if os.path.isdir(args.source) else os.path.dirname(args.source)
    architecture = Architecture.load(
        os.path.join(folder, "architecture.yaml") if os.path.isdir(args.source) else args.source
    )
    search_config = os.path.join(folder, "config.yaml")
    searched = load_config(search_config) if os.path.isfile(search_config) else None
    if args.order or args.weights:
        checkpoint, genotypes = read_search(folder)
        if args.order and args.order != architecture.search.get("order"):
            layers = decode_search(checkpoint, genotypes, args.order)
            architecture = Architecture(layers, {**architecture.search, "order": args.order})
    if not args.config_file and searched is None:
        raise NATSError(f"{folder or '.'} holds no config.yaml: name the detector, --config-file")
    cfg = export_config(load_detector_config(args.config_file, searched), architecture)
    if args.weights:
        frozen = export_weights(checkpoint, architecture, genotypes)
        content = {"model": frozen, "__author__": "detectron2-nats"}
        cfg.MODEL.WEIGHTS = args.weights
        _write(args.weights, lambda p: write_atomically(p, lambda file: torch.save(content, file)))
    _write(args.output or os.path.join(folder, "retrain.yaml"), lambda p: write_config(cfg, p))


def _write(path, write):
    try:
        write(path)
    except OSError as error:
        raise NATSError(f"{path}: cannot be written: {error.strerror or error}") from None
    print(f"wrote {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a search's output folder, or an architecture file")
    parser.add_argument(
        "--config-file", default="", help="detector to export: a path or a zoo name"
    )
    parser.add_argument(
        "--output", default="", help="config to write (default: SOURCE/retrain.yaml)"
    )
    parser.add_argument(
        "--order", choices=["paper", "voted"], help="decode the last checkpoint anew"
    )
    parser.add_argument("--weights", default="", metavar="FILE", help="also write frozen weights")
    try:
        main(parser.parse_args())
    except NATSError as error:
        sys.exit(f"error: {error}")
