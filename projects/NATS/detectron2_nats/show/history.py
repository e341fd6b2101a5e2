"""What a run has logged: the history of α, and its last evaluation."""

import json
import math
import os
import re
from typing import Any, Dict, Mapping

from ..errors import NATSError
from ..method.search_space import Dilation


def read_history(path: str) -> Dict[str, Any]:
    """α's history in a search's ``metrics.json``.

    Returns:
        "iteration", "entropy" (share of its maximum), "leading" (share of the groups) and
        "votes_changed": lists over the lines of the log. "intensity": dilation → such a list, the
        share of the votes, mean over all layers.

    Raises:
        NATSError: the file is missing, or contains no values of α.
    """
    lines: Dict[int, Dict[str, float]] = {}
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                try:
                    values = json.loads(line)
                except ValueError:
                    continue  # the search was killed while it wrote this line
                if isinstance(values, dict) and "alpha/entropy" in values:
                    # a resumed search logs some iterations again: the last line counts
                    lines[int(values["iteration"])] = values
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a UTF-8 text file"
        raise NATSError(f"{path}: cannot be read: {reason}") from None
    if not lines:
        raise NATSError(f"{path}: contains no history of α: is it the file of a search?")
    history: Dict[str, Any] = {"iteration": sorted(lines)}
    ordered = [lines[iteration] for iteration in history["iteration"]]
    for key in ("entropy", "leading", "votes_changed"):
        history[key] = [values.get(f"alpha/{key}", math.nan) for values in ordered]
    per_line = [_overall_intensity(values) for values in ordered]
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


def last_metrics(path: str) -> str:
    """The last evaluation in a run's ``metrics.json``, as text; nothing if there is none."""
    last: Dict[str, float] = {}
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            for line in file:
                if "/AP" in line:
                    last = json.loads(line)
    found = [f"{key} {value:.1f}" for key, value in last.items() if re.search(r"/AP\d*$", key)]
    return ", ".join(found)
