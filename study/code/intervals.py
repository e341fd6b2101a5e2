"""Is a difference more than chance?"""

import math
from typing import Mapping, Sequence, Tuple

import numpy as np
from scipy import stats


def paired_interval(differences: Sequence[float]) -> Tuple[float, float]:
    """Mean of paired differences, and half the width of its 95 % interval (Student's t)."""
    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        return float(values.mean()), math.inf
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(values.mean()), float(half)


def detectable_difference(differences: Mapping[str, Sequence[float]]) -> float:
    """The true difference that a comparison of this size would find with 80 % probability.

    For a two-sided t-test at 5 %.

    Args:
        differences: method → paired differences; the methods' variances are averaged.
    """
    counts = [len(d) for d in differences.values()]
    if not counts or min(counts) < 2:
        return math.inf
    count = min(counts)
    deviation = np.mean([np.var(d, ddof=1) for d in differences.values()]) ** 0.5
    quantiles = stats.t.ppf(0.975, count - 1) + stats.t.ppf(0.8, count - 1)
    return float(quantiles * deviation / count**0.5)
