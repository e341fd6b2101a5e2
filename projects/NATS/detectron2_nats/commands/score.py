"""Is it worth retraining? Score what a search found before days go into it.

The super-network's own weights compute the found architecture, the plain one and random ones of the
same space on the calibration split. A lower loss is better. docs/study.md says how far that
predicts what retraining gives.
"""

import argparse
import json
import os
from typing import Optional

import torch
from tabulate import tabulate

from detectron2.modeling import build_model

from ..architecture import Architecture
from ..command import run_tool, tool_parser, write
from ..config import load_config
from ..data.registry import register_datasets
from ..engine.checkpoint import SafeCheckpointer
from ..engine.loader import dataset_dicts
from ..errors import NATSError
from ..files import write_atomically
from ..results.comparison import random_architecture
from ..results.score import knock_out_score, one_shot_score, scoring_batches
from ..transform import searched_layers

EPILOG = """
examples:
  what a search found, beside the plain architecture and 16 random ones:
    $ %(prog)s output/search
  own architecture files too (voted order, of the same space), on more images:
    $ %(prog)s output/search --architecture mine.yaml --images 1000
"""
SCORES = {"one-shot": one_shot_score, "knock-out": knock_out_score}


def main(args: argparse.Namespace) -> None:
    config = os.path.join(args.search, "config.yaml")
    if not os.path.isfile(config):
        raise NATSError(f"{args.search} is no search's output folder: it lacks config.yaml")
    cfg = load_config(config)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    register_datasets(cfg)
    records = dataset_dicts(cfg, cfg.DATASETS.CALIBRATION)
    records = records[:: -(-len(records) // args.images)]
    model = build_model(cfg)
    checkpointer = SafeCheckpointer(model, args.search)
    checkpoint = checkpointer.find_usable_checkpoint()
    if not checkpoint:
        raise NATSError(f"{args.search} holds no checkpoint: search first")
    checkpointer.load(checkpoint, checkpointables=[])
    searched = searched_layers(model)
    architectures = {
        "found": Architecture.decode(searched, "voted"),
        "found, margin 0.1": Architecture.decode(searched, "voted", 0.1),
        "plain": Architecture({n: [(c.out_channels, 1, 1)] for n, c in searched.items()}),
        **{os.path.basename(path): Architecture.load(path) for path in args.architecture},
    }
    for seed in range(args.random):
        architectures[f"random {seed}"] = random_architecture(cfg, seed, args.uneven)
    if args.write:
        for name, architecture in architectures.items():
            path = os.path.join(args.write, name.replace(", ", "_").replace(" ", "_") + ".yaml")
            architecture.save(path)

    batches = scoring_batches(cfg, records)
    scores = {}
    for name, architecture in architectures.items():
        scores[name] = SCORES[args.score](model, architecture, batches)
        print(f"{name}: {scores[name]:.4f}", flush=True)
    found, drawn = scores["found"], [v for k, v in scores.items() if k.startswith("random ")]
    print("\n" + tabulate(sorted(scores.items(), key=lambda item: item[1]), ["", "loss"], "pipe"))
    lower = sum(found < value for value in drawn)
    print(
        f"\n{len(records)} images of {', '.join(cfg.DATASETS.CALIBRATION)}. The found architecture "
        f"minus the plain one: {found - scores['plain']:+.4f}.\nThe found one is lower than "
        f"{lower} of {len(drawn)} random ones."
    )
    path = args.output or os.path.join(args.search, "scores.json")
    write(path, lambda: write_atomically(path, json.dumps(scores, indent=1)))


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 on")
    return int(text)


def run(prog: Optional[str] = None) -> None:
    """The command; `prog` is its name in the help."""
    parser = tool_parser(__doc__, EPILOG, prog)
    parser.add_argument("search", help="a search's output folder")
    parser.add_argument("--random", type=_count, default=16, help="how many (%(default)s)")
    parser.add_argument(
        "--uneven", action="store_true", help="random ones in which some dilations are rare"
    )
    parser.add_argument("--write", metavar="FOLDER", help="the architectures, as files")
    parser.add_argument("--images", type=_count, default=200, help="at most (%(default)s)")
    parser.add_argument(
        "--architecture", action="append", default=[], metavar="FILE", help="may be repeated"
    )
    parser.add_argument("--score", choices=SCORES, default="one-shot", help="(%(default)s)")
    parser.add_argument("--output", metavar="JSON", help="(SEARCH/scores.json)")
    run_tool(main, parser.parse_args())
