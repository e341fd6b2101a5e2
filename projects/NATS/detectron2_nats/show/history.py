"""What a run has logged: the history of α, and its last evaluation."""

import json
import math
import os
import re
from typing import Any, Dict, Mapping

from ..errors import NATSError
from ..method.search_space import Dilation


def read_metrics(path: str) -> Dict[int, Dict[str, float]]:
    """Iteration → what a run's ``metrics.json`` says of it; nothing if there is no such file."""
    lines: Dict[int, Dict[str, float]] = {}
    if os.path.isfile(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    values = json.loads(line)
                    # a resumed run logs some iterations again: the last line counts
                    lines.setdefault(int(values["iteration"]), {}).update(values)
                except (KeyError, TypeError, ValueError):
                    continue  # the run was killed while it wrote this line
    return dict(sorted(lines.items()))


def read_history(path: str) -> Dict[str, Any]:
    """α's history in a search's ``metrics.json``.

    Returns:
        "iteration", "entropy" (share of its maximum), "leading" (share of the groups),
        "total_loss" and "alpha_loss" (of both kinds of step; NaN before the first α step): lists
        over the lines of the log. "intensity": dilation → such a list, the share of the votes, mean
        over all layers.

    Raises:
        NATSError: it contains no values of α.
    """
    lines = {i: v for i, v in read_metrics(path).items() if "alpha/entropy" in v}
    if not lines:
        raise NATSError(f"{path}: contains no history of α: is it the file of a search?")
    keys = {"entropy": "alpha/entropy", "leading": "alpha/leading"}
    keys |= {"total_loss": "total_loss", "alpha_loss": "alpha/total_loss"}
    history: Dict[str, Any] = {"iteration": list(lines)}
    for name, key in keys.items():
        history[name] = [values.get(key, math.nan) for values in lines.values()]
    per_line = [_overall_intensity(values) for values in lines.values()]
    dilations = sorted({dilation for shares in per_line for dilation in shares})
    history["intensity"] = {d: [shares.get(d, 0.0) for shares in per_line] for d in dilations}
    return history


def _overall_intensity(values: Mapping[str, float]) -> Dict[Dilation, float]:
    """Each genotype's intensity, mean over the layers; 0 in a layer without this genotype."""
    layers, sums = set(), {}
    for key, share in values.items():
        if key.startswith("intensity/"):
            _, layer, name = key.split("/")
            layers.add(layer)
            dilation = tuple(int(d) for d in name.split("x"))
            sums[dilation] = sums.get(dilation, 0.0) + share
    return {dilation: total / len(layers) for dilation, total in sums.items()}


def last_precision(path: str) -> str:
    """The last evaluation in a run's ``metrics.json``: "bbox/AP 41.2, …"; "" if there is none."""
    evaluations = [v for v in read_metrics(path).values() if any("/AP" in key for key in v)]
    last = evaluations[-1].items() if evaluations else ()
    return ", ".join(f"{key} {value:.1f}" for key, value in last if re.search(r"/AP\d*$", key))
