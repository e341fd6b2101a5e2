"""What a search is to be compared with: architectures that cost no search, at equal time."""

import os
import shlex
import statistics
from typing import List, Optional

from detectron2.config import CfgNode

from ..method.architecture import Architecture
from ..method.search_space import Dilation


class StepTimes:
    """What the steps of a search take, in seconds. A resumed search knows those since its start."""

    def __init__(self) -> None:
        self._weight: List[float] = []
        self._alpha: List[float] = []

    def add(self, weight: float, alpha: Optional[float] = None) -> None:
        """One iteration: its weight step and, if it had one, its α step."""
        self._weight.append(weight)
        if alpha is not None:
            self._alpha.append(alpha)

    def in_weight_steps(self, max_iter: int, alpha_steps: int) -> Optional[float]:
        """How many weight steps take as long as the whole run; None if nothing was measured."""
        if not self._weight or not self._alpha:
            return None
        # medians: the first steps, and those beside a checkpoint, take longer
        ratio = statistics.median(self._alpha) / statistics.median(self._weight)
        return max_iter + ratio * alpha_steps


def equal_time_iterations(
    search: CfgNode, retrain: CfgNode, steps: float, trained: bool = False
) -> int:
    """Iterations of `retrain` that take as long as search and retraining together.

    A training step is taken to cost what the search's weight step costs for the same images. It
    costs less, since a super-network computes more: the result is a lower bound.

    Args:
        steps: the search's length in its own weight steps (:class:`StepTimes`).
        trained: whether the search has trained its result, and no retraining follows.
    """
    bought = steps * search.SOLVER.IMS_PER_BATCH / retrain.SOLVER.IMS_PER_BATCH
    return round(bought if trained else retrain.SOLVER.MAX_ITER + bought)


def comparison_commands(
    search: CfgNode,
    retrain: CfgNode,
    architecture: Architecture,
    steps: Optional[float],
    trained: bool = False,
) -> str:
    """The commands that train what the search has to beat.

    Args:
        search: the search's config, for one process; its OUTPUT_DIR contains config.yaml.
        retrain: the plain config that the search wrote.
        architecture: what the search found.
        steps, trained: see :func:`equal_time_iterations`; steps are None if unknown.

    Returns:
        Lines to log.
    """
    folder, schedule = search.OUTPUT_DIR, []
    length = "for as long as the retraining (the search's time was not measured here)"
    if steps is not None:
        iterations = equal_time_iterations(search, retrain, steps, trained)
        took = "this run took" if trained else "search and retraining take together"
        length = (
            f"for as long as {took}, {iterations} iterations (a lower bound: a super-network's "
            "step is counted as one of training)"
        )
        schedule = ["SOLVER.MAX_ITER", str(iterations)]
        if retrain.SOLVER.STEPS and retrain.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
            factor = iterations / retrain.SOLVER.MAX_ITER
            stretched = tuple(round(step * factor) for step in retrain.SOLVER.STEPS)
            schedule += ["SOLVER.STEPS", repr(stretched)]
    if trained:  # on the images of both splits
        both = (*search.DATASETS.TRAIN, *search.DATASETS.CALIBRATION)
        schedule += ["DATASETS.TRAIN", repr(both)]
    d_h, d_w = most_frequent(architecture)
    drawn = {"random": ["--random"], "uniform": ["--uniform", f"{d_h}x{d_w}"]}
    lines = [f"Compare it with architectures that need no search, trained {length}:"]
    for name, options in drawn.items():
        output = os.path.join(folder, name)
        config = ["--config-file", os.path.join(folder, "config.yaml")]
        retraining = ["--config-file", os.path.join(output, "retrain.yaml"), *schedule]
        lines.append("  " + shlex.join(["nats-draw", *config, *options, "--output", output]))
        lines.append("  " + shlex.join(["python", "train_net.py", *retraining]))
    return "\n".join(lines)


def most_frequent(architecture: Architecture) -> Dilation:
    """The dilation of most channels that left (1, 1); that where none did."""
    return next((d for d in architecture.shares() if d != (1, 1)), (1, 1))
