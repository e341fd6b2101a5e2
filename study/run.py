"""Is it worth it? Compare plain, random and searched architectures over seeds and folds.

Each method is retrained for the same iterations, or a factor of yours, once per seed. Runs that are
already done are not repeated. The output folder then contains study.md (tables), study.png, and
results.json (the numbers behind both, and the architectures).
"""

import argparse
import os
import signal
import sys

from ..bench.study.collect import collect
from ..bench.study.merge import together
from ..bench.study.methods import (
    DEFAULTS,
    HELP,
    method_argument,
    named_file_argument,
    seeds_argument,
)
from ..bench.study.plan import Settings, Study
from ..bench.study.runs import RunFailed, run_tasks
from ..bench.study.tables import write_tables
from ..engine.processes import STOPPED_EXIT_CODE
from .cli import exit_on_bad_input, tool_parser, whole_number

EPILOG = HELP + """
examples:
  on bars, whose right answer is known, with two seeds and two runs at a time:
    $ %(prog)s --config-file configs/quickstart/bars.yaml \\
        --search-config configs/quickstart/bars_search.yaml --seeds 2 --jobs 2 \\
        --output output/study
  on your own data in five folds, so that every image is tested once:
    $ %(prog)s --config-file configs/study/small.yaml \\
        --search-config configs/study/small_search.yaml --seeds 5 --folds 5 \\
        --annotations train.json calib.json val.json --images images \\
        --architecture ic-conv=ic_conv.yaml --output output/study \\
        MODEL.WEIGHTS path/to/R-50-half.pkl
  on COCO, with eight GPUs for each run:
    $ %(prog)s --config-file configs/retrain/faster_rcnn_R_50_FPN.yaml \\
        --search-config configs/search/faster_rcnn_R_50_FPN.yaml --seeds 3 --num-gpus 8 \\
        --output output/study
  report what is done so far, and run nothing:
    $ %(prog)s ... --report
  tables and picture from a results.json alone:
    $ %(prog)s --again docs/results/bars_lying.json --output output/again
  seeds 2 and 3 on another machine, and the tables of all four:
    $ %(prog)s ... --seeds 2-3
    $ %(prog)s --again here/results.json there/results.json --output output/all

After a kill, the same command continues. KEY VALUE pairs change both configs.
exit status: 0 done, 2 bad input, 75 stopped on request, 1 a run failed (its output file is named).
"""


def parse_args() -> argparse.Namespace:
    parser, count = tool_parser(__doc__, EPILOG, "nats-study"), whole_number(1000)
    parser.add_argument("--config-file", help="config of the detector: a path or a zoo name")
    parser.add_argument("--search-config", help="config of its search")
    parser.add_argument("--output", help="folder (output/study; of --again: output/again)")
    parser.add_argument(
        "--seeds",
        type=seeds_argument,
        default="3",
        help="how many, from 0 on; or which, like 2-3 (3)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        type=method_argument,
        default=list(DEFAULTS),
        metavar="METHOD",
        help=f"the others are compared with the first (default: {' '.join(DEFAULTS)})",
    )
    parser.add_argument(
        "--architecture",
        type=named_file_argument,
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="another method: an architecture file; may be repeated",
    )
    parser.add_argument("--folds", type=count, help="seed S is tested on fold S modulo FOLDS")
    parser.add_argument("--annotations", nargs="+", metavar="JSON", help="cut these into folds")
    parser.add_argument("--images", metavar="FOLDER", help="folder of the annotations' images")
    parser.add_argument("--jobs", type=count, default=1, help="runs at a time (%(default)s)")
    parser.add_argument("--num-gpus", type=count, default=1, help="GPUs of each run (%(default)s)")
    parser.add_argument("--report", action="store_true", help="run nothing, only write the tables")
    parser.add_argument(
        "--again",
        nargs="+",
        metavar="JSON",
        help="run nothing, write the tables of a results.json, or of a study's several ones",
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="for both configs"
    )
    args = parser.parse_args()
    # not where a study may be, whose tables would be lost
    args.output = args.output or ("output/again" if args.again else "output/study")
    if not args.again and not (args.config_file and args.search_config):
        parser.error("--config-file and --search-config are needed")
    if args.folds and (args.folds < 2 or not args.annotations or not args.images):
        parser.error("--folds needs at least 2 folds, --annotations and --images")
    if not args.folds and (args.annotations or args.images):
        parser.error("--annotations and --images need --folds; else the configs name the data")
    return args


def study_of(args: argparse.Namespace) -> Study:
    """The study that a command line describes."""
    return Study(
        Settings(
            config_file=args.config_file,
            search_config=args.search_config,
            output=args.output,
            seeds=args.seeds,
            methods=args.methods,
            given=dict(args.architecture),
            folds=args.folds,
            annotations=args.annotations,
            images=args.images,
            num_gpus=args.num_gpus,
            opts=args.opts,
        )
    )


def main(args: argparse.Namespace) -> None:
    if args.again:
        results = together(args.again)
    else:
        study = study_of(args)
        if not args.report:
            run_tasks(study.tasks, args.jobs, args.num_gpus)
        results = collect(study)
    print(f"\n{write_tables(results, args.output)}")
    for name in ("results.json", "study.png", "study.md"):
        print(f"wrote {os.path.join(args.output, name)}")


def _stop(*_):
    raise KeyboardInterrupt


def run() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, _stop)
    with exit_on_bad_input():
        try:
            main(args)
        except RunFailed as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("stopped; continue with the same command", file=sys.stderr)
            sys.exit(STOPPED_EXIT_CODE)
