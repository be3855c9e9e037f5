"""The order of samples: a pure function of (seed, epoch, position), the same for any ranks and workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

_SHARDS, _ROWS, _LOOSE = range(3)


def epoch_order(shards: np.ndarray, *, seed: int, epoch: int, window: int) -> np.ndarray:
    """Return the samples (N,) int64 of one epoch in order; `shards` (N,) is each sample's shard, -1 for none.

    Shards are permuted; the samples of each `window` of consecutive shards are shuffled among themselves, so a loader
    needs few shards at a time. Samples without a shard (text alone) are permuted and spread evenly.

    Permutations are stable sorts of a bit generator's raw output, which numpy promises to keep for ever; its
    `Generator.permutation` may change between versions.
    """
    joined = np.flatnonzero(shards >= 0)
    loose = np.flatnonzero(shards < 0)
    numbers = np.unique(shards[joined])
    place = np.empty(len(numbers), dtype=np.int64)
    place[_permutation(len(numbers), seed, epoch, _SHARDS)] = np.arange(len(numbers))
    windows = place[np.searchsorted(numbers, shards[joined])] // window
    shuffled = joined[np.lexsort((_raw(len(joined), seed, epoch, _ROWS), windows))]
    loose = loose[_permutation(len(loose), seed, epoch, _LOOSE)]
    # sample i of a group of n stands at (i + ½)/n of the epoch
    where = np.concatenate([(np.arange(n) + 0.5) / max(n, 1) for n in (len(shuffled), len(loose))])
    merged: np.ndarray = np.concatenate([shuffled, loose])[np.argsort(where, kind="stable")]
    return merged


def group_by_modality(order: np.ndarray, loose: np.ndarray, *, first: int, batch: int) -> np.ndarray:
    """Reorder an epoch so that batches are of one modality; the order within each modality is kept.

    `loose` (N,) bool says of each sample whether it is text alone. `first` is the position of the run that the epoch
    begins at: batches lie at multiples of `batch`, so an epoch begins and ends inside one. Only these two and at most
    one other batch hold both modalities. Batches of text are spread evenly over the epoch.
    """
    shown, text = order[~loose[order]], order[loose[order]]
    lead = min(-first % batch, len(order))
    whole = (len(order) - lead) // batch
    texts = min(len(text) // batch, whole)
    pictures = min(len(shown) // batch, whole - texts)
    # the whole batches by kind; the one that is left, if any, is filled with what remains of both, like the ends
    counts = (pictures, texts, whole - texts - pictures)
    where = np.concatenate([(np.arange(n) + 0.5) / max(n, 1) for n in counts])
    kinds = np.repeat(np.arange(3), counts)[np.argsort(where, kind="stable")]
    rest = np.repeat((False, True), (len(shown) - pictures * batch, len(text) - texts * batch))
    is_text = np.empty(len(order), dtype=bool)
    slots = np.concatenate([np.full(lead, 2), np.repeat(kinds, batch)])
    slots = np.concatenate([slots, np.full(len(order) - len(slots), 2)])
    is_text[slots != 2] = slots[slots != 2] == 1
    is_text[slots == 2] = rest
    grouped = np.empty_like(order)
    grouped[is_text], grouped[~is_text] = text, shown
    return grouped


def cyclic_partners(rows: np.ndarray, *, seed: int) -> dict[int, int]:
    """Map each row to another one, each used once: the next of a permutation, so no row keeps its own."""
    unique = np.unique(rows)
    permuted = unique[_permutation(len(unique), seed, 0, _ROWS)]
    return dict(zip(permuted.tolist(), np.roll(permuted, -1).tolist(), strict=True))


def _raw(count: int, seed: int, epoch: int, purpose: int) -> np.ndarray:
    bits = np.random.PCG64(np.random.SeedSequence((seed, epoch, purpose)))
    raw: np.ndarray = bits.random_raw(count)
    return raw


def _permutation(count: int, seed: int, epoch: int, purpose: int) -> np.ndarray:
    return np.argsort(_raw(count, seed, epoch, purpose), kind="stable")


@dataclass(frozen=True)
class Span:
    """Positions [start, stop) of one step on one rank."""

    start: int
    stop: int


def rank_span(first: int, last: int, rank: int, world: int) -> Span:
    """Return the part of the global batch [first, last) that a rank takes: contiguous, sizes differ by one at most."""
    size = last - first
    return Span(first + size * rank // world, first + size * (rank + 1) // world)


class PositionSampler(Sampler[list[int]]):
    """Batches of global positions for one rank, from `start` to `end`, `batch` positions a step over all ranks.

    Position p is sample p mod N of epoch p div N. The last batch is short where `batch` does not divide the rest. A
    rank without a sample in a batch gets an empty list, so that all ranks take the same number of steps.
    """

    def __init__(self, *, start: int, end: int, batch: int, rank: int, world: int) -> None:
        self._start, self._end, self._batch = start, end, batch
        self._rank, self._world = rank, world

    def __len__(self) -> int:
        return -(-(self._end - self._start) // self._batch)

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(self._start, self._end, self._batch):
            span = rank_span(first, min(first + self._batch, self._end), self._rank, self._world)
            yield list(range(span.start, span.stop))
