"""Sorting more records than memory holds: sorted runs on disk, merged block by block."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np


class ExternalSort:
    """Records of `width` bytes, sorted as bytes. At most about `memory` bytes of them are held at a time.

    `folder` takes the sorted runs; they are deleted with it.
    """

    def __init__(self, folder: Path, width: int, *, memory: int) -> None:
        self._folder = folder
        # bytes of fixed length: numpy compares them like memcmp, as a missing byte counts as 0
        self._dtype = np.dtype(f"S{width}")
        self._most = max(memory // (3 * width), 2)  # records, the array that joins them, and what sorting takes
        self._waiting: list[np.ndarray] = []
        self._count = 0
        self._runs: list[Path] = []

    def add(self, records: np.ndarray) -> None:
        """Add records `(N, width)` uint8."""
        for first in range(0, len(records), self._most):
            part = np.ascontiguousarray(records[first : first + self._most])
            self._waiting.append(part.view(self._dtype).reshape(-1))
            self._count += len(part)
            if self._count >= self._most:
                self._spill()

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield all records in order, as `(n, width)` uint8."""
        if not self._runs:
            if self._count:
                yield self._plain(self._sorted())
            return
        if self._count:
            self._spill()
        size = max(self._most // len(self._runs), 1)
        runs = [np.memmap(path, dtype=self._dtype, mode="r") for path in self._runs]
        places = [0] * len(runs)
        while any(place < len(run) for run, place in zip(runs, places, strict=True)):
            heads = [np.asarray(run[place : place + size]) for run, place in zip(runs, places, strict=True)]
            # what is not above the smallest last record of a block that is not its run's last is complete
            more = [head[-1] for head, run, place in zip(heads, runs, places, strict=True) if place + size < len(run)]
            limit = min(more) if more else None
            taken = []
            for number, head in enumerate(heads):
                count = len(head) if limit is None else int(np.searchsorted(head, limit, side="right"))
                taken.append(head[:count])
                places[number] += count
            yield self._plain(np.sort(np.concatenate(taken)))

    def _sorted(self) -> np.ndarray:
        whole = np.concatenate(self._waiting)
        self._waiting, self._count = [], 0
        whole.sort()
        return whole

    def _spill(self) -> None:
        path = self._folder / f"run-{self._dtype.itemsize}-{len(self._runs):06d}"
        self._sorted().tofile(path)
        self._runs.append(path)

    def _plain(self, records: np.ndarray) -> np.ndarray:
        return records.view(np.uint8).reshape(-1, self._dtype.itemsize)
