"""What the rows of an experiment say: paired differences, their intervals, corrected p-values, seeds needed.

A row holds a digit for each question, 1 where it was answered rightly; arms of one seed saw the same questions, so
differences are taken question by question, seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata, t

RESAMPLES = 2000
_FEWEST_FOR_SPREAD = 5


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval, in percent."""

    value: float
    low: float
    high: float
    seeds: int
    spread: float
    """Standard deviation over seeds; NaN for one."""
    error: float
    """Standard error, in percent."""
    p: float
    """Two-sided, of a mean of 0."""


def hierarchical(values: np.ndarray, groups: np.ndarray, *, seed: int = 0) -> Estimate:
    """Estimate the mean of (S, Q) values, with the standard error of a bootstrap over seeds and over images.

    `groups` (Q,) are the images that questions are about: questions of one image are drawn together. The drawn images
    are the same for all seeds of a draw, as they were the same in truth. Drawing S of S seeds makes their part of the
    variance s²/S too small by s²/S², which is added. Interval and p-value are of Student's t with Satterthwaite's
    degrees of freedom, of which the seeds' part has S − 1: percentiles of the draws themselves cover a true value in
    58 of 100 cases where there are two seeds. One seed has an interval over images alone.
    """
    rng = np.random.default_rng(seed)
    images, members = np.unique(groups, return_inverse=True)
    sums = np.zeros((len(values), len(images)))
    for row, found in zip(sums, values, strict=True):
        np.add.at(row, members, found)
    counts = np.bincount(members, minlength=len(images)).astype(np.float64)
    # how often each image and each seed is drawn: (draws, I) and (draws, S)
    drawn = rng.multinomial(len(images), np.full(len(images), 1 / len(images)), size=RESAMPLES)
    seeds = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=RESAMPLES)
    draws = ((seeds / len(values)) @ sums * drawn).sum(axis=1) / (drawn @ counts)
    by_seed = values.mean(axis=1)
    mean, count = float(by_seed.mean()), len(values)
    spread = float(by_seed.std(ddof=1)) if count > 1 else math.nan
    variance, of_seeds, freedom = float(draws.var()), 0.0, math.inf
    if count > 1:
        of_seeds = spread**2 / count
        variance += of_seeds / count
    if of_seeds > 1e-18:
        freedom = variance**2 / (of_seeds**2 / (count - 1))
    error = math.sqrt(variance)
    reach = float(t.ppf(0.975, freedom)) * error
    p = 2 * float(t.sf(abs(mean) / error, freedom)) if error > 1e-9 else float(abs(mean) < 1e-9)
    return Estimate(100 * mean, 100 * (mean - reach), 100 * (mean + reach), count, 100 * spread, 100 * error, p)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values corrected for their number (Holm 1979): stepwise, never smaller than one before."""
    ordered = sorted(p_values, key=lambda name: p_values[name])
    found, largest = {}, 0.0
    for place, name in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - place) * p_values[name]))
        found[name] = largest
    return found


def seeds_needed(found: Estimate) -> float:
    """Return how many paired seeds show a difference like this at 5 % two-sided with a power of 80 %, normally.

    n = s² / ((difference / 2.8016)² − v), at least 2; v is what the images contribute to the squared error, which more
    seeds do not take away: infinite where that alone hides the difference. NaN for fewer than five seeds, whose spread
    says little.
    """
    if found.seeds < _FEWEST_FOR_SPREAD:
        return math.nan
    of_images = max(0.0, found.error**2 - found.spread**2 / found.seeds)
    left = (found.value / (1.95996 + 0.8416)) ** 2 - of_images
    return max(2.0, math.ceil(found.spread**2 / left)) if left > 0 else math.inf


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


def rank_correlation(
    x: np.ndarray,
    y: np.ndarray,
    given: np.ndarray | None = None,
    *,
    minus: np.ndarray | None = None,
    groups: Sequence[Any] | None = None,
    seed: int = 0,
) -> Correlation:
    """Return Spearman's correlation of (N,) with (N,); with `given` (N,) the partial one, of what its ranks leave over.

    With `minus` (N,) it is the difference of x's correlations with y and with that. The bootstrap draws whole `groups`
    (N,), students of one tower for example; without them one by one. Draws in which one of them has no two values are
    left out; NaN where x or y has none at all.
    """
    rng = np.random.default_rng(seed)
    names = list(range(len(x))) if groups is None else list(groups)
    members = [np.array([n for n, name in enumerate(names) if name == one]) for one in dict.fromkeys(names)]

    def of(chosen: np.ndarray) -> float:
        known = given[chosen] if given is not None else None
        found = _rank_correlation(x[chosen], y[chosen], known)
        return found if minus is None else found - _rank_correlation(x[chosen], minus[chosen], known)

    draws = (rng.integers(len(members), size=len(members)) for _ in range(RESAMPLES))
    found = np.array([of(np.concatenate([members[int(one)] for one in draw])) for draw in draws])
    found = found[~np.isnan(found)]
    low, high = np.percentile(found, [2.5, 97.5]) if len(found) else (math.nan, math.nan)
    return Correlation(of(np.arange(len(x))), float(low), float(high), len(x))


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
