"""From a stream of entries to what a store lacks, outside memory: each key once, in the order of first use.

Rows are sorted into bins by a hash of their key, so that what belongs together is in one bin, and bins are small enough
to be held. Nothing here depends on how a hash falls: what comes out is in listing order.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from olapipe.corpora.entry import Entry
from olapipe.spool import Spool
from olaschema.errors import ImageError, StoreError
from olaschema.keys import tombstone
from olaschema.manifest import Generation
from olaschema.rooted import read_rooted
from olaschema.store import FeatureStore

_BINS = 256
_PIECE = 1 << 18
_RUN = 1 << 19
_MENTIONED = 100
_LISTED = pa.schema([("place", pa.int64()), ("key", pa.string()), ("size", pa.int64()), ("problem", pa.string())])
_PLANNED = pa.schema([("row", pa.int64()), ("key", pa.string()), ("size", pa.int64())])


class Entries:
    """Entries of a listing in its order; may be gone through several times."""

    def __init__(self) -> None:
        self._spool = Spool(_LISTED)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Entry]:
        for table in self.tables():
            yield from map(Entry, *(table[name].to_pylist() for name in ("key", "size", "problem")))

    def tables(self) -> Iterator[pa.Table]:
        """Yield them as tables of key, uri, size and problem."""
        for number in self._spool.bins():
            table = self._spool.bin(number).sort_by("place")
            keys = table["key"]
            yield pa.table({"key": keys, "uri": keys, "size": table["size"], "problem": table["problem"]})

    def add(self, table: pa.Table) -> None:
        """Add rows of `_LISTED` in any order; their places in the listing are their order."""
        self._spool.add(table, table["place"].to_numpy() // _RUN)
        self._count += len(table)


@dataclass(frozen=True)
class Listing:
    """The images of a corpus, each key once. `root` is the folder that keys are relative to."""

    root: Path
    repeated: int
    """Further uses of an image that is listed already."""
    text_only: int
    """Conversations without an image."""
    by_key: Spool
    passed_over: dict[str, int] = field(default_factory=dict)
    """Files by extension that hold images perhaps and are not part of the corpus."""
    count: int = 0

    @property
    def entries(self) -> Entries:
        """All entries in order."""
        found = Entries()
        for number in self.by_key.bins():
            found.add(self.by_key.bin(number))
        return found


@dataclass(frozen=True)
class Growth:
    """A listing compared with what a store has planned."""

    new: Entries
    known: int
    gone: int
    """Images the store has and the corpus no longer lists; their features are kept."""
    basis: tuple[Generation, ...] = ()
    """The plans it was compared with."""


def gather(root: Path, entries: Iterable[Entry]) -> Listing:
    """Read a stream of entries and keep the first of each key."""
    pieces = Spool(_LISTED)
    stream = iter(entries)
    total = 0
    while piece := list(islice(stream, _PIECE)):
        keys = [entry.key for entry in piece]
        table = pa.table(
            [range(total, total + len(piece)), keys, [e.size for e in piece], [e.problem for e in piece]],
            schema=_LISTED,
        )
        pieces.add(table, _hashes(keys))
        total += len(piece)
    by_key = Spool(_LISTED)
    count = 0
    for number in pieces.bins():
        table = pieces.bin(number)
        codes = table["key"].combine_chunks().dictionary_encode().indices.to_numpy()
        first = np.sort(np.unique(codes, return_index=True)[1])
        by_key.add(table.take(pa.array(first)), np.full(len(first), number))
        count += len(first)
    return Listing(root, total - count, 0, by_key, count=count)


def _hashes(keys: list[str]) -> np.ndarray:
    return np.fromiter((zlib.crc32(key.encode()) % _BINS for key in keys), dtype=np.int64, count=len(keys))


def compare(listing: Listing, store: FeatureStore | None) -> Growth:
    """Say which images of the listing a store has not planned yet.

    Raises StoreError where a file with features no longer has the planned size: they would be of another image.
    A file without features may have appeared or been mended. A forgotten image is not planned again.
    """
    basis = tuple(store.generations()) if store is not None else ()
    planned = Spool(_PLANNED)
    forgotten: set[str] = set()
    for table in store.plan_tables() if store is not None else ():
        buried = pc.equal(table["problem"], "forgotten").fill_null(False)
        forgotten.update(table.filter(buried)["key"].to_pylist())
        kept = table.filter(pc.invert(buried)).select(_PLANNED.names)
        planned.add(kept, _hashes(kept["key"].to_pylist()))
    new = Entries()
    known = gone = 0
    changed: list[tuple[str, int, int]] = []
    for number in sorted({*listing.by_key.bins(), *planned.bins()}):
        listed, mine = listing.by_key.bin(number), planned.bin(number)
        places = pc.index_in(listed["key"], value_set=mine["key"].combine_chunks())
        is_known = places.is_valid()
        new.add(_without(listed.filter(pc.invert(is_known)), forgotten))
        pairs = listed.filter(is_known)
        partners = mine.take(places.drop_null())
        known += len(pairs)
        gone += len(mine) - len(pairs)
        if store is not None and len(changed) < _MENTIONED:
            changed += _changed(store, listing.root, pairs, partners)
    if store is not None and changed:
        key, before, now = changed[0]
        more = f" (and {len(changed) - 1} more images)" if len(changed) > 1 else ""
        raise StoreError(
            f"{key} had {before} bytes when {store.url} planned it, now it has {now}{more}: "
            "features of another image would get its name",
            "Restore the file, or give the new image another name, or extract into another --out.",
        )
    return Growth(new, listing.count - len(new), gone, basis)


def _without(listed: pa.Table, forgotten: set[str]) -> pa.Table:
    if not forgotten or not len(listed):
        return listed
    return listed.filter(pa.array([tombstone(key) not in forgotten for key in listed["key"].to_pylist()]))


def _changed(store: FeatureStore, root: Path, listed: pa.Table, mine: pa.Table) -> list[tuple[str, int, int]]:
    """Return key, planned and present size of the images that have features of other bytes than they now have."""
    now, before = listed["size"].to_numpy(), mine["size"].to_numpy()
    found = []
    for place in np.flatnonzero((now != before) & (now >= 0) & (before >= 0)).tolist():
        key = listed["key"][place].as_py()
        if _describes_another(store, mine["row"][place].as_py(), root, key):
            found.append((key, int(before[place]), int(now[place])))
            if len(found) == _MENTIONED:
                break
    return found


def _describes_another(store: FeatureStore, row: int, root: Path, uri: str) -> bool:
    """Whether the row has features of other bytes than the file now has: a mended image has those of its new bytes."""
    shard, within = divmod(row, store.rows_per_shard)
    receipts = [store.receipt(teacher, shard) for teacher in store.teachers()]
    made_from = {r.rows[within].sha256 for r in receipts if r is not None and r.rows[within].status == "ok"}
    if not made_from:
        return False
    try:
        return made_from != {hashlib.sha256(read_rooted(root, uri)).hexdigest()}
    except ImageError:
        return True
