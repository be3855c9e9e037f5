"""Joining conversations to features by key: which row each sample's image has, and which rows hold features."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from olaschema.errors import CorpusError
from olaschema.keys import tombstone
from olaschema.rooted import is_rooted
from olaschema.store import FeatureStore
from olatrain.conversations import Conversations

_PROBED_IMAGES = 64


@dataclass(frozen=True)
class Listing:
    """The samples of a run: usable conversations, each with the row of its image."""

    conversations: Conversations
    rows: np.ndarray
    """(N,) int64: row of the first image, -1 for text alone and for images that the store does not plan."""
    shards: np.ndarray
    """(N,) int64: shard of that row, or -1."""
    image_rows: np.ndarray
    """(M,) int64: rows of all images, sample after sample; -1 where the store does not plan one."""
    image_places: np.ndarray
    """(M,) int64: where to read each image and its features; its row in a store, -1 for nowhere."""
    ends: np.ndarray
    """(N,) int64: where each sample's images end in `image_rows`."""
    digest: str
    """Changes with any conversation, its order, row or shard: the order of samples depends on nothing else."""

    def __len__(self) -> int:
        return len(self.rows)

    def rows_of(self, place: int) -> list[int]:
        """Return the rows of one sample's images, in order."""
        return self._images(self.image_rows, place)

    def places_of(self, place: int) -> list[int]:
        """Return the places of one sample's images, in order."""
        return self._images(self.image_places, place)

    def _images(self, array: np.ndarray, place: int) -> list[int]:
        found: list[int] = array[self.ends[place - 1] if place else 0 : self.ends[place]].tolist()
        return found

    def select(self, places: np.ndarray) -> Listing:
        """Return the samples at `places`, in that order."""
        chosen = [self.rows_of(int(place)) for place in places]
        where = [self.places_of(int(place)) for place in places]
        return make_listing(self.conversations.select(places.tolist()), chosen, self.shards[places], where)


def join(conversations: Conversations, store: FeatureStore | None) -> Listing:
    """Find the rows of every conversation's images; without a store none has one."""
    if store is None:
        nowhere = [[-1] * len(keys) for keys in conversations.keys]
        return make_listing(conversations, nowhere, np.full(len(nowhere), -1, dtype=np.int64))
    wanted = {key for keys in conversations.keys for key in keys}
    found: dict[str, int] = {}
    forgotten: dict[str, int] = {}
    for table in store.plan_tables():
        for key, row, problem in zip(*(table[name].to_pylist() for name in ("key", "row", "problem")), strict=True):
            if problem == "forgotten":
                forgotten[key] = row
            elif key in wanted:
                found[key] = row
    if forgotten:  # they keep their rows, so that a run that has begun keeps its order; they have no features
        stones = {tombstone(key): key for key in wanted - found.keys()}
        found |= {stones[stone]: row for stone, row in forgotten.items() if stone in stones}
    by_sample = [[found.get(key, -1) for key in keys] for keys in conversations.keys]
    firsts = np.asarray([rows[0] if rows else -1 for rows in by_sample], dtype=np.int64)
    return make_listing(conversations, by_sample, np.where(firsts >= 0, firsts // store.rows_per_shard, -1))


def make_listing(
    conversations: Conversations, by_sample: list[list[int]], shards: np.ndarray, places: list[list[int]] | None = None
) -> Listing:
    """Make a listing of each sample's rows and shard, and of its images' places where these are not their rows."""
    rows = np.asarray([rows[0] if rows else -1 for rows in by_sample], dtype=np.int64)
    image_rows = np.asarray([row for rows in by_sample for row in rows], dtype=np.int64)
    ends = np.cumsum([len(rows) for rows in by_sample], dtype=np.int64)
    where = by_sample if places is None else places
    image_places = np.asarray([place for those in where for place in those], dtype=np.int64)
    # shards by their rank: their numbers are no matter, and tars have others
    ranks = np.searchsorted(np.unique(shards[shards >= 0]), shards) * (shards >= 0) - (shards < 0)
    arrays = (rows, image_rows, ranks)
    data = conversations.digest.encode() + b"".join(array.astype("<i8").tobytes() for array in arrays)
    digest = hashlib.sha256(data).hexdigest()
    return Listing(conversations, rows, shards, image_rows, image_places, ends, digest)


@dataclass(frozen=True)
class Coverage:
    """What one teacher has for the samples of a listing."""

    ready: np.ndarray
    """Places of the features, each row once, by ascending row."""
    valid: int
    """Images of the samples with a feature, counted at each use."""
    missing: dict[str, int] = field(default_factory=dict)
    """Images without a feature, by reason: not-in-store, not-extracted, or the receipt's."""


def coverage(store: FeatureStore, listing: Listing, teacher: str) -> Coverage:
    """Count from the receipts which samples have a feature of `teacher`."""
    uses = Counter(listing.image_rows[listing.image_rows >= 0].tolist())
    missing: Counter[str] = Counter()
    absent = int((listing.image_rows < 0).sum())
    if absent:
        missing["not-in-store"] = absent
    ready: list[int] = []
    by_shard: dict[int, list[int]] = {}
    for row in sorted(uses):
        by_shard.setdefault(row // store.rows_per_shard, []).append(row)
    for shard, rows in by_shard.items():
        receipt = store.receipt(teacher, shard)
        for row in rows:
            status = receipt.rows[row % store.rows_per_shard] if receipt else None
            if status is not None and status.status == "ok":
                ready.append(row)
            else:
                reason = "not-extracted" if status is None else status.reason or status.status
                missing[reason] += uses[row]
    return Coverage(np.asarray(ready, dtype=np.int64), sum(uses[row] for row in ready), dict(sorted(missing.items())))


def require_images(listing: Listing, root: Path) -> None:
    """Raise CorpusError unless at least one of some evenly spaced images is under `root`."""
    keys = [key for keys in listing.conversations.keys for key in keys]
    probed = keys[:: max(1, len(keys) // _PROBED_IMAGES)]
    if probed and not any(is_rooted(root, key) for key in probed):
        raise CorpusError(
            f"{root} holds none of the images tried, for instance {probed[0]}",
            "Give the folder that the images of the conversations are relative to (--images).",
        )
