#!/usr/bin/env python
"""Write the plain config (and the weights) of a searched detector."""

import argparse
import os
import sys

import torch

from detectron2_nats.architecture import Architecture, decode_alpha
from detectron2_nats.backbone import search_space_from_config
from detectron2_nats.errors import NATSError
from detectron2_nats.export import (
    export_config,
    export_weights,
    load_config,
    load_detector_config,
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
        checkpoint, genotypes = _read_search(folder, searched)
        if args.order and args.order != architecture.search.get("order"):
            architecture = _decode(checkpoint, genotypes, args.order, architecture)
    if not args.config_file and searched is None:
        raise NATSError(f"{folder} holds no config.yaml: name the detector with --config-file")
    cfg = export_config(load_detector_config(args.config_file, searched), architecture)
    written = []
    if args.weights:
        frozen = export_weights(checkpoint, architecture, genotypes)
        content = {"model": frozen, "__author__": "detectron2-nats"}
        write_atomically(args.weights, lambda file: torch.save(content, file))
        cfg.MODEL.WEIGHTS = args.weights
        written.append(args.weights)
    output = args.output or os.path.join(folder, "retrain.yaml")
    write_config(cfg, output)
    for path in [*written, output]:
        print(f"wrote {path}")


def _read_search(folder, searched):
    """(the newest checkpoint's state dict, layer name → genotypes) of a search's output folder."""
    tag = os.path.join(folder, "last_checkpoint")
    if searched is None or not os.path.isfile(tag):
        raise NATSError(
            f"{folder} is no search's output folder: it lacks config.yaml or checkpoints"
        )
    with open(tag) as file:
        path = os.path.join(folder, os.path.basename(file.read().strip()))
    state_dict = torch.load(path, map_location="cpu", weights_only=True)["model"]
    space = search_space_from_config(searched)
    names = [k[: -len(".alpha")] for k in state_dict if k.endswith(".alpha")]
    names = [name[name.index("res") :] for name in names]
    return state_dict, {name: space.genotypes[name.split(".")[0]] for name in names}


def _decode(state_dict, genotypes, order, decoded: Architecture) -> Architecture:
    """Decode a checkpoint's α in another order."""
    layers = {}
    for key, alpha in state_dict.items():
        if key.endswith(".alpha"):
            name = key[key.index("res") : -len(".alpha")]
            channels = len(state_dict[key.replace(".alpha", ".weight")])
            layers[name] = decode_alpha(alpha.numpy(), genotypes[name], channels, order)
    return Architecture(layers, {**decoded.search, "order": order})


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
