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
from .cli import write


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
