"""The tables of a study."""

import json
import math
import os
import statistics
from typing import Any, Dict, List, Optional

import numpy as np
from tabulate import tabulate

from ...files import write_atomically
from ...method.architecture import Architecture
from .. import pictures
from ..baselines import agreement, dilation_shares
from .intervals import detectable_difference, paired_interval
from .methods import Method


def write_tables(results: Dict[str, Any], folder: str) -> str:
    """Write study.md, study.png and results.json from what :func:`.collect.collect` returns."""
    methods, seeds = results["methods"], results["seeds"]
    ap = {name: result["AP"] for name, result in methods.items()}
    first = next(iter(ap))
    baselines = (m for m in ap if Method.of(m).kind in ("plain", "random") and m != "plain")
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
    pictures.save(pictures.plot_study(ap, f"{len(seeds)} seeds"), folder, "study", ["png"])
    return text


def _detectable_line(reference: str, differences: Dict[str, List[float]]) -> List[str]:
    detectable = detectable_difference(differences)
    if detectable == math.inf:  # one seed
        return []
    line = f"A true difference of {detectable:.1f} AP to {reference} would be found with "
    return [line + "80 % probability (two-sided test at 5 %).", ""]


def _search_table(searches: Dict[str, Any]) -> List[str]:
    """Have the searches decided, and do they agree?"""
    rows = []
    for name, search in searches.items():
        found = [Architecture.from_config(value, None) for value in search["architectures"]]
        shares = dilation_shares(found)
        row = [name, _mean_and_deviation(search["entropy"], 2)]
        row.append(f"{statistics.mean(search['leading']):.0%}")
        row.append(", ".join(f"{h}×{w} {s:.0%}" for (h, w), s in shares.items() if s >= 0.01))
        if len(found) > 1:
            row += [f"{share:.0%}" for share in agreement(found)]
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
    # a method that detects nothing has no AP of any class
    found = [result.get("classes", {}) for result in methods.values()]
    classes = [name for name in found[0] if all(name in others for others in found)]
    if len(classes) < 2:
        return []
    rows = [
        # NaN where a fold has no box of the class
        [method, *(f"{np.nanmean(result['classes'][name]):.1f}" for name in classes)]
        for method, result in methods.items()
    ]
    return [_table(rows, ["AP of each class", *classes]), ""]


def _table(rows: List[List[str]], headers: List[str]) -> str:
    align = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(rows, headers, "pipe", disable_numparse=True, colalign=align)


def _interval(differences: Optional[List[float]]) -> str:
    if not differences:
        return "—"
    mean, half = paired_interval(differences)
    if half == math.inf:
        return f"{mean:+.1f}"
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"


def _mean_and_deviation(values: List[float], digits: int = 1) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"
