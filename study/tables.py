"""The tables of a study, from its results.

    python study/tables.py study/results/bars_lying.json

prints the tables of a results.json once more.
"""

import itertools
import json
import math
import operator
import re
import statistics
import sys
from collections import Counter
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
from scipy import stats
from tabulate import tabulate

from detectron2_nats import Architecture

REFERENCE = re.compile(r"(plain|random|path-random)(-[\d.]+x)?")
"""Names of methods with which all others are compared, beside the first."""


def paired_interval(differences: Sequence[float]) -> Tuple[float, float]:
    """Mean of paired differences, and half the width of its 95 % interval (Student's t)."""
    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        return float(values.mean()), math.inf
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(values.mean()), float(half)


def agreement(architectures: Sequence[Architecture]) -> Tuple[float, float]:
    """How many channels have the same dilation in two searches, mean over layers and pairs.

    Returns:
        The share of channels, and the share expected by chance if each layer keeps its number of
        channels per dilation. If both are equal, the searches agree on nothing but these numbers.
    """
    seen, chance = [], []
    for one, other in itertools.combinations(architectures, 2):
        for name in one.layers:
            a, b = _per_channel(one.layers[name]), _per_channel(other.layers[name])
            seen.append(sum(map(operator.eq, a, b)) / len(a))
            counts = Counter(a), Counter(b)
            chance.append(sum(counts[0][d] * counts[1][d] for d in counts[0]) / len(a) ** 2)
    return statistics.mean(seen), statistics.mean(chance)


def _per_channel(segments: Sequence[Sequence[int]]) -> List[Tuple[int, ...]]:
    return [tuple(dilation) for channels, *dilation in segments for _ in range(channels)]


def tables(results: Dict[str, Any]) -> str:
    """The Markdown tables of a results.json."""
    methods, seeds = results["methods"], results["seeds"]
    ap = {name: result["AP"] for name, result in methods.items()}
    references = dict.fromkeys([next(iter(ap)), *filter(REFERENCE.fullmatch, ap)])
    differences = {
        r: {m: [a - b for a, b in zip(ap[m], ap[r])] for m in ap if m != r} for r in references
    }
    rows = []
    for method, result in methods.items():
        row = {"": method}
        row.update({name: _mean_and_deviation(result[name]) for name in ("AP", "AP50", "AP75")})
        for reference in references:
            row[f"AP − {reference} [95 %]"] = _interval(differences[reference].get(method))
        row["parameters"] = f"{result['parameters']:,}"
        row["GFLOPs"] = f"{result['flops'] / 1e9:.3g}"
        row["backbone time"] = f"{result['time_ratio']:.3f}×" if result["time_ratio"] else "—"
        row["training, CPU min"] = _minutes(result)
        rows.append(row)
    of_each_seed = [[m, *(f"{value:.1f}" for value in ap[m])] for m in ap]
    parts = [
        f"{len(seeds)} seeds; mean ± standard deviation over them, differences paired by seed.",
        _table([list(row.values()) for row in rows], list(rows[0])),
        _table(of_each_seed, ["AP", *(f"seed {seed}" for seed in seeds)]),
        _class_table(methods),
        _search_table(results["searches"]),
    ]
    return "\n\n".join(filter(None, parts))


def _search_table(searches: Mapping[str, Any]) -> str:
    """Have the searches decided, and do they agree?"""
    rows = []
    for name, search in searches.items():
        architectures = [Architecture.from_config(value) for value in search["architectures"]]
        shares: Counter = Counter()
        for architecture in architectures:
            shares.update({d: s / len(architectures) for d, s in architecture.shares().items()})
        row = [name, _mean_and_deviation(search["entropy"], 2)]
        row.append(f"{statistics.mean(search['leading']):.0%}")
        frequent = [(d, share) for d, share in shares.most_common() if share >= 0.01]
        row.append(", ".join(f"{h}×{w} {share:.0%}" for (h, w), share in frequent))
        if len(architectures) > 1:
            row += [f"{share:.0%}" for share in agreement(architectures)]
        row.append(_minutes(search))
        rows.append(row)
    if not rows:
        return ""
    headers = ["search", "entropy of α", "groups that lead", "channels per dilation"]
    headers += ["agreement of seeds", "by chance"][: len(rows[0]) - 5]
    return _table(rows, [*headers, "CPU min"])


def _class_table(methods: Mapping[str, Any]) -> str:
    """Which classes gain, and which pay for it? Means over the seeds."""
    # a method that detects nothing has no AP of any class
    measured = [result.get("classes", {}) for result in methods.values()]
    classes = [name for name in measured[0] if all(name in other for other in measured)]
    if len(classes) < 2:
        return ""
    rows = [  # NaN where a fold has no box of the class
        [method, *(f"{np.nanmean(result['classes'][name]):.1f}" for name in classes)]
        for method, result in methods.items()
    ]
    return _table(rows, ["AP of each class", *classes])


def _table(rows: List[List[str]], headers: List[str]) -> str:
    align = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(rows, headers, "pipe", disable_numparse=True, colalign=align)


def _interval(differences: Optional[Sequence[float]]) -> str:
    if not differences:
        return "—"
    mean, half = paired_interval(differences)
    if half == math.inf:
        return f"{mean:+.1f}"
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"


def _mean_and_deviation(values: Sequence[float], digits: int = 1) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def _minutes(result: Mapping[str, Any]) -> str:
    """CPU minutes, mean over the seeds."""
    return f"{statistics.mean(result['cpu_seconds']) / 60:.1f}"


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        print(tables(json.load(file)))
