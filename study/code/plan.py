"""What a study consists of: its settings, and the runs of each method and seed."""

import glob
import hashlib
import json
import os
from dataclasses import dataclass
from typing import Dict, List, Optional, Sequence

import torch

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_backbone

from ...backbone import architecture_from_config
from ...config import load_config
from ...config.comparing import config_differences
from ...data.annotations import Needs
from ...data.registry import check_data, check_number_of_classes, register_datasets
from ...errors import NATSError
from ...files import write_atomically
from ...method.architecture import Architecture
from ...method.transform import frozen_state_dict
from ...search.export import export_config, frozen_weights, write_config, write_weights
from ...search.folder import SearchFolder
from ..baselines import (
    cycle_architecture,
    random_architecture,
    sawtooth_architecture,
    uniform_architecture,
)
from .folds import merged_annotations, write_folds
from .methods import Method
from .runs import Task
from .trials import best, drawn, trial_data, trial_folder, trial_schedule

# Settings (or beginnings of their names) that change no result of a run.
_FREE_KEYS = (
    "OUTPUT_DIR",
    "DATALOADER.NUM_WORKERS",
    "MODEL.DEVICE",
    "RUN.",
    "SOLVER.CHECKPOINT_PERIOD",
    "VIS_PERIOD",
)


def run_folder(output: str, name: str, seed: object) -> str:
    """The OUTPUT_DIR of a method's retraining in a study's folder, or of a search."""
    return os.path.join(output, f"seed_{seed}", name)


def searches_of(output: str) -> List[str]:
    """The folders of all searches in a study's folder, those of whole groups first."""
    patterns = (run_folder(glob.escape(output), f"search-{name}", "*") for name in ("nats", "path"))
    return [folder for pattern in patterns for folder in sorted(glob.glob(pattern))]


@dataclass(frozen=True)
class Settings:
    """What a study is told.

    Attributes:
        config_file, search_config: of the detector and of its search; paths or zoo names.
        output: its folder.
        seeds: which.
        methods: names; the others are compared with the first.
        given: name of a further method → its architecture file.
        folds: number of folds into which `annotations`, of images in `images`, are cut; None where
            the configs name the data.
        num_gpus: of each run.
        opts: KEY VALUE pairs for both configs.
    """

    config_file: str
    search_config: str
    output: str
    seeds: range
    methods: Sequence[str]
    given: Dict[str, str]
    folds: Optional[int] = None
    annotations: Optional[Sequence[str]] = None
    images: Optional[str] = None
    num_gpus: int = 1
    opts: Sequence[str] = ()


class Study:
    """A study's folder and its runs.

    Raises:
        NATSError: bad input, or the folder is another study's. Nothing has been run then.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.seeds = settings.seeds
        self.methods = [Method.of(name) for name in (*settings.methods, *settings.given)]
        test = self._config().DATASETS.TEST
        if not settings.folds and len(test) != 1:
            raise NATSError(f"DATASETS.TEST {test}: expected one data set, or --folds")
        search = self._config(search=True).SEARCH
        if search.FREEZE_AT < 1 or search.FREEZE_WHEN_DECIDED:
            raise NATSError(
                f"{settings.search_config}: a study retrains what its searches find: set "
                "SEARCH.FREEZE_AT 1.0 and FREEZE_WHEN_DECIDED False"
            )
        annotations = self._checked_annotations() if settings.folds else self._check_data()
        self._check_same_study(annotations)
        self._check_architectures()
        if annotations:
            write_folds(annotations, settings.folds, self.path("data"))
        self.tasks = self._tasks()

    def _config(self, search: bool = False) -> CfgNode:
        """The detector's config, or that of its search."""
        path = self.settings.search_config if search else self.settings.config_file
        return load_config(path, self.settings.opts)

    def _checked_annotations(self) -> dict:
        """The annotations to be cut into folds, if the detector fits them."""
        cfg = self._config()
        masks = "any" if cfg.MODEL.MASK_ON else ""
        merged = merged_annotations(self.settings.annotations, Needs(masks, to_train=True))
        for cfg in (self._config(), self._config(search=True)):
            check_number_of_classes(cfg, "the data", len(merged["categories"]))
        return merged

    def _check_data(self) -> None:
        """Check the data that the configs name, which must all have the same classes."""
        cfg, search_cfg = self._config(), self._config(search=True)
        for one in (cfg, search_cfg):
            register_datasets(one)
        check_data(cfg, ["TRAIN", "TEST"])
        names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes")
        check_data(search_cfg, ["TRAIN", "CALIBRATION"], names)

    def path(self, *parts: str) -> str:
        return os.path.join(self.settings.output, *parts)

    def folder(self, name: str, seed: int) -> str:
        """The OUTPUT_DIR of a method's retraining, or of a search ("search-nats")."""
        return run_folder(self.settings.output, name, seed)

    def _check_architectures(self) -> None:
        """Find now what would fail after the search, and files that have changed since a run."""
        base = self._config()
        with torch.device("meta"):
            supernet = build_backbone(self._config(search=True))
        for method in self.methods:
            if method.draws:
                trial_schedule(self._config(search=True), base, method.draws)
                if not self.settings.folds:
                    trial_data(self._config(search=True))
            given = self.settings.given.get(method.name)
            if not given and not method.dilation:
                continue
            try:
                architecture = self.architecture(method, 0)
                export_config(base, architecture)
                if method.warm:
                    frozen_state_dict(supernet, architecture)
            except NATSError as error:
                raise NATSError(f"{method.name}: {error}") from None
            for seed in self.seeds:
                path = os.path.join(self.folder(method.name, seed), "retrain.yaml")
                if not os.path.isfile(path):
                    continue
                trained = architecture_from_config(load_config(path))
                same = architecture.restrict(trained.stages or list(trained.layers))
                if trained != same:
                    raise NATSError(
                        f"{given or method.name} is another architecture than that in "
                        f"{path}, which was trained: give it another name"
                    )

    def _check_same_study(self, annotations: Optional[dict]) -> None:
        """Refuse the folder of another study. Seeds and methods may be added later."""
        settings, configs = self.settings, {"config": False, "search_config": True}
        ours = {key: self._config(search).dump() for key, search in configs.items()}
        for key in ("folds", "annotations", "images"):
            ours[key] = getattr(settings, key)
        if annotations:
            content = json.dumps(annotations, sort_keys=True).encode()
            ours["content of the annotations"] = hashlib.sha256(content).hexdigest()[:16]
        path = self.path("study.json")
        os.makedirs(self.path("data"), exist_ok=True)
        if not os.path.isfile(path):
            write_atomically(path, json.dumps(ours, indent=1))
            return
        with open(path) as file:
            old = json.load(file)
        for key, value in ours.items():
            if old.get(key, value) == value:  # older versions wrote fewer
                continue
            detail = f"{old.get(key)!r}, now {value!r}"
            if key in configs:
                differences = config_differences(old[key], self._config(configs[key]), _FREE_KEYS)
                if not differences:
                    continue
                detail = "; ".join(differences[:5])
            raise NATSError(f"{path} is of another study: {key}: {detail}. Choose another --output")

    # -- runs ------------------------------------------------------------------------------------

    def _options(self, seed: int, folder: str, searching: bool) -> List[str]:
        opts = [*self.settings.opts, "SEED", str(seed), "OUTPUT_DIR", folder]
        if self.settings.folds:
            number, images = seed % self.settings.folds, self.settings.images
            fold = self.path("data", f"fold_{number}")
            names = {n: f"study_{number}_{n}" for n in os.listdir(fold)}
            register = [[v, os.path.join(fold, n), images] for n, v in names.items()]
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
            needed = [method.search for method in self.methods]
            searches = {n: self._search(n, seed) for n in ("path", "nats") if n in needed}
            trials: Dict[str, List[Task]] = {}  # shared by retrainings of several lengths
            for method in self.methods:
                if method.draws and method.kind not in trials:
                    trials[method.kind] = self._trials(method, seed)
                    tasks += trials[method.kind]
            tasks += searches.values()
            for method in self.methods:
                search = [searches[method.search]] if method.search else []
                after = [*search, *trials.get(method.kind, ())]
                tasks.append(self._retraining(method, seed, after))
        return tasks

    def _search(self, name: str, seed: int) -> Task:
        folder = self.folder(f"search-{name}", seed)
        opts = self._options(seed, folder, searching=True)
        if name == "path":
            opts += ["MODEL.NATS.NUM_GROUPS", "1", "MODEL.NATS.CHANNELS_PER_GROUP", "0"]
        command = self._command("search", self.settings.search_config, opts)
        return Task("search", folder, lambda: command)

    def _trials(self, method: Method, seed: int) -> List[Task]:
        """The short trainings of the draws that a random-best-of-K chooses from."""
        search, base = self._config(search=True), self._config()
        tasks = []
        for draw in range(method.draws):
            folder = trial_folder(self.folder(method.name, seed), method.kind, draw)

            def prepare(draw: int = draw, folder: str = folder) -> List[str]:
                config = os.path.join(folder, "retrain.yaml")
                write_config(export_config(base, drawn(search, seed, draw)), config)
                opts = self._options(seed, folder, searching=True)
                if self.settings.folds:  # the options name the training split already
                    opts += ["DATASETS.TEST", opts[opts.index("DATASETS.CALIBRATION") + 1]]
                else:
                    opts += trial_data(search)
                opts += trial_schedule(search, base, method.draws)
                return self._command("train", config, opts)

            tasks.append(Task("trial", folder, prepare))
        return tasks

    def _retraining(self, method: Method, seed: int, after: List[Task]) -> Task:
        folder = self.folder(method.name, seed)

        def prepare() -> List[str]:
            config = self.settings.config_file
            opts = self._options(seed, folder, searching=False)
            architecture = self.architecture(method, seed)
            if architecture is not None:
                config = os.path.join(folder, "retrain.yaml")
                write_config(export_config(self._config(), architecture), config)
            if method.warm:
                weights = os.path.join(folder, "frozen.pth")
                supernet = SearchFolder(after[0].folder).supernet
                write_weights(frozen_weights(*supernet, architecture), architecture, weights)
                opts += ["MODEL.WEIGHTS", weights]
            opts += self._schedule(method)
            return self._command("train", config, opts)

        return Task("retraining", folder, prepare, after)

    def _command(self, name: str, config: str, opts: List[str]) -> List[str]:
        module = f"{__package__.partition('.')[0]}.commands.{name}"
        gpus = str(self.settings.num_gpus)
        return ["-m", module, "--config-file", config, "--resume", "--num-gpus", gpus, *opts]

    def _schedule(self, method: Method) -> List[str]:
        """The retraining's schedule, stretched to the method's length."""
        solver, factor = self._config().SOLVER, method.length
        if factor is None:
            factor = 1 + self._config(search=True).SOLVER.MAX_ITER / solver.MAX_ITER
        steps = tuple(round(step * factor) for step in solver.STEPS)
        iterations = round(solver.MAX_ITER * factor)
        return ["SOLVER.MAX_ITER", str(iterations), "SOLVER.STEPS", repr(steps)]

    def architecture(self, method: Method, seed: int) -> Optional[Architecture]:
        """A method's architecture for a seed; None for the plain detector."""
        if method.name in self.settings.given:
            return Architecture.load(self.settings.given[method.name])
        if method.kind == "random":
            return random_architecture(self._config(search=True), seed)
        if method.kind == "cycle":
            return cycle_architecture(self._config(search=True))
        if method.kind == "sawtooth":
            return sawtooth_architecture(self._config(search=True))
        if method.draws:
            retraining = self.folder(method.name, seed)
            folders = [trial_folder(retraining, method.kind, i) for i in range(method.draws)]
            return drawn(self._config(search=True), seed, best(folders))
        if method.dilation:
            return uniform_architecture(self._config(search=True), method.dilation)
        if not method.search:
            return None
        order = "paper" if method.kind == "nats-paper" else "voted"
        search = SearchFolder(self.folder(f"search-{method.search}", seed))
        found = search.decode(order, method.margin or 0.0, method.at_most)
        return found.transposed() if method.kind == "transposed" else found

    def task(self, name: str, seed: int) -> Optional[Task]:
        """The run in :meth:`folder`; None if the study has none there."""
        folder = self.folder(name, seed)
        return next((task for task in self.tasks if task.folder == folder), None)
