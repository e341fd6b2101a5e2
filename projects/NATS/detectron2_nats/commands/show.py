"""Print and draw what runs came to."""

import argparse
import os
import re
from typing import Dict, Tuple

from ..errors import NATSError
from ..search.folder import SearchFolder
from ..show import pictures
from ..show.history import last_precision, read_history
from .cli import write

_KEY = re.compile(r"[A-Z0-9_]+(\.[A-Z0-9_]+)*")


def main(args: argparse.Namespace) -> None:
    keys = [i for i, word in enumerate(args.words) if _KEY.fullmatch(word)]
    first = keys[0] if keys else len(args.words)
    runs, args.opts = args.words[:first], args.words[first:]
    detectors: Dict[str, Tuple] = {}
    for path in runs:
        if len(runs) > 1:
            print(f"\n== {path}\n")
        folder = SearchFolder(path)
        if os.path.isfile(folder.architecture_file):
            _show_choice(folder, args)
        elif not folder.has("config.yaml"):
            raise NATSError(f"{path}: neither a run's output folder nor an architecture file")
        detectors.update(_detector(folder, args))
    if detectors and args.images:
        from ..show.detections import detections_picture  # the rest needs no Detectron2

        picture = detections_picture(detectors, args.images, args.threshold)
        path = os.path.join(args.output or os.path.join(runs[0], "pictures"), "detections.png")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write(path, lambda: picture.save(path))
        print(f"from left to right: ground truth, {', '.join(detectors)}")


def _show_choice(folder: SearchFolder, args: argparse.Namespace) -> None:
    """What a search chose, how decided it is, what it costs and, if asked for, its scores."""
    architecture = folder.architecture()
    print(architecture.summary())
    verdict = architecture.search.get("decidedness", {}).get("verdict", "")
    if verdict:
        print(f"\nThe search is {verdict}.")
    if args.config_file or folder.has("config.yaml"):
        print(f"\n{_cost(folder, args.config_file)}")
    output = args.output or folder.file("pictures")
    _save(pictures.plot_architecture(architecture), output, "architecture")
    if folder.has("metrics.json") and folder.has("config.yaml"):
        history = read_history(folder.file("metrics.json"))
        _save(pictures.plot_history(history, verdict), output, "history")
    if args.score:
        from ..search.score import score_folder

        print(f"\n{score_folder(folder, args.score)}")


def _cost(folder: SearchFolder, config: str) -> str:
    """Parameters and FLOPs of the backbone, which are those of the plain one."""
    from detectron2.modeling import build_backbone

    from ..search.export import detector_of, export_config
    from ..show.cost import backbone_cost

    cfg = export_config(detector_of(folder, config), folder.architecture())
    side = -(-(cfg.INPUT.MIN_SIZE_TEST or 800) // 32) * 32  # padded to the largest stride
    cost = backbone_cost(build_backbone(cfg), side, side)
    counts = ", ".join(f"{count:,} {name}" for name, count in cost.items())
    return f"The backbone, for {side} × {side} px: {counts}, as the plain one."


def _detector(folder: SearchFolder, args: argparse.Namespace) -> Dict[str, Tuple]:
    """Name → config and weights of the detector that a run has trained; none of a mere search."""
    for config, weights in (("retrain.yaml", "frozen.pth"), ("config.yaml", "model_final.pth")):
        if not all(folder.has(name) for name in ("config.yaml", config, weights)):
            continue
        search = folder.cfg.SEARCH
        if weights == "frozen.pth" and search.FREEZE_AT == 1 and not search.FREEZE_WHEN_DECIDED:
            continue  # what a retraining starts from
        from ..config import load_config

        cfg = load_config(folder.file(config), args.opts)
        nats = cfg.MODEL.NATS
        if cfg.MODEL.BACKBONE.NAME == "build_nats_backbone" and not nats.ARCHITECTURE:
            continue  # a super-network
        print(
            last_precision(folder.file("metrics.json")) or "No evaluation is in its metrics.json."
        )
        return {os.path.normpath(folder.path): (cfg, folder.file(weights))}
    return {}


def _save(figure, folder: str, name: str) -> None:
    path = os.path.join(folder, f"{name}.png")
    write(path, lambda: pictures.save(figure, folder, name))
