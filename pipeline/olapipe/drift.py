"""Shards that differ from the rest of their teacher, and channels that say nothing: from the receipts' statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from olaschema.manifest import ChannelStatistics
from olaschema.norms import NormHistogram

FEWEST_SHARDS = 5
"""With fewer shards there is no rest that one of them could stand out from."""
UNUSUAL = 6.0
"""Modified z-score above which a shard is flagged. Iglewicz and Hoaglin (1993) take 3.5 for a normal sample of dozens;
there may be thousands of shards here, with heavier tails."""
SMALLEST_SHIFT = 0.1
SMALLEST_DIVERGENCE = 0.01
"""Below these a shard is not flagged however alike the others are."""
NEAR_CONSTANT = 1e-3
_CLIP = 10.0


@dataclass(frozen=True)
class ShardStatistics:
    """What one shard's receipt says of the values of its `images` features."""

    shard: int
    images: int
    statistics: ChannelStatistics


@dataclass(frozen=True)
class ShardDrift:
    """How one shard differs from all others.

    `shift` is the root mean square over channels of (mean of the shard − mean of the rest) / standard deviation of the
    rest, each clipped to ±10; `channel` has the largest. `divergence` is the Jensen–Shannon divergence, in bits, of the
    two histograms of token norms; None where a receipt has none. `shift_z` and `divergence_z` are their modified
    z-scores among the shards; None where there are too few.
    """

    shard: int
    images: int
    shift: float
    channel: int
    divergence: float | None
    shift_z: float | None
    divergence_z: float | None

    @property
    def flagged(self) -> bool:
        """Whether the shard stands out."""
        by_shift = self.shift_z is not None and self.shift_z > UNUSUAL and self.shift > SMALLEST_SHIFT
        by_norms = (
            self.divergence is not None
            and self.divergence_z is not None
            and self.divergence_z > UNUSUAL
            and self.divergence > SMALLEST_DIVERGENCE
        )
        return by_shift or by_norms


def drifts(shards: Sequence[ShardStatistics]) -> list[ShardDrift]:
    """Compare each shard with the rest; empty where there is only one.

    Means of few images vary more than means of many, as one over their number. So a shift is compared among shards
    after a factor √(n·m/(n + m)), and a divergence after a factor n·m/(n + m), for n images against m others: both then
    have the same spread for a short last shard as for the others.
    """
    if len(shards) < 2:
        return []
    total = ChannelStatistics(len(shards[0].statistics.mean))
    for shard in shards:
        total.merge(shard.statistics)
    images = sum(shard.images for shard in shards)
    shifts, channels, divergences, weights = [], [], [], []
    for shard in shards:
        shift, channel = _shift(shard.statistics, total)
        shifts.append(shift)
        channels.append(channel)
        divergences.append(_divergence(shard.statistics.norms, total.norms))
        weights.append(shard.images * (images - shard.images) / images)
    shift_z = _modified_z(np.asarray(shifts) * np.sqrt(weights))
    told = all(divergence is not None for divergence in divergences)
    known = np.asarray([divergence or 0.0 for divergence in divergences])
    divergence_z = _modified_z(known * np.asarray(weights)) if told else [None] * len(shards)
    return [
        ShardDrift(shard.shard, shard.images, shift, channel, divergence, a, b)
        for shard, shift, channel, divergence, a, b in zip(
            shards, shifts, channels, divergences, shift_z, divergence_z, strict=True
        )
    ]


def _shift(part: ChannelStatistics, total: ChannelStatistics) -> tuple[float, int]:
    rest = total.count - part.count
    mean = (total.count * total.mean - part.count * part.mean) / rest
    between = np.square(part.mean - mean) * (part.count * rest / total.count)
    variance = np.maximum(total.m2 - part.m2 - between, 0.0) / rest
    difference = part.mean - mean
    # what is left of a constant channel after these subtractions is rounding
    same = np.abs(difference) <= 1e-9 * (np.abs(mean) + np.abs(part.mean))
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.where(same, 0.0, np.clip(difference / np.sqrt(variance), -_CLIP, _CLIP))
    return float(np.sqrt(np.square(scaled).mean())), int(np.abs(scaled).argmax())


def _divergence(part: NormHistogram, total: NormHistogram) -> float | None:
    if not 0 < part.total < total.total:
        return None
    p = np.append(part.spread(total.first, len(total.counts)), part.zero).astype(np.float64)
    q = np.append(total.counts, total.zero) - p
    p, q = p / p.sum(), q / q.sum()
    return float((_entropy_bits((p + q) / 2) - (_entropy_bits(p) + _entropy_bits(q)) / 2).clip(0.0, 1.0))


def _entropy_bits(p: np.ndarray) -> np.float64:
    positive = p[p > 0]
    return np.float64(-(positive * np.log2(positive)).sum())


def _modified_z(values: np.ndarray) -> list[float | None]:
    """Return 0.6745 · (x − median) / MAD; the MAD is taken as a twentieth of the median at least."""
    if len(values) < FEWEST_SHARDS:
        return [None] * len(values)
    median = float(np.median(values))
    spread = max(float(np.median(np.abs(values - median))), median / 20, 1e-12)
    return [float(0.6745 * (value - median) / spread) for value in values]


@dataclass(frozen=True)
class Channels:
    """Channels that can teach nothing, by number."""

    dead: list[int]
    """The same value everywhere."""
    near_constant: list[int]
    """Not dead, with a standard deviation within 1e-3 of their own root mean square, or of the median channel's."""


def dull_channels(statistics: ChannelStatistics) -> Channels:
    """Name the dead and nearly constant channels of a teacher."""
    std = np.sqrt(statistics.variance)
    dead = statistics.minimum == statistics.maximum
    own = np.sqrt(np.square(statistics.mean) + statistics.variance)
    near = std <= NEAR_CONSTANT * np.maximum(own, np.median(std))
    return Channels(np.flatnonzero(dead).tolist(), np.flatnonzero(near & ~dead).tolist())
