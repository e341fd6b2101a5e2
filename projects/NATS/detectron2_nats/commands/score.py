"""Does a wider field pay? Ask a search's super-network, before you retrain for days.

The losses of architectures on calibration images are computed with the super-network's own weights:
of the found one, the plain one, those with one dilation everywhere, and random ones of the same
space. Where plain stands among the random ones tells whether your detector gains from seeing
further. The found one looks better than it is: the weights suit it. So may one large dilation
everywhere. docs/results/scores.md has the measurements.
"""

import argparse
import json
import os

from tabulate import tabulate

from ..data.registry import check_data, register_datasets
from ..engine.loader import dataset_dicts
from ..errors import NATSError
from ..files import write_atomically
from ..method.architecture import Architecture
from ..method.convs import searched_layers
from ..search.folder import SearchFolder
from ..search.score import candidates, field_verdict, one_shot_score, scoring_batches, some_of
from .cli import run_tool, tool_parser, whole_number, write

EPILOG = """
examples:
  what a search found, one dilation everywhere, and 16 random architectures:
    $ %(prog)s output/search
  also a file of your own (voted order, same space), on more images; and write the others:
    $ %(prog)s output/search --architecture mine.yaml --images 1000 --write output/candidates
"""


def main(args: argparse.Namespace) -> None:
    if not os.path.isdir(args.search):
        raise NATSError(f"{args.search} is not a search's output folder")
    folder = SearchFolder(args.search)
    cfg = folder.cfg
    register_datasets(cfg)
    check_data(cfg, ["CALIBRATION"])
    records = dataset_dicts(cfg, cfg.DATASETS.CALIBRATION)
    records = some_of(records, args.images)
    model = folder.detector()
    if any(getattr(conv, "settled", None) for conv in searched_layers(model).values()):
        raise NATSError(
            f"{args.search} went on to train what it found, and its weights suit nothing else: "
            "log.txt has the scores of the moment before, if SEARCH.SCORE_IMAGES was not 0"
        )
    architectures = candidates(cfg, model, args.random, args.uneven)
    if args.write:
        for name, architecture in architectures.items():
            architecture.save(os.path.join(args.write, name.replace(" ", "_") + ".yaml"))
    for path in args.architecture:
        architectures[path] = Architecture.load(path)

    batches = scoring_batches(cfg, records)
    scores = {}
    for name, architecture in architectures.items():
        scores[name] = one_shot_score(model, architecture, batches)
        print(f"{name}: {scores[name]:.4f}", flush=True)
    print("\n" + tabulate(sorted(scores.items(), key=lambda item: item[1]), ["", "loss"], "pipe"))
    print(f"\n{len(records)} images of {', '.join(cfg.DATASETS.CALIBRATION)}.")
    print(field_verdict(scores))
    path = args.output or folder.file("scores.json")
    write(path, lambda: write_atomically(path, json.dumps(scores, indent=1)))


def run() -> None:
    parser = tool_parser(__doc__, EPILOG, "nats-score")
    parser.add_argument("search", help="a search's output folder")
    number = whole_number(1_000_000)
    parser.add_argument(
        "--random", type=number, default=16, help="number of random architectures (%(default)s)"
    )
    parser.add_argument(
        "--uneven", action="store_true", help="make some dilations rare in the random architectures"
    )
    parser.add_argument("--write", metavar="FOLDER", help="also write the architectures there")
    parser.add_argument(
        "--images", type=number, default=200, help="calibration images, at most (%(default)s)"
    )
    parser.add_argument(
        "--architecture",
        action="append",
        default=[],
        metavar="FILE",
        help="also score this architecture file; may be repeated",
    )
    parser.add_argument("--output", metavar="JSON", help="file to write (SEARCH/scores.json)")
    run_tool(main, parser.parse_args())
