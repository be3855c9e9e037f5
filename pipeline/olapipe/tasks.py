"""Which shards are to be extracted: one byte of memory per shard and teacher, tasks made one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from olapipe.tally import ShardTask
from olaschema.ledger import read_ledger
from olaschema.store import FeatureStore


@dataclass(frozen=True)
class Planned:
    """Images per shard, by arithmetic: `starts` and `rows` of each generation, in shards and images."""

    rows_per_shard: int
    starts: tuple[int, ...]
    rows: tuple[int, ...]

    @classmethod
    def of(cls, store: FeatureStore) -> Planned:
        """Read the generations of a store."""
        generations = store.generations()
        size = store.rows_per_shard
        return cls(size, tuple(g.first_row // size for g in generations), tuple(g.rows for g in generations))

    def grown(self, images: int) -> Planned:
        """Return the plan with a further generation of so many images."""
        shards = len(self.per_shard())
        return Planned(self.rows_per_shard, (*self.starts, shards), (*self.rows, images)) if images else self

    def per_shard(self) -> np.ndarray:
        """Return how many images each shard has, (shards,) int32."""
        parts = [np.zeros(0, dtype=np.int32)]
        for rows in self.rows:
            full = np.full(-(-rows // self.rows_per_shard), self.rows_per_shard, dtype=np.int32)
            full[-1:] = rows - (len(full) - 1) * self.rows_per_shard
            parts.append(full)
        return np.concatenate(parts)


class Pending:
    """The shards that lack a receipt of at least one teacher or, with `retry_failed`, hold images that failed.

    May be gone through several times. `store` is None before there is one: then all of `planned` is to be done.
    """

    def __init__(
        self, store: FeatureStore | None, planned: Planned, teachers: Sequence[str], *, retry_failed: bool = False
    ) -> None:
        self.teachers = tuple(teachers)
        self.rows = planned.per_shard()
        self._replace = retry_failed
        self._wanted = {name: np.ones(len(self.rows), dtype=bool) for name in self.teachers}
        self.done = dict.fromkeys(self.teachers, 0)
        if store is None:
            return
        for name, wanted in self._wanted.items():
            committed = _within(np.fromiter(store.committed(name), dtype=np.int64), len(wanted))
            wanted[committed] = False
            self.done[name] = len(committed)
            if retry_failed:
                wanted[_within(read_ledger(store, name).mendable(), len(wanted))] = True

    def __len__(self) -> int:
        return int(np.any(list(self._wanted.values()), axis=0).sum()) if len(self.rows) else 0

    def __iter__(self) -> Iterator[ShardTask]:
        for shard in np.flatnonzero(np.any(list(self._wanted.values()), axis=0)).tolist():
            names = tuple(name for name in self.teachers if self._wanted[name][shard])
            yield ShardTask(shard, names, int(self.rows[shard]), replace=self._replace)

    def shards(self, teacher: str) -> int:
        """Return how many shards a teacher has to do."""
        return int(self._wanted[teacher].sum())

    def images(self, teacher: str) -> int:
        """Return how many images are in these shards."""
        return int(self.rows[self._wanted[teacher]].sum())


def _within(shards: np.ndarray, count: int) -> np.ndarray:
    return shards[shards < count]  # a receipt of a shard that is not planned is for verify to report
