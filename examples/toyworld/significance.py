"""What the rows of an experiment say: paired differences, their intervals, corrected p-values, seeds needed.

A row holds a digit for each question, 1 where it was answered rightly; arms of one seed saw the same questions, so
differences are taken question by question, seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval, in percent."""

    value: float
    low: float
    high: float
    seeds: int
    spread: float
    """Standard deviation over seeds; NaN for one."""
    p: float
    """Two-sided, of no difference, by the same bootstrap; NaN where nothing is compared."""


def hierarchical(values: np.ndarray, groups: np.ndarray, *, seed: int = 0, null: bool = True) -> Estimate:
    """Estimate the mean of (S, Q) values by a bootstrap over seeds and, within them, over images.

    `groups` (Q,) are the images that questions are about: questions of one image are drawn together. The drawn images
    are the same for all seeds of a draw, as they were the same in truth. With `null` the p-value is of a mean of 0:
    twice the smaller share of draws beyond 0, at least 2 / (draws + 1).
    """
    rng = np.random.default_rng(seed)
    images, members = np.unique(groups, return_inverse=True)
    sums = np.zeros((len(values), len(images)))
    for row, found in zip(sums, values, strict=True):
        np.add.at(row, members, found)
    counts = np.bincount(members, minlength=len(images)).astype(np.float64)
    draws = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        weights = np.bincount(rng.integers(len(images), size=len(images)), minlength=len(images))
        seeds = rng.integers(len(values), size=len(values))
        draws[number] = (sums[seeds] @ weights).mean() / (counts @ weights)
    low, high = np.percentile(draws, [2.5, 97.5])
    by_seed = values.mean(axis=1)
    spread = float(by_seed.std(ddof=1)) if len(values) > 1 else math.nan
    beyond = min(float((draws <= 0).sum()), float((draws >= 0).sum()))
    p = min(1.0, 2 * (beyond + 1) / (RESAMPLES + 1)) if null else math.nan
    return Estimate(100 * float(by_seed.mean()), 100 * float(low), 100 * float(high), len(values), 100 * spread, p)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values corrected for their number (Holm 1979): stepwise, never smaller than one before."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    found, largest = {}, 0.0
    for place, name in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - place) * p_values[name]))
        found[name] = largest
    return found


def seeds_needed(difference: float, spread: float, *, power: float = 0.8) -> float:
    """Return how many paired seeds show a difference at 5 % two-sided with that power, by the normal approximation.

    n = ((z₀.₉₇₅ + z_power) · spread / difference)², at least 2; infinite where there is no difference.
    """
    if not difference or math.isnan(spread):
        return math.inf
    z = {0.8: 0.8416, 0.9: 1.2816}[power]
    return max(2.0, math.ceil(((1.95996 + z) * spread / difference) ** 2))


def digits(rows: Sequence[str]) -> np.ndarray:
    """Return (S, Q) of 0 and 1 from rows of digits, all of one length."""
    return np.array([[int(digit) for digit in row] for row in rows], dtype=np.float64)


@dataclass(frozen=True)
class Correlation:
    """A rank correlation over students, with a 95 % interval by a bootstrap over them."""

    value: float
    low: float
    high: float
    students: int


def rank_correlation(x: np.ndarray, y: np.ndarray, given: np.ndarray | None = None, *, seed: int = 0) -> Correlation:
    """Return Spearman's correlation of (N,) with (N,); with `given` (N,) the partial one, of what its ranks leave over.

    Draws in which one of them has no two values are left out; NaN where x or y has none at all.
    """
    rng = np.random.default_rng(seed)
    draws = [rng.integers(len(x), size=len(x)) for _ in range(RESAMPLES)]
    found = np.array([_rank_correlation(x[d], y[d], given[d] if given is not None else None) for d in draws])
    value = _rank_correlation(x, y, given)
    found = found[~np.isnan(found)]
    low, high = np.percentile(found, [2.5, 97.5]) if len(found) else (math.nan, math.nan)
    return Correlation(value, float(low), float(high), len(x))


def _rank_correlation(x: np.ndarray, y: np.ndarray, given: np.ndarray | None) -> float:
    columns = [rankdata(one) for one in ((x, y) if given is None else (x, y, given))]
    ranks = [column - column.mean() for column in columns]
    if given is not None:
        *ranks, known = ranks
        if (known == 0).all():
            return math.nan
        ranks = [rank - known * (rank @ known) / (known @ known) for rank in ranks]
    first, second = ranks
    scale = math.sqrt(float(first @ first) * float(second @ second))
    return float(first @ second) / scale if scale > 1e-9 else math.nan
