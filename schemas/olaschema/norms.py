"""How long tokens are: a histogram whose bins are fixed for ever, so that shards merge exactly."""

from __future__ import annotations

from typing import Any

import numpy as np

BINS_PER_OCTAVE = 8
_BLOCK = 64
_PER_SQUARE = BINS_PER_OCTAVE // 2
# 2^(1/4), 2^(2/4), 2^(3/4) as written here, not as some library's power function returns them
_WITHIN = np.asarray([1.189207115002721, 1.4142135623730951, 1.681792830507429])


def squared_norms(features: np.ndarray) -> np.ndarray:
    """Return the squared Euclidean norms of tokens `(N, C)` as float64 `(N,)`."""
    found = np.empty(len(features))
    for first in range(0, len(features), _BLOCK):  # squares of a few tokens stay in the cache: twice as fast
        part = features[first : first + _BLOCK]
        found[first : first + _BLOCK] = np.square(part, dtype=np.float64).sum(axis=1)
    return found


def edges(first: int, bins: int) -> np.ndarray:
    """Return the `bins + 1` norms between which bins lie, from the lower edge of bin `first` on."""
    return np.asarray(2.0 ** (np.arange(first, first + bins + 1) / BINS_PER_OCTAVE))


class NormHistogram:
    """Counts of token norms in bins of an eighth of an octave: bin k holds 2^(k/8) ≤ norm < 2^((k+1)/8).

    Tokens that are zero in every channel have no bin and are counted apart.
    """

    def __init__(self) -> None:
        self.zero = 0
        self.first = 0
        """Number of the first bin in `counts`."""
        self.counts = np.zeros(0, dtype=np.int64)

    @property
    def total(self) -> int:
        """Number of tokens."""
        return self.zero + int(self.counts.sum())

    def update(self, squares: np.ndarray) -> None:
        """Add tokens by their squared norms `(N,)` float64, finite and not negative.

        The bin follows from exponent and fraction of the square by comparison alone, so every machine finds the same.
        """
        other = NormHistogram()
        positive = squares[squares > 0]
        other.zero = len(squares) - len(positive)
        if len(positive):
            fraction, exponent = np.frexp(positive)
            bins = _PER_SQUARE * (exponent.astype(np.int64) - 1)
            bins += np.searchsorted(_WITHIN, 2 * fraction, side="right")
            other.first = int(bins.min())
            other.counts = np.bincount(bins - other.first)
        self.merge(other)

    def merge(self, other: NormHistogram) -> None:
        """Add the tokens of another histogram."""
        self.zero += other.zero
        if not len(other.counts):
            return
        if not len(self.counts):
            self.first, self.counts = other.first, other.counts.copy()
            return
        first = min(self.first, other.first)
        last = max(self.first + len(self.counts), other.first + len(other.counts))
        self.counts = self.spread(first, last - first) + other.spread(first, last - first)
        self.first = first

    def spread(self, first: int, bins: int) -> np.ndarray:
        """Return the counts of `bins` bins from number `first` on, which must include all that are not empty."""
        out = np.zeros(bins, dtype=np.int64)
        start = self.first - first
        out[start : start + len(self.counts)] = self.counts
        return out

    def quantile(self, share: float) -> float:
        """Return the norm below which about `share` of the tokens lie: the geometric middle of its bin.

        0 where that many are zero. Raises ValueError where there are no tokens.
        """
        if not self.total:
            raise ValueError("no tokens were counted")
        wanted = share * self.total
        if wanted <= self.zero or not len(self.counts):
            return 0.0
        place = int(np.searchsorted(self.zero + np.cumsum(self.counts), wanted))
        return float(2.0 ** ((self.first + min(place, len(self.counts) - 1) + 0.5) / BINS_PER_OCTAVE))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON form without empty bins at either end."""
        return {"zero": self.zero, "first": self.first, "counts": self.counts.tolist()}

    @classmethod
    def from_json(cls, data: Any) -> NormHistogram:
        """Rebuild from `to_json`; raises ValueError where it is none."""
        found = cls()
        if not isinstance(data, dict) or set(data) != {"zero", "first", "counts"}:
            raise ValueError("a histogram of norms is {zero, first, counts}")
        counts = data["counts"]
        numbers = [data["zero"], data["first"], *(counts if isinstance(counts, list) else [None])]
        if not all(type(number) is int for number in numbers) or data["zero"] < 0 or min(counts, default=0) < 0:
            raise ValueError("a histogram of norms holds whole numbers that are not negative")
        found.zero, found.first, found.counts = data["zero"], data["first"], np.asarray(counts, dtype=np.int64)
        return found
