"""Averages with their spread, and exact paired tests over tasks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from fvg_adapter.errors import FVGError

EXACT = 20
"""Tasks up to which all sign patterns are looked at."""


def average(by_task: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """Mean over tasks and seeds, and the standard deviation (n − 1) over seeds of the average over tasks.

    Args:
        by_task: {task: [a value a seed]}, as many seeds for every task.

    >>> average({"a": [1.0, 3.0], "b": [5.0, 7.0]})
    (4.0, 1.4142135623730951)
    """
    per_seed = [statistics.fmean(values) for values in zip(*by_task.values(), strict=True)]
    return statistics.fmean(per_seed), statistics.stdev(per_seed) if len(per_seed) > 1 else 0.0


def paired(one: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> tuple[float, float, float, int]:
    """Mean and standard deviation over tasks of the difference (seeds averaged), sign-flip p, and tasks above 0.

    >>> paired({"a": [3.0], "b": [2.0]}, {"a": [1.0], "b": [1.0]})
    (1.5, 0.7071067811865476, 0.5, 2)
    """
    differences = [statistics.fmean(one[t]) - statistics.fmean(other[t]) for t in one]
    return (
        statistics.fmean(differences),
        statistics.stdev(differences) if len(differences) > 1 else 0.0,
        sign_flip(differences),
        sum(d > 0 for d in differences),
    )


def sign_flip(differences: Sequence[float]) -> float:
    """Exact two-sided p: the share of all sign patterns whose sum is at least as far from 0.

    Raises:
        FVGError: more than `EXACT` differences.

    >>> sign_flip([1.0, 1.0, 1.0])
    0.25
    """
    if len(differences) > EXACT:
        raise FVGError(f"{len(differences)} tasks have too many sign patterns for an exact test; at most {EXACT}.")
    observed = abs(sum(differences)) - 1e-12
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    return float((np.abs(sums) >= observed).mean())
