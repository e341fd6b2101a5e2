"""What a search is to be compared with: architectures that cost no search, for as many images."""

import os
import shlex

from detectron2.config import CfgNode

from ..method.architecture import Architecture
from ..method.search_space import Dilation


def equal_iterations(
    search: CfgNode, retrain: CfgNode, alpha_steps: int, trained: bool = False
) -> int:
    """Iterations of `retrain` that see as many images as search and retraining together.

    They take less time, since a super-network computes more.

    Args:
        alpha_steps: of the search.
        trained: whether the search has trained its result, and no retraining follows.
    """
    images = search.SOLVER.MAX_ITER * search.SOLVER.IMS_PER_BATCH
    images += alpha_steps * (search.SEARCH.ALPHA_IMS_PER_BATCH or search.SOLVER.IMS_PER_BATCH)
    bought = images / retrain.SOLVER.IMS_PER_BATCH
    return round(bought if trained else retrain.SOLVER.MAX_ITER + bought)


def comparison_commands(
    search: CfgNode,
    retrain: CfgNode,
    architecture: Architecture,
    alpha_steps: int,
    trained: bool = False,
) -> str:
    """The commands that train what the search has to beat.

    Args:
        search: the search's config, for one process; its OUTPUT_DIR contains config.yaml.
        retrain: the plain config that the search wrote.
        architecture: what the search found.
        alpha_steps, trained: see :func:`equal_iterations`.

    Returns:
        Lines to log.
    """
    folder = search.OUTPUT_DIR
    iterations = equal_iterations(search, retrain, alpha_steps, trained)
    whole = "this run" if trained else "search and retraining together"
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
    lines = [
        "Compare it with architectures that need no search, trained on as many images as "
        f"{whole}, {iterations} iterations (which take less time):"
    ]
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
