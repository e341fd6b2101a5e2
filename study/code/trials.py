"""Short trainings that choose among several random architectures: what a search has to beat."""

import math
import os
from typing import List, Sequence

from detectron2.config import CfgNode

from ...errors import NATSError
from ...method.architecture import Architecture
from ..baselines import random_architecture
from .metrics import last_metric
from .runs import Task


def drawn(search: CfgNode, seed: int, draw: int) -> Architecture:
    """The draw of a study's seed, draw 0, 1, …; the first is that of the method `random`."""
    return random_architecture(search, seed + 1000 * draw)


def trial_schedule(search: CfgNode, retrain: CfgNode, draws: int) -> List[str]:
    """KEY VALUE pairs: the retraining's schedule, shrunk to one of `draws` parts of the search.

    Raises:
        NATSError: nothing would be left of it.
    """
    iterations = search.SOLVER.MAX_ITER // draws
    if not iterations:
        raise NATSError(
            f"random-best-of-{draws}: the search has only {search.SOLVER.MAX_ITER} iterations to "
            "share out"
        )
    factor = iterations / retrain.SOLVER.MAX_ITER
    steps = tuple(max(1, round(step * factor)) for step in retrain.SOLVER.STEPS)
    warmup = round(retrain.SOLVER.WARMUP_ITERS * min(1, factor))
    pairs = {"MAX_ITER": iterations, "STEPS": steps, "WARMUP_ITERS": warmup}
    return [word for key, value in pairs.items() for word in (f"SOLVER.{key}", repr(value))]


def trial_data(search: CfgNode) -> List[str]:
    """KEY VALUE pairs: train on the search's training split, test on its calibration split.

    Raises:
        NATSError: this is not one data set.
    """
    data = search.DATASETS
    if len(data.CALIBRATION) != 1:
        raise NATSError(
            f"DATASETS.CALIBRATION {list(data.CALIBRATION)}: random-best-of-K is chosen on one "
            "data set"
        )
    pairs = {"REGISTER": list(data.REGISTER), "TRAIN": tuple(data.TRAIN)}
    pairs["TEST"] = tuple(data.CALIBRATION)
    return [word for key, value in pairs.items() for word in (f"DATASETS.{key}", repr(value))]


def best(folders: Sequence[str]) -> int:
    """Which trial has the highest AP; of equal ones the first. No detections are the lowest AP."""
    precision = [last_metric(folder, "bbox/AP") for folder in folders]
    return max(range(len(folders)), key=lambda i: (not math.isnan(precision[i]), precision[i], -i))


def trials_of(task: Task) -> List[Task]:
    """The trials that a retraining waits for: their time counts as its own."""
    return [other for other in task.after if other.role == "trial"]


def trial_folder(retraining: str, kind: str, draw: int) -> str:
    """The OUTPUT_DIR of a trial, beside that of the retraining, whatever the latter's length."""
    return os.path.join(os.path.dirname(retraining), f"{kind}-draw-{draw}")
