"""Write the plain config of a searched detector, and if asked for, its weights."""

import argparse
import os

from ..errors import NATSError
from ..method.architecture import Architecture
from ..method.transform import frozen_state_dict
from ..search.export import detector_of, export_config, write_config, write_weights
from ..search.folder import SearchFolder
from .cli import write


def main(args: argparse.Namespace) -> None:
    folder = SearchFolder(args.source)
    architecture = folder.architecture()
    decoding = {"order": args.order, "margin": args.margin, "at_most": args.at_most}
    decoding = {key: value for key, value in decoding.items() if value is not None}
    if decoding:
        settings = {"order": "paper", **architecture.search, **decoding}
        architecture = Architecture.decode(folder.detector, **settings)
    cfg = export_config(detector_of(folder, args.config_file), architecture)
    if args.weights:
        frozen = frozen_state_dict(folder.detector, architecture)
        cfg.MODEL.WEIGHTS = args.weights
        write(args.weights, lambda: write_weights(frozen, architecture, args.weights))
    elif os.path.isdir(args.source) and not decoding and not args.config_file:
        if folder.cfg.SEARCH.RETRAIN_WEIGHTS == "supernet":  # as the search writes it at its end
            cfg.MODEL.WEIGHTS = folder.file("frozen.pth")
            if not folder.has("frozen.pth"):
                raise NATSError(
                    f"{args.source} has no frozen.pth, because the search has not ended: add "
                    f"--weights {cfg.MODEL.WEIGHTS} to write the newest checkpoint's"
                )
    path = args.output or folder.file("retrain.yaml")
    if os.path.exists(path) and os.path.realpath(path) == os.path.realpath(args.config_file):
        raise NATSError(f"--output {path} is the config that is read: write another file")
    write(path, lambda: write_config(cfg, path))
