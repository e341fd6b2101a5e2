#!/usr/bin/env python
"""Is it worth it? Compare plain, drawn and searched detectors over seeds and folds.

Each method's detector is trained once per seed, by the commands that a user would take: they stand
in the console.txt of each run. What is done is not repeated. At the end the output folder contains
study.md, the tables, and results.json, the numbers behind them and the architectures.
"""

import argparse
import contextlib
import itertools
import json
import os
import signal
import statistics
import sys
from functools import partial
from typing import Any, Dict, List

import folds
import torch
from jobs import STOPPED, Job, run_jobs, write
from methods import HELP, PATH_LEVEL, Method, file_argument, method_argument, prepare, training
from tables import tables

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, build_detection_test_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model
from detectron2_nats import Architecture, NATSError
from detectron2_nats.config import load_config
from detectron2_nats.show.cost import backbone_cost, interleaved_seconds

EPILOG = HELP + """
examples:
  on bars, whose right answer is known, with two seeds and two runs at a time:
    $ python study/run.py --config-file configs/quickstart/bars.yaml \\
        --search-config configs/quickstart/bars_search.yaml --seeds 2 --jobs 2 \\
        --output output/study
  on your own data in four folds, so that every image is tested once:
    $ python study/run.py --config-file study/configs/small.yaml \\
        --search-config study/configs/small_search.yaml --seeds 4 --folds 4 \\
        --annotations train.json calib.json val.json --images images \\
        --architecture ic-conv=ic_conv.yaml --output output/study \\
        MODEL.WEIGHTS path/to/R-50-half.pkl

After a kill, the same command continues. KEY VALUE pairs change both configs.
exit status: 0 done, 2 bad input or a failed run (its console.txt is named), 75 stopped on request.
"""

DEFAULTS = ("plain", "random", "nats-paper", "nats-voted", "nats-warm")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="the detector's: path or zoo name")
    parser.add_argument("--search-config", required=True, help="config of its search")
    parser.add_argument(
        "--methods",
        nargs="+",
        type=method_argument,
        default=[Method.of(name) for name in DEFAULTS],
        metavar="METHOD",
        help=f"the others are compared with the first (default: {' '.join(DEFAULTS)})",
    )
    parser.add_argument(
        "--architecture",
        type=file_argument,
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="another method: an architecture file; may be repeated",
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on (%(default)s)")
    parser.add_argument(
        "--folds", type=int, default=0, help="seed S: tested on fold S modulo FOLDS"
    )
    parser.add_argument("--annotations", nargs="+", metavar="JSON", help="cut these into folds")
    parser.add_argument("--images", metavar="FOLDER", help="folder of the annotations' images")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (%(default)s)")
    parser.add_argument("--output", default="output/study", help="folder (%(default)s)")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="for both configs"
    )
    args = parser.parse_args()
    if min(args.seeds, args.jobs) < 1:
        parser.error("--seeds and --jobs: expected at least 1")
    if args.folds < 2 and (args.folds or args.annotations or args.images):
        parser.error("--annotations and --images go with at least 2 --folds")
    if args.folds and not (args.annotations and args.images):
        parser.error("--folds needs --annotations and --images")
    return args


class Study:
    """A study's folder and its jobs.

    Attributes:
        methods: the first is the one with which the others are compared.
        jobs: in the order in which they are to run.

    Raises:
        NATSError: bad input, or the folder is another study's. Nothing has been run then.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.methods: List[Method] = [*args.methods, *args.architecture]
        self.configs = (self.path("detector.yaml"), self.path("search.yaml"))
        self._detector = load_config(args.config_file, args.opts)
        self._search = load_config(args.search_config, args.opts)
        self._search.SEARCH.RETRAIN_CONFIG = self.configs[0]
        self._search.SEARCH.DECODE_ORDER = "voted"
        self._check()
        self._keep(self.configs[0], self._detector.dump())
        self._keep(self.configs[1], self._search.dump())
        for method in args.architecture:
            layers = json.dumps(Architecture.load(method.file).to_config(), indent=1)
            self._keep(self.path(f"{method.name}.json"), layers)
        if args.folds:
            merged = folds.merged_annotations(args.annotations)
            self._keep(self.path("data", "all.json"), json.dumps(merged))
            for name, content in folds.cut(merged, args.folds).items():
                self._keep(self.path("data", f"{name}.json"), json.dumps(content))
        self.jobs = [job for seed in range(args.seeds) for job in self._jobs(seed)]

    def path(self, *parts: str) -> str:
        return os.path.join(self.args.output, *parts)

    def folder(self, name: str, seed: int) -> str:
        """The OUTPUT_DIR of a method's training, or of a search ("search-nats")."""
        return self.path(f"seed_{seed}", name)

    def _check(self) -> None:
        """What would else be found out after hours."""
        if not self.args.folds and len(self._detector.DATASETS.TEST) != 1:
            test = self._detector.DATASETS.TEST
            raise NATSError(f"DATASETS.TEST {test}: expected one data set, or --folds")
        search = self._search.SEARCH
        freezes = search.FREEZE_AT < 1 or search.FREEZE_WHEN_DECIDED
        for method in self.methods:
            if method.search and freezes:
                raise NATSError(
                    f"{method.name} retrains what a search finds: set SEARCH.FREEZE_AT 1.0 "
                    "SEARCH.FREEZE_WHEN_DECIDED False, or compare one-run"
                )
            if method.is_one_run and not freezes:
                raise NATSError(
                    f"{method.name}: set SEARCH.FREEZE_AT to the search's share, as 0.2"
                )

    def _keep(self, path: str, content: str) -> None:
        """Write a file that decides the results, or refuse the folder if it had another one."""
        if not os.path.isfile(path):
            return write(path, content)
        with open(path) as file:
            old = file.read()
        if old != content:
            pairs = itertools.zip_longest(old.splitlines(), content.splitlines(), fillvalue="")
            before, now = next((f"{a.strip():.80}", f"{b.strip():.80}") for a, b in pairs if a != b)
            raise NATSError(
                f"{path} is of another study: {before!r}, now {now!r}. Choose another --output, or "
                "another name for the architecture"
            )

    def _jobs(self, seed: int) -> List[Job]:
        """Those of a seed; first those that no search precedes, whose faults then show early."""
        needed = dict.fromkeys(method.search for method in self.methods if method.search)
        searches = {name: self._search_job(name, seed) for name in needed}
        alone = [self._training(m, seed, []) for m in self.methods if not m.search]
        after = [self._training(m, seed, [searches[m.search]]) for m in self.methods if m.search]
        return [*alone, *searches.values(), *after]

    def _search_job(self, name: str, seed: int) -> Job:
        folder = self.folder(f"search-{name}", seed)
        options = [*self._options(seed, folder, "train"), "DATASETS.TEST", "()"]
        options += PATH_LEVEL if name == "path" else []
        command = ["nats-search", "--config-file", self.configs[1], "--resume", *options]
        return Job(folder, lambda: command)

    def _training(self, method: Method, seed: int, after: List[Job]) -> Job:
        folder = self.folder(method.name, seed)
        searches = method.is_one_run
        options = self._options(seed, folder, "train" if searches else "rest")
        options += training(method, (self._search if searches else self._detector).SOLVER)
        if method.kind.startswith("path-") and searches:
            options += PATH_LEVEL
        if searches:
            options += ["SEARCH.RETRAIN_WEIGHTS", "supernet"]
        search = after[0].folder if after else ""

        def command() -> List[str]:
            config = prepare(method, seed, folder, self.configs, search)
            name = "nats-search" if searches else "nats-train"
            return [name, "--config-file", config, "--resume", *options]

        return Job(folder, command, after)

    def _options(self, seed: int, folder: str, split: str) -> List[str]:
        options = ["SEED", str(seed), "OUTPUT_DIR", folder]
        if self.args.folds:
            fold = seed % self.args.folds
            options += folds.options(self.path("data"), fold, self.args.images, split)
        return options

    # -- results -----------------------------------------------------------------------------------

    def results(self) -> Dict[str, Any]:
        """What the jobs gave, as plain values; all must be done."""
        seeds = range(self.args.seeds)
        costs = self._network_costs()
        methods, searches = {}, {}
        for method in self.methods:
            folders = [self.folder(method.name, seed) for seed in seeds]
            lines = [last_metrics(folder, "bbox/AP") for folder in folders]
            methods[method.name] = {
                **{
                    name: [line[f"bbox/{name}"] for line in lines]
                    for name in ("AP", "AP50", "AP75")
                },
                "classes": of_classes(lines),
                **costs[method.name],
                "cpu_seconds": cpu_seconds(folders),
                "architectures": [architecture_of(folder) for folder in folders],
            }
        for name in dict.fromkeys(method.search for method in self.methods if method.search):
            folders = [self.folder(f"search-{name}", seed) for seed in seeds]
            lines = [last_metrics(folder, "alpha/entropy") for folder in folders]
            searches[name] = {
                "entropy": [line["alpha/entropy"] for line in lines],
                "leading": [line["alpha/leading"] for line in lines],
                "cpu_seconds": cpu_seconds(folders),
                "architectures": [architecture_of(folder) for folder in folders],
            }
        return {"seeds": [*seeds], "methods": methods, "searches": searches}

    def _network_costs(self) -> Dict[str, Dict[str, Any]]:
        """What each method's backbone of seed 0 costs for an image; they are timed in turn."""
        counts, calls = {}, []
        first = os.path.join(self.folder(self.methods[0].name, 0), "config.yaml")
        batches = test_images(load_config(first), 4)
        for method in self.methods:
            model = build_model(config_of(self.folder(method.name, 0))).eval()
            height, width = (-(-side // 32) * 32 for side in batches[0][0]["image"].shape[-2:])
            counts[method.name] = backbone_cost(model.backbone, height, width)
            calls.append(partial(run_backbone, model, batches))
        seconds = interleaved_seconds(calls, rounds=9)
        return {
            name: {
                "parameters": count["parameters"],
                "flops": count["FLOPs"],
                "milliseconds": 1e3 * statistics.median(own) / len(batches),
                "time_ratio": statistics.median(a / b for a, b in zip(own, seconds[0])),
            }
            for (name, count), own in zip(counts.items(), seconds)
        }


def config_of(folder: str) -> CfgNode:
    """The config of a folder's network: of one that has dilations, the plain config with them."""
    paths = (os.path.join(folder, name) for name in ("retrain.yaml", "config.yaml"))
    cfg = load_config(next(filter(os.path.isfile, paths)))
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def architecture_of(folder: str) -> Any:
    """``MODEL.NATS.ARCHITECTURE`` of what was trained or found in a folder; None if it is plain."""
    return config_of(folder).MODEL.NATS.ARCHITECTURE or None


def test_images(cfg: CfgNode, count: int) -> List[List[dict]]:
    """The first images of a config's test set, one in a batch."""
    for name, annotations, images in cfg.DATASETS.REGISTER:
        if name not in DatasetCatalog:
            register_coco_instances(name, {}, annotations, images)
    cfg.DATALOADER.NUM_WORKERS = 0
    return list(itertools.islice(build_detection_test_loader(cfg, cfg.DATASETS.TEST[0]), count))


@torch.no_grad()
def run_backbone(model: torch.nn.Module, batches: List[List[dict]]) -> None:
    for batch in batches:
        model.backbone(model.preprocess_image(batch).tensor)


def last_metrics(folder: str, name: str) -> Dict[str, float]:
    """The last line of a run's metrics.json that has the metric `name`."""
    last = None
    with open(os.path.join(folder, "metrics.json")) as file:
        for line in file:
            with contextlib.suppress(ValueError):  # a line that a kill has cut off
                metrics = json.loads(line)
                last = metrics if name in metrics else last
    if last is None:
        raise NATSError(f"{folder}/metrics.json contains no {name}")
    return last


def of_classes(lines: List[Dict[str, float]]) -> Dict[str, List[float]]:
    """Class → AP of each run; no class where not all runs have the same ones."""
    prefix = "bbox/AP-"
    names = [name for name in lines[0] if name.startswith(prefix)]
    names = [name for name in names if all(name in line for line in lines)]
    return {name[len(prefix) :]: [line[name] for line in lines] for name in names}


def cpu_seconds(folders: List[str]) -> List[float]:
    return [Job(folder, list).cost()["cpu_seconds"] for folder in folders]


def main(args: argparse.Namespace) -> None:
    study = Study(args)
    run_jobs(study.jobs, args.jobs)
    results = study.results()
    text = tables(results)
    write(study.path("study.md"), f"{text}\n")
    write(study.path("results.json"), json.dumps(results))
    print(f"\n{text}\n")
    for name in ("results.json", "study.md"):
        print(f"wrote {study.path(name)}")


def _stop(*_):
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    try:
        main(parse_args())
    except NATSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; continue with the same command", file=sys.stderr)
        sys.exit(STOPPED)
