#!/usr/bin/env python
"""Is it worth it? Compare plain, random and searched architectures over seeds and folds.

Each method is retrained with the same budget, once per seed. Runs that are already done are not
repeated. The output folder then contains study.md (tables), study.png, and results.json (the
numbers behind both, and the architectures).
"""

import argparse
import ctypes
import functools
import hashlib
import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Optional

import numpy as np
import torch
from tabulate import tabulate

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import build_detection_test_loader
from detectron2.modeling import build_backbone, build_model
from detectron2_nats.bench import comparison
from detectron2_nats.bench import pictures as plot
from detectron2_nats.bench.cost import backbone_cost, detector_flops, interleaved_seconds
from detectron2_nats.commands.cli import tool_parser, whole_number
from detectron2_nats.config import config_differences, load_config
from detectron2_nats.data.registry import register_datasets
from detectron2_nats.engine.stopping import STOPPED_EXIT_CODE
from detectron2_nats.errors import NATSError, one_line
from detectron2_nats.files import write_atomically
from detectron2_nats.method.architecture import Architecture
from detectron2_nats.method.transform import frozen_state_dict
from detectron2_nats.search.export import (
    export_config,
    frozen_weights,
    write_config,
    write_weights,
)
from detectron2_nats.search.folder import SearchFolder

EPILOG = """
methods:
  plain        the detector without a search
  plain-long   the same, for as many iterations as search and retraining together
  random       each channel group draws its dilation, anew for each seed
  path         path-level search: one choice per conv
  transposed   what nats-voted found, with height and width of each dilation swapped
  nats-paper   the search, with channels sorted by dilation
  nats-voted   the same search, each group keeping its own channels
  nats-warm    the same architecture, retrained from the super-network's own weights
  path-warm    what path found, likewise
  5x5          one dilation in all searched convs, this one or another
  NAME         the architecture of --architecture NAME=FILE, the same for each seed
  5x5-warm, NAME-warm: likewise, from the weights of the nats- methods' super-network
transposed and the nats- methods take a margin (SEARCH.DECODE_MARGIN) after an @: nats-warm@0.1.
All take a length: plain-1.5x, NAME-1.5x=FILE are retrained for 1.5 times as many iterations.
A search's iteration takes longer than one of training, so equal time needs more than plain-long.

examples:
  on bars, whose right answer is known, with two seeds and two runs at a time:
    $ python tools/study.py --config-file configs/quickstart/bars.yaml \\
        --search-config configs/quickstart/bars_search.yaml --seeds 2 --jobs 2 \\
        --output output/study
  on your own data in five folds, so that every image is tested once:
    $ python tools/study.py --config-file configs/study/small.yaml \\
        --search-config configs/study/small_search.yaml --seeds 5 --folds 5 \\
        --annotations train.json calib.json val.json --images images \\
        --architecture ic-conv=ic_conv.yaml --output output/study \\
        MODEL.WEIGHTS path/to/R-50-half.pkl
  on COCO, with eight GPUs for each run:
    $ python tools/study.py --config-file configs/retrain/faster_rcnn_R_50_FPN.yaml \\
        --search-config configs/search/faster_rcnn_R_50_FPN.yaml --seeds 3 --num-gpus 8 \\
        --output output/study
  report what is done so far, and run nothing:
    $ python tools/study.py ... --report
  tables and picture from a results.json alone:
    $ python tools/study.py --again docs/results/bars_lying.json --output output/again
  seeds 2 and 3 on another machine, and the tables of all four:
    $ python tools/study.py ... --seeds 2-3
    $ python tools/study.py --again here/results.json there/results.json --output output/all
  AP against multiply-adds and time of several studies' detectors, as one picture:
    $ python tools/study.py --cost full.json cut.json --methods plain nats-warm

After a kill, the same command continues. KEY VALUE pairs change both configs.
exit status: 0 done, 2 bad input, 75 stopped on request, 1 a run failed (its output file is named).
"""

# Method → the search that it needs.
METHODS = {
    "plain": "",
    "plain-long": "",
    "random": "",
    "path": "path",
    "transposed": "nats",
    "nats-paper": "nats",
    "nats-voted": "nats",
    "nats-warm": "nats",
    "path-warm": "path",
}
# name, margin, length
METHOD = re.compile(r"(.*?)(?:@(0?\.\d+|0))?(?:-(\d{1,3}(?:\.\d{1,3})?)x)?", re.DOTALL)
UNIFORM = re.compile(r"([1-9]\d?)x([1-9]\d?)(?:-warm)?")  # height and width of the dilation
# Settings (or beginnings of their names) that change no result of a run.
FREE_KEYS = (
    "OUTPUT_DIR",
    "DATALOADER.NUM_WORKERS",
    "MODEL.DEVICE",
    "RUN.",
    "SOLVER.CHECKPOINT_PERIOD",
    "VIS_PERIOD",
)
DEFAULT_METHODS = ("plain", "plain-long", "random", "nats-paper", "nats-voted", "nats-warm")


class RunFailed(NATSError):
    """A run of a script ended with an error."""


@dataclass
class Task:
    """One run of a script.

    Attributes:
        kind: "search" or "retraining"; runs of a kind take about the same time.
        folder: its OUTPUT_DIR, named after method and seed.
        prepare: called before the start; returns the command.
        after: runs that must be done before.
        slot: its place among the simultaneous runs; decides its GPUs.
    """

    kind: str
    folder: str
    prepare: Callable[[], List[str]]
    after: List["Task"] = field(default_factory=list)
    slot: int = 0
    started: float = 0.0
    process: Optional[subprocess.Popen] = None

    @property
    def done(self) -> bool:
        return self.cost()["done"]

    @property
    def console(self) -> str:
        return os.path.join(self.folder, "console.txt")

    def cost(self) -> dict:
        """What it took so far, over all starts: {"seconds", "cpu_seconds", "done", "lost"}.

        lost: the number of starts of which nothing is known, because the study was killed.
        """
        path = os.path.join(self.folder, "cost.json")
        if not os.path.isfile(path):
            return {"seconds": 0, "cpu_seconds": 0, "done": False, "lost": 0}
        with open(path) as file:
            return {"lost": 0, **json.load(file)}

    def _write_cost(self, **changes) -> None:
        path = os.path.join(self.folder, "cost.json")
        write_atomically(path, json.dumps({**self.cost(), **changes}))

    def start(self, environment: Dict[str, str]) -> None:
        os.makedirs(self.folder, exist_ok=True)
        command = self.prepare()
        with open(self.console, "a") as log:
            log.write(f"$ python {' '.join(command)}\n")
            log.flush()
            self.process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONWARNINGS": "ignore", **environment},
                start_new_session=True,  # Ctrl-C reaches it once, through us
                preexec_fn=_stop_with_parent if sys.platform.startswith("linux") else None,
            )
        self.started = time.perf_counter()
        self._write_cost(lost=self.cost()["lost"] + 1)  # until its end is seen

    def poll(self) -> Optional[int]:
        """The exit status if it has ended, else None. Its cost is then written to cost.json."""
        if self.process.returncode is not None:  # send_signal() has already read the status
            return self.process.returncode
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if not pid:
            return None
        code = os.waitstatus_to_exitcode(status)
        self.process.returncode = code
        cost = self.cost()
        self._write_cost(
            seconds=cost["seconds"] + time.perf_counter() - self.started,
            cpu_seconds=cost["cpu_seconds"] + usage.ru_utime + usage.ru_stime,
            done=code == 0,
            lost=cost["lost"] - 1,
        )
        return code


def _stop_with_parent() -> None:
    """When the study is killed, stop its runs: they must not continue beside those of a restart."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


class Study:
    """The runs of a study, and their results.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.seeds = args.seeds
        self.given = dict(args.architecture)
        self.methods = [*args.methods, *self.given]
        cfg = load_config(args.config_file, args.opts)
        if not args.folds and len(cfg.DATASETS.TEST) != 1:
            raise NATSError(f"DATASETS.TEST {cfg.DATASETS.TEST}: expected one data set, or --folds")
        self.settings = {
            "config": cfg.dump(),
            "search_config": load_config(args.search_config, args.opts).dump(),
            "folds": args.folds,
            "annotations": args.annotations,
            "images": args.images,
        }
        if args.folds:
            annotations = comparison.merged_annotations(args.annotations)
            content = json.dumps(annotations, sort_keys=True).encode()
            self.settings["content of the annotations"] = hashlib.sha256(content).hexdigest()[:16]
        self._check_same_study()
        self._check_architectures()
        if args.folds:
            comparison.write_folds(annotations, args.folds, self.path("data"))
        self.tasks = self._tasks()

    def path(self, *parts: str) -> str:
        return os.path.join(self.args.output, *parts)

    def folder(self, method: str, seed: int) -> str:
        return self.path(f"seed_{seed}", method)

    def _check_architectures(self) -> None:
        """Find now what would fail after the search, and files that have changed since a run."""
        base = load_config(self.args.config_file, self.args.opts)
        with torch.device("meta"):
            supernet = build_backbone(load_config(self.args.search_config, self.args.opts))
        for method in self.methods:
            if method not in self.given and not UNIFORM.fullmatch(kind(method)):
                continue
            try:
                architecture = self._architecture(method, 0)
                export_config(base, architecture)
                if kind(method).endswith("-warm"):
                    frozen_state_dict(supernet, architecture)
            except NATSError as error:
                raise NATSError(f"{method}: {error}") from None
            for seed in self.seeds:
                path = os.path.join(self.folder(method, seed), "retrain.yaml")
                if not os.path.isfile(path):
                    continue
                trained = Architecture.from_config(load_config(path).MODEL.NATS.ARCHITECTURE)
                if trained != architecture.restrict(trained.stages):
                    raise NATSError(
                        f"{self.given.get(method, method)} is another architecture than that in "
                        f"{path}, which was trained: give it another name"
                    )

    def _check_same_study(self) -> None:
        """Refuse the folder of another study. Seeds and methods may be added later."""
        path = self.path("study.json")
        os.makedirs(self.path("data"), exist_ok=True)
        if not os.path.isfile(path):
            write_atomically(path, json.dumps(self.settings, indent=1))
            return
        with open(path) as file:
            old = json.load(file)
        for key, value in self.settings.items():
            if old.get(key, value) == value:  # older versions wrote fewer
                continue
            detail = f"{old.get(key)!r}, now {value!r}"
            if "config" in key:
                cfg = load_config(
                    self.args.search_config if "search" in key else self.args.config_file,
                    self.args.opts,
                )
                differences = config_differences(old[key], cfg, FREE_KEYS)
                if not differences:
                    continue
                detail = "; ".join(differences[:5])
            raise NATSError(f"{path} is of another study: {key}: {detail}. Choose another --output")

    # -- runs ------------------------------------------------------------------------------------

    def _options(self, seed: int, folder: str, searching: bool) -> List[str]:
        opts = [*self.args.opts, "SEED", str(seed), "OUTPUT_DIR", folder]
        if self.args.folds:
            fold = self.path("data", f"fold_{seed % self.args.folds}")
            names = {n: f"study_{seed % self.args.folds}_{n}" for n in os.listdir(fold)}
            register = [[v, os.path.join(fold, n), self.args.images] for n, v in names.items()]
            train = "train.json" if searching else "rest.json"
            opts += ["DATASETS.REGISTER", repr(register)]
            opts += ["DATASETS.TRAIN", repr((names[train],))]
            opts += ["DATASETS.TEST", repr((names["test.json"],))]
            opts += ["DATASETS.CALIBRATION", repr((names["calibration.json"],))]
        if searching:
            opts += ["DATASETS.TEST", "()"]
        return opts

    def _tasks(self) -> List[Task]:
        tasks = []
        for seed in self.seeds:  # seed by seed, so that complete seeds can be reported
            needed = [search_of(method) for method in self.methods]
            searches = {n: self._search(n, seed) for n in ("path", "nats") if n in needed}
            tasks += searches.values()
            tasks += [self._retraining(method, seed, searches) for method in self.methods]
        return tasks

    def _search(self, name: str, seed: int) -> Task:
        folder = self.folder(f"search-{name}", seed)
        opts = self._options(seed, folder, searching=True)
        if name == "path":
            opts += ["MODEL.NATS.NUM_GROUPS", "1", "MODEL.NATS.CHANNELS_PER_GROUP", "0"]
        command = ["search_net.py", *self._common(self.args.search_config), *opts]
        return Task("search", folder, lambda: command)

    def _retraining(self, method: str, seed: int, searches: Dict[str, Task]) -> Task:
        folder = self.folder(method, seed)
        search = searches.get(search_of(method))

        def prepare() -> List[str]:
            config = self.args.config_file
            opts = self._options(seed, folder, searching=False)
            architecture = self._architecture(method, seed)
            if architecture is not None:
                config = os.path.join(folder, "retrain.yaml")
                base = load_config(self.args.config_file, self.args.opts)
                write_config(export_config(base, architecture), config)
            if kind(method).endswith("-warm"):
                weights = os.path.join(folder, "frozen.pth")
                write_weights(
                    frozen_weights(*SearchFolder(search.folder).supernet, architecture), weights
                )
                opts += ["MODEL.WEIGHTS", weights]
            opts += self._schedule(method)
            return ["train_net.py", *self._common(config), *opts]

        return Task("retraining", folder, prepare, [search] if search else [])

    def _common(self, config: str) -> List[str]:
        return ["--config-file", config, "--resume", "--num-gpus", str(self.args.num_gpus)]

    def _schedule(self, method: str) -> List[str]:
        """The retraining's schedule, stretched to the method's length."""
        solver, factor = load_config(self.args.config_file, self.args.opts).SOLVER, length(method)
        if method == "plain-long":
            search = load_config(self.args.search_config, self.args.opts).SOLVER
            factor = 1 + search.MAX_ITER / solver.MAX_ITER
        steps = tuple(round(step * factor) for step in solver.STEPS)
        iterations = round(solver.MAX_ITER * factor)
        return ["SOLVER.MAX_ITER", str(iterations), "SOLVER.STEPS", repr(steps)]

    def _architecture(self, method: str, seed: int) -> Optional[Architecture]:
        """A method's architecture for a seed; None for the plain detector."""
        if method in self.given:
            return Architecture.load(self.given[method])
        cfg = load_config(self.args.search_config, self.args.opts)
        if kind(method) == "random":
            return comparison.random_architecture(cfg, seed)
        if uniform := UNIFORM.fullmatch(kind(method)):
            return comparison.uniform_architecture(cfg, tuple(map(int, uniform.groups())))
        if not search_of(method):
            return None
        search = self.folder(f"search-{search_of(method)}", seed)
        order = "paper" if kind(method) == "nats-paper" else "voted"
        found = SearchFolder(search).decode(order, margin(method))
        return found.transposed() if kind(method) == "transposed" else found

    def run(self) -> None:
        """Run what is missing, `jobs` runs at a time.

        Raises:
            RunFailed: a run failed. The others were stopped with a checkpoint.
        """
        waiting = [task for task in self.tasks if not task.done]
        total, running = len(self.tasks), []
        print(f"{total - len(waiting)} of {total} runs are done", flush=True)
        try:
            while waiting or running:
                for task in [t for t in waiting if all(a.done for a in t.after)]:
                    if len(running) == self.args.jobs:
                        break
                    taken = {t.slot for t in running}
                    task.slot = min(set(range(self.args.jobs)) - taken)
                    task.start(self._environment(task.slot))
                    waiting.remove(task)
                    running.append(task)
                for task in list(running):
                    code = task.poll()
                    if code is None:
                        continue
                    running.remove(task)
                    if code == STOPPED_EXIT_CODE:
                        raise KeyboardInterrupt  # somebody has stopped this run
                    if code:
                        raise RunFailed(f"exit status {code}: see the end of {task.console}")
                    number = total - len(waiting) - len(running)
                    print(f"[{number}/{total}] {self._line(task)}{self._left(waiting, running)}")
                    sys.stdout.flush()
                time.sleep(0.2)
        finally:
            for task in running:
                task.process.send_signal(signal.SIGTERM)  # it writes a checkpoint and exits
            for task in running:
                while task.poll() is None:
                    time.sleep(0.2)

    def _environment(self, slot: int) -> Dict[str, str]:
        """The CPU cores and GPUs of one of the simultaneous runs, as environment variables."""
        threads = max(1, (os.cpu_count() or 1) // self.args.jobs)
        environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
        if torch.cuda.is_available():
            count, each = torch.cuda.device_count(), self.args.num_gpus
            given = os.environ.get("CUDA_VISIBLE_DEVICES")  # numbers or UUIDs
            names = given.split(",") if given else [str(i) for i in range(count)]
            devices = [names[(slot * each + i) % count] for i in range(each)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        return environment

    def _line(self, task: Task) -> str:
        name = os.path.relpath(task.folder, self.args.output)
        result = f"AP {last_metric(task.folder, 'bbox/AP'):.1f} " if task.kind != "search" else ""
        return f"{name}: {result}in {task.cost()['seconds']:.0f} s"

    def _left(self, waiting: List[Task], running: List[Task]) -> str:
        times: Dict[str, List[float]] = {}
        for task in self.tasks:
            if task.done:
                times.setdefault(task.kind, []).append(task.cost()["seconds"])
        overall = statistics.mean(t for values in times.values() for t in values)
        expected = {kind: statistics.mean(values) for kind, values in times.items()}
        left = sum(expected.get(task.kind, overall) for task in waiting)
        for task in running:
            left += max(0.0, expected.get(task.kind, overall) - time.perf_counter() + task.started)
        minutes = left / self.args.jobs / 60
        return f" (about {minutes:.0f} min left)" if minutes >= 1 else ""

    # -- results -----------------------------------------------------------------------------------

    def collect(self) -> Dict[str, Any]:
        """The results of all seeds for which all methods are done, as plain values."""
        seeds = [s for s in self.seeds if all(self._done(m, s) for m in self.methods)]
        if not seeds:
            raise NATSError(f"{self.args.output}: no seed has results of all methods yet")
        costs, flops, seconds = self._network_costs(seeds[0])
        reference = [backbone for backbone, _ in seconds[self.methods[0]]]
        methods = {}
        for method in self.methods:
            folders = [self.folder(method, seed) for seed in seeds]
            architectures = [self._architecture(method, seed) for seed in seeds]
            methods[method] = {
                "AP": [last_metric(folder, "bbox/AP") for folder in folders],
                "AP50": [last_metric(folder, "bbox/AP50") for folder in folders],
                "AP75": [last_metric(folder, "bbox/AP75") for folder in folders],
                "classes": _per_class(folders),
                "pooled": self._pooled(method, seeds),
                "parameters": costs[method].parameters,
                "flops": costs[method].flops,
                "milliseconds": 1e3 * statistics.median(own for own, _ in seconds[method]),
                "time_ratio": statistics.median(
                    own / plain for (own, _), plain in zip(seconds[method], reference)
                ),
                "detector": {
                    "flops": flops[method],
                    "milliseconds": 1e3 * statistics.median(whole for _, whole in seconds[method]),
                },
                "cpu_seconds": [self._task(folder).cost()["cpu_seconds"] for folder in folders],
                "lost_starts": [self._task(folder).cost()["lost"] for folder in folders],
                "architectures": [a.to_config() if a else None for a in architectures],
            }
        searches = {}
        for name in ("path", "nats"):
            folders = [self.folder(f"search-{name}", seed) for seed in seeds]
            if all(self._task(folder) for folder in folders):
                found = [SearchFolder(folder).decode("voted") for folder in folders]
                searches[name] = {
                    "entropy": [last_metric(folder, "alpha/entropy") for folder in folders],
                    "leading": [last_metric(folder, "alpha/leading") for folder in folders],
                    "cpu_seconds": [self._task(folder).cost()["cpu_seconds"] for folder in folders],
                    "lost_starts": [self._task(folder).cost()["lost"] for folder in folders],
                    "architectures": [architecture.to_config() for architecture in found],
                }
        return {"seeds": seeds, "methods": methods, "searches": searches}

    def _task(self, folder: str) -> Optional[Task]:
        return next((task for task in self.tasks if task.folder == folder), None)

    def _done(self, method: str, seed: int) -> bool:
        return self._task(self.folder(method, seed)).done

    def _pooled(self, method: str, seeds: List[int]) -> Optional[float]:
        """AP of all folds together, mean over rounds; None without folds or a complete round."""
        folds = self.args.folds
        rounds = [range(r, r + folds) for r in range(0, self.seeds.stop, folds)] if folds else []
        rounds = [r for r in rounds if set(r) <= set(seeds)]
        if not rounds:
            return None
        name = os.path.join("inference", "coco_instances_results.json")
        return statistics.mean(
            comparison.pooled_ap(
                self.path("data", "all.json"),
                [os.path.join(self.folder(method, s), name) for s in r],
            )
            for r in rounds
        )

    def _network_costs(self, seed: int):
        """Of each method's networks of one seed: the backbone's counts, the detector's
        multiply-adds, and the seconds per image of both in each round, taken in turn."""
        costs, flops, functions, images = {}, {}, [], None
        for method in self.methods:
            folder = self.folder(method, seed)
            cfg = load_config(os.path.join(folder, "config.yaml"))
            if not torch.cuda.is_available():
                cfg.MODEL.DEVICE = "cpu"
            register_datasets(cfg)
            if images is None:
                loader = build_detection_test_loader(cfg, cfg.DATASETS.TEST[0])
                images = list(itertools.islice(loader, 4))
            model = build_model(cfg).eval()
            # Trained: what it finds goes through the suppression of overlaps, which takes time.
            DetectionCheckpointer(model).load(os.path.join(folder, "model_final.pth"))
            height, width = (-(-side // 32) * 32 for side in images[0][0]["image"].shape[-2:])
            costs[method] = backbone_cost(model.backbone, height, width)
            flops[method] = statistics.mean(detector_flops(model, batch) for batch in images)
            functions += [functools.partial(_backbones, model, images)]
            functions += [functools.partial(_detections, model, images)]
        rounds = [[v / len(images) for v in s] for s in interleaved_seconds(functions, rounds=9)]
        pairs = [list(zip(rounds[i], rounds[i + 1])) for i in range(0, len(rounds), 2)]
        return costs, flops, dict(zip(self.methods, pairs))


@torch.no_grad()
def _backbones(model: torch.nn.Module, images: list) -> None:
    for batch in images:
        model.backbone(model.preprocess_image(batch).tensor)


@torch.no_grad()
def _detections(model: torch.nn.Module, images: list) -> None:
    for batch in images:
        model(batch)


def kind(method: str) -> str:
    """A method without its margin or length."""
    name = METHOD.fullmatch(method)[1]
    return "plain" if name == "plain-long" else name


def search_of(method: str) -> str:
    """The search that a method needs: nats, path, or none."""
    warm = kind(method).endswith("-warm")
    return METHODS.get(kind(method), "nats" if warm else "")


def margin(method: str) -> float:
    """The margin with which a method decodes."""
    return float(METHOD.fullmatch(method)[2] or 0)


def length(method: str) -> float:
    """Iterations of its retraining relative to the config's; 1.5 for plain-1.5x."""
    return float(METHOD.fullmatch(method)[3] or 1)


def read_results(path: str) -> Dict[str, Any]:
    """Read a results.json, or a file of docs/results."""
    try:
        with open(path) as file:
            results = json.load(file)
        {*results["methods"], *results["searches"], *results["seeds"]}
    except OSError as error:
        raise NATSError(f"{path}: cannot be read: {error.strerror}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise NATSError(f"{path}: not the results of a study: {one_line(error)}") from None
    if not results["methods"] or not results["seeds"]:
        raise NATSError(f"{path}: contains no results yet")
    return results


def together(paths: List[str]) -> Dict[str, Any]:
    """One study, of which several machines ran different seeds or methods.

    Returns:
        The results of the seeds that all methods have. Other values are those of each method's
        first file; time ratios of the first that has the same first method, to which they are.
    """
    parts = [read_results(path) for path in paths]
    if len(parts) == 1:
        return parts[0]
    first, *others = [next(iter(part["methods"])) for part in parts]
    for part, reference in zip(parts[1:], others):
        for result in part["methods"].values():
            result["time_ratio"] = result["time_ratio"] if reference == first else None
    cells: Dict[str, Dict[str, Dict[int, Any]]] = {"methods": {}, "searches": {}}
    for path, part in zip(paths, parts):
        for group, place in itertools.product(cells, range(len(part["seeds"]))):
            for name, values in part[group].items():
                seeds = cells[group].setdefault(name, {})
                seed = part["seeds"][place]
                if group == "methods" and seed in seeds:
                    raise NATSError(f"{path}: {name} of seed {seed} is in another file, too")
                seeds[seed] = _of_seed(values, place)
    seeds = sorted(set.intersection(*map(set, cells["methods"].values())))
    if not seeds:
        raise NATSError(f"{', '.join(paths)}: no seed has results of all methods")
    methods, searches = (
        {n: _joined([c[seed] for seed in seeds]) for n, c in group.items() if c.keys() >= {*seeds}}
        for group in cells.values()
    )
    for result in methods.values():
        result["pooled"] = None  # needs the detections
    return {"seeds": seeds, "methods": methods, "searches": searches}


def _of_seed(values: Any, place: int) -> Any:
    """The same structure with the list of each seed's values cut to one of them."""
    if isinstance(values, dict):
        return {name: _of_seed(value, place) for name, value in values.items()}
    return [values[place]] if isinstance(values, list) else values


def _joined(parts: List[Any]) -> Any:
    """The lists of equal structures one after the other; of other values the first known one."""
    if isinstance(parts[0], dict):
        names = [name for name in parts[0] if all(name in part for part in parts)]
        return {name: _joined([part[name] for part in parts]) for name in names}
    if isinstance(parts[0], list):
        return sum(parts, [])
    return next((part for part in parts if part is not None), None)


def costs(paths: List[str], methods: List[str]) -> Dict[str, Dict[str, Any]]:
    """`FILE: METHOD` → {"AP", "flops", "milliseconds"} of the detectors of several studies."""
    points = {}
    names = [os.path.splitext(os.path.basename(path))[0] for path in paths]
    for path, name in zip(paths, names):
        name = path if names.count(name) > 1 else name  # every study writes a results.json
        results = read_results(path)["methods"]
        for method in (m for m in methods if m in results):
            if "detector" not in results[method]:
                raise NATSError(f"{path}: an older version wrote no cost of the detector into it")
            points[f"{name}: {method}"] = {
                "AP": results[method]["AP"],
                **results[method]["detector"],
            }
    if not points:
        raise NATSError(f"{', '.join(paths)}: no results of {', '.join(methods)}")
    return points


# -- tables ----------------------------------------------------------------------------------------


def report(results: Dict[str, Any], folder: str) -> str:
    """Write study.md, study.png and results.json from what :meth:`Study.collect` returns."""
    methods, seeds = results["methods"], results["seeds"]
    ap = {name: result["AP"] for name, result in methods.items()}
    first = next(iter(ap))
    baselines = (m for m in ap if kind(m) in ("plain", "random") and m != "plain")
    references = dict.fromkeys([first, *baselines])
    differences = {
        r: {m: [a - b for a, b in zip(ap[m], ap[r])] for m in ap if m != r} for r in references
    }
    rows = []
    for method, result in methods.items():
        row = {"": method, "AP": _mean_and_deviation(result["AP"])}
        row["AP50"] = _mean_and_deviation(result["AP50"])
        row["AP75"] = _mean_and_deviation(result["AP75"])
        if result["pooled"] is not None:
            row["AP, folds pooled"] = f"{result['pooled']:.1f}"
        for reference in references:
            row[f"AP − {reference} [95 %]"] = _interval(differences[reference].get(method))
        row["parameters"] = f"{result['parameters']:,}"
        row["GFLOPs"] = f"{result['flops'] / 1e9:.3g}"
        ratio = result["time_ratio"]
        row["backbone time"] = "—" if ratio is None else f"{ratio:.3f}×"
        row["training, CPU min"] = _minutes(result)
        rows.append(row)
    lines = [
        f"{len(seeds)} seeds; mean ± standard deviation over them, differences paired by seed.",
        "",
        _table([list(row.values()) for row in rows], list(rows[0])),
        "",
        *_detectable_line(first, differences[first]),
        _table(
            [[m, *(f"{value:.1f}" for value in ap[m])] for m in ap],
            ["AP", *(f"seed {seed}" for seed in seeds)],
        ),
        "",
        *_class_table(methods),
        *_search_table(results["searches"]),
    ]
    text = "\n".join(lines).rstrip() + "\n"
    write_atomically(os.path.join(folder, "study.md"), text)
    write_atomically(os.path.join(folder, "results.json"), json.dumps(results))
    plot.save(plot.plot_study(ap, f"{len(seeds)} seeds"), folder, "study", ["png"])
    return text


def _detectable_line(reference: str, differences: Dict[str, List[float]]) -> List[str]:
    detectable = comparison.detectable_difference(differences)
    if detectable == math.inf:  # one seed
        return []
    line = f"A true difference of {detectable:.1f} AP to {reference} would be found with "
    return [line + "80 % probability (two-sided test at 5 %).", ""]


def _search_table(searches: Dict[str, Any]) -> List[str]:
    """Have the searches decided, and do they agree?"""
    rows = []
    for name, search in searches.items():
        found = [Architecture.from_config(value) for value in search["architectures"]]
        shares = comparison.dilation_shares(found)
        row = [name, _mean_and_deviation(search["entropy"], 2)]
        row.append(f"{statistics.mean(search['leading']):.0%}")
        row.append(", ".join(f"{h}×{w} {s:.0%}" for (h, w), s in shares.items() if s >= 0.01))
        if len(found) > 1:
            row += [f"{share:.0%}" for share in comparison.agreement(found)]
        row.append(_minutes(search))
        rows.append(row)
    if not rows:
        return []
    headers = ["search", "entropy of α", "groups that lead", "channels per dilation"]
    headers += ["agreement of seeds", "by chance"][: len(rows[0]) - 5]
    return [_table(rows, [*headers, "CPU min"])]


def _minutes(result: Dict[str, Any]) -> str:
    """CPU minutes, mean over the seeds; a lower bound where starts have been lost."""
    bound = "≥ " if any(result.get("lost_starts", ())) else ""
    return f"{bound}{statistics.mean(result['cpu_seconds']) / 60:.1f}"


def _class_table(methods: Dict[str, Any]) -> List[str]:
    """Which classes gain, and which pay for it? Means over the seeds."""
    classes = next(iter(methods.values())).get("classes", {})
    if len(classes) < 2:
        return []
    rows = [
        # NaN where a fold has no box of the class
        [method, *(f"{np.nanmean(result['classes'][name]):.1f}" for name in classes)]
        for method, result in methods.items()
    ]
    return [_table(rows, ["AP of each class", *classes]), ""]


def _per_class(folders: List[str]) -> Dict[str, List[float]]:
    """Class → AP of each run; no class where not all runs have the same ones."""
    prefix, found = "bbox/AP-", []
    for folder in folders:
        last = [m for m in _metrics(folder) if "bbox/AP" in m][-1]
        found.append({k[len(prefix) :]: v for k, v in last.items() if k.startswith(prefix)})
    names = found[0] if all(f.keys() == found[0].keys() for f in found) else ()
    return {name: [classes[name] for classes in found] for name in names}


def last_metric(folder: str, name: str) -> float:
    """The last value of a metric in a run's metrics.json."""
    try:
        return [m[name] for m in _metrics(folder) if name in m][-1]
    except (OSError, IndexError):
        raise NATSError(f"{folder}/metrics.json contains no {name}") from None


def _metrics(folder: str) -> Iterator[Dict[str, float]]:
    """The lines of a run's metrics.json, but for those that a kill has cut off."""
    with open(os.path.join(folder, "metrics.json")) as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def _table(rows: List[List[str]], headers: List[str]) -> str:
    align = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(rows, headers, "pipe", disable_numparse=True, colalign=align)


def _interval(differences: Optional[List[float]]) -> str:
    if not differences:
        return "—"
    mean, half = comparison.paired_interval(differences)
    if half == math.inf:
        return f"{mean:+.1f}"
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"


def _mean_and_deviation(values: List[float], digits: int = 1) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def _seeds(text: str) -> range:
    match = re.fullmatch(r"(?:(\d{1,3})-)?(\d{1,3})", text)
    seeds = range(int(match[1] or 0), int(match[2]) + bool(match[1])) if match else range(0)
    if seeds:
        return seeds
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number of seeds, or a range like 2-3")


def _named_file(text: str):
    name, _, path = text.partition("=")
    taken = kind(name) in METHODS or UNIFORM.fullmatch(kind(name)) or METHOD.fullmatch(name)[2]
    if not name or not path or taken or "/" in name:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=FILE, NAME not being a method")
    return name, path


def _method(text: str) -> str:
    name, decoded_with, longer = METHOD.fullmatch(text).groups()
    known = name in METHODS or bool(UNIFORM.fullmatch(name))
    known &= decoded_with is None or METHODS.get(name) == "nats"
    if longer:
        known &= float(longer) > 0 and name != "plain-long"
    if not known:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected one of {', '.join(METHODS)}, 5x5, 5x5-warm; with a length, "
            "like plain-1.5x; transposed and nats- also with @MARGIN. KEY VALUE pairs come after "
            "another option than --methods"
        )
    return text


def parse_args() -> argparse.Namespace:
    parser, count = tool_parser(__doc__, EPILOG), whole_number(1000)
    parser.add_argument("--config-file", help="config of the detector: a path or a zoo name")
    parser.add_argument("--search-config", help="config of its search")
    parser.add_argument(
        "--output", help="folder (output/study; of --again and --cost: output/again)"
    )
    parser.add_argument(
        "--seeds", type=_seeds, default="3", help="how many, from 0 on; or which, like 2-3 (3)"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        type=_method,
        default=list(DEFAULT_METHODS),
        metavar="METHOD",
        help=f"the others are compared with the first (default: {' '.join(DEFAULT_METHODS)})",
    )
    parser.add_argument(
        "--architecture",
        type=_named_file,
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
        "--cost",
        nargs="+",
        metavar="JSON",
        help="draw AP against cost of several studies' --methods",
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="for both configs"
    )
    args = parser.parse_args()
    without_runs = args.again or args.cost
    # not where a study may be, whose tables would be lost
    args.output = args.output or ("output/again" if without_runs else "output/study")
    if not without_runs and not (args.config_file and args.search_config):
        parser.error("--config-file and --search-config are needed")
    if args.folds and (args.folds < 2 or not args.annotations or not args.images):
        parser.error("--folds needs at least 2 folds, --annotations and --images")
    if not args.folds and (args.annotations or args.images):
        parser.error("--annotations and --images need --folds; else the configs name the data")
    return args


def main(args: argparse.Namespace) -> None:
    if args.cost:
        points = costs(args.cost, args.methods)
        plot.save(plot.plot_cost(points), args.output, "cost", ["png"])
        print(f"wrote {os.path.join(args.output, 'cost.png')}")
        return
    if args.again:
        results = together(args.again)
    else:
        study = Study(args)
        if not args.report:
            study.run()
        results = study.collect()
    print(f"\n{report(results, args.output)}")
    for name in ("results.json", "study.png", "study.md"):
        print(f"wrote {os.path.join(args.output, name)}")


def _stop(*_):
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    try:
        main(parse_args())
    except NATSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, RunFailed) else 2)
    except KeyboardInterrupt:
        print("stopped; continue with the same command", file=sys.stderr)
        sys.exit(STOPPED_EXIT_CODE)
