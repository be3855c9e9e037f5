"""The command `dedup`: images of the same bytes under several keys share one row."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from olapipe.progress import Reporter
from olapipe.rewrite import Change, rewrite
from olapipe.sorting import ExternalSort
from olapipe.stored import committed_receipt
from olaschema.lease import changing
from olaschema.manifest import RowReceipt
from olaschema.seal import seal, unseal
from olaschema.store import FeatureStore

MEMORY = 256 << 20
"""Bytes that sorting takes at a time; what does not fit waits on disk."""
_REPAIR = "`olapipe verify --repair` makes it again; then run the same command again."
_DIGEST = 32


@dataclass
class Shared:
    """What was done for one teacher."""

    rows: int = 0
    """Rows that newly share another one."""
    already: int = 0
    """Rows that did before."""
    bytes: int = 0
    """By how much the files of the shards became smaller."""


def dedup(store: FeatureStore, reporter: Reporter, *, memory: int = MEMORY) -> dict[str, Shared]:
    """Let each row whose image has the SHA-256 of an earlier one share that row; its own values are given back.

    The plan stays as it is. A row's receipt is still `ok` and names the row whose feature it has, per teacher. The
    pass sorts digests outside memory, and changes shards one by one: run again, it finds those that are done.
    Raises DamagedStoreError for a damaged shard, StoreError while a job writes features of one of the teachers.
    """
    found = {}
    with changing(store, say=reporter.say) as teachers:
        unseal(store, teachers)
        for teacher in teachers:
            reporter.say(f"looking for equal images of {teacher} …")
            with tempfile.TemporaryDirectory(prefix="olapipe-dedup-") as folder:
                found[teacher] = _dedup(store, teacher, Path(folder), memory)
        seal(store, teachers)
    return found


def _dedup(store: FeatureStore, teacher: str, folder: Path, memory: int) -> Shared:
    done = Shared()
    for shard, pairs in by_shard(shared_rows(digests_of(store, teacher), folder, memory), store.rows_per_shard):
        receipt = committed_receipt(store, teacher, shard)
        changes = {}
        for row, target in pairs:
            index = row % store.rows_per_shard
            seen = receipt.rows[index]
            if seen.same_as == target:
                done.already += 1
                continue
            done.rows += 1
            changes[index] = Change(seen.model_copy(update={"same_as": target}))
        if changes:
            rewrite(store, teacher, shard, changes, remedy=_REPAIR)
            after = committed_receipt(store, teacher, shard)
            done.bytes += _size(receipt.files.values()) - _size(after.files.values())
    return done


def _size(files: object) -> int:
    return sum(file.bytes for file in files)  # type: ignore[attr-defined]


def digests_of(store: FeatureStore, teacher: str) -> Iterator[np.ndarray]:
    """Yield records of every row with a feature, a shard at a time, `(n, 41)` uint8.

    SHA-256 of the image, 1 for a row whose feature is in another one (else 0), row number; big endian.
    """
    for shard in store.committed(teacher):
        rows = committed_receipt(store, teacher, shard).rows
        kept = [(index, row) for index, row in enumerate(rows) if row.status == "ok" and row.sha256 is not None]
        if kept:
            yield records(shard * store.rows_per_shard, kept)


def records(first_row: int, rows: list[tuple[int, RowReceipt]]) -> np.ndarray:
    """Return the records of some rows of a shard, given with their places in it."""
    text = "".join(f"{row.sha256}{row.same_as is not None:02x}{first_row + index:016x}" for index, row in rows)
    return np.frombuffer(bytes.fromhex(text), dtype=np.uint8).reshape(len(rows), _DIGEST + 9)


def shared_rows(found: Iterator[np.ndarray], folder: Path, memory: int) -> Iterator[np.ndarray]:
    """Yield (row, row that holds its feature) for rows of equal digests, `(n, 2)` int64 by ascending row.

    The holder is the first of the rows that have a feature of their own, so a second pass finds the same one.
    """
    by_digest = ExternalSort(folder, _DIGEST + 9, memory=memory // 2)
    for part in found:
        by_digest.add(part)
    by_row = ExternalSort(folder, 16, memory=memory // 2)
    digest, holder = np.zeros(_DIGEST, np.uint8), np.int64(-1)
    for block in by_digest.blocks():
        digests, rows = block[:, :_DIGEST], block[:, _DIGEST + 1 :].copy().view(">i8")[:, 0].astype(np.int64)
        opens = np.ones(len(block), dtype=bool)
        opens[1:] = (digests[1:] != digests[:-1]).any(axis=1)
        opens[0] = holder < 0 or bool((digests[0] != digest).any())
        # each row's holder is the row that opened its group, maybe in the block before
        starts = np.maximum.accumulate(np.where(opens, np.arange(len(block)), -1))
        holders = np.where(starts >= 0, rows[np.maximum(starts, 0)], holder)
        digest, holder = digests[-1].copy(), holders[-1]
        pairs = np.stack([rows[~opens], holders[~opens]], axis=1).astype(">i8")
        by_row.add(pairs.view(np.uint8).reshape(-1, 16))
    for block in by_row.blocks():
        yield block.copy().view(">i8").astype(np.int64)


def by_shard(pairs: Iterator[np.ndarray], rows_per_shard: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Group pairs by the shard of their first row."""
    waiting: list[tuple[int, int]] = []
    for block in pairs:
        for row, target in block.tolist():
            if waiting and waiting[0][0] // rows_per_shard != row // rows_per_shard:
                yield waiting[0][0] // rows_per_shard, waiting
                waiting = []
            waiting.append((row, target))
    if waiting:
        yield waiting[0][0] // rows_per_shard, waiting
