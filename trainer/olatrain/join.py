"""Joining conversations to features by key: which row each sample's image has, and which rows hold features."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from olaschema.errors import CorpusError
from olaschema.keys import tombstone
from olaschema.store import FeatureStore
from olatrain.conversations import Conversations

_PROBED_IMAGES = 64


@dataclass(frozen=True)
class Listing:
    """The samples of a run: usable conversations, each with the row of its image."""

    conversations: Conversations
    rows: np.ndarray
    """(N,) int64: row in the store, -1 for text alone and for images that the store does not plan."""
    shards: np.ndarray
    """(N,) int64: shard of that row, or -1."""
    digest: str
    """Changes with any conversation, its order, or its row: the order of samples depends on nothing else."""

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, places: np.ndarray) -> Listing:
        """Return the samples at `places`, in that order."""
        conversations, rows = self.conversations.select(places.tolist()), self.rows[places]
        return Listing(conversations, rows, self.shards[places], _digest(conversations, rows))


def join(conversations: Conversations, store: FeatureStore | None) -> Listing:
    """Find the row of every conversation's image; without a store none has one."""
    if store is None:
        nowhere = np.full(len(conversations.keys), -1, dtype=np.int64)
        return Listing(conversations, nowhere, nowhere, _digest(conversations, nowhere))
    wanted = {key for key in conversations.keys if key is not None}
    found: dict[str, int] = {}
    forgotten: dict[str, int] = {}
    for sample in store.samples():
        if sample.problem == "forgotten":
            forgotten[sample.key] = sample.row
        elif sample.key in wanted:
            found[sample.key] = sample.row
    if forgotten:  # they keep their rows, so that a run that has begun keeps its order; they have no features
        stones = {tombstone(key): key for key in wanted - found.keys()}
        found |= {stones[stone]: row for stone, row in forgotten.items() if stone in stones}
    rows = np.asarray([-1 if key is None else found.get(key, -1) for key in conversations.keys], dtype=np.int64)
    shards = np.where(rows >= 0, rows // store.rows_per_shard, -1)
    return Listing(conversations, rows, shards, _digest(conversations, rows))


def _digest(conversations: Conversations, rows: np.ndarray) -> str:
    return hashlib.sha256(conversations.digest.encode() + rows.astype("<i8").tobytes()).hexdigest()


@dataclass(frozen=True)
class Coverage:
    """What one teacher has for the samples of a listing."""

    ready: np.ndarray
    """Rows (unique, ascending) with a feature."""
    valid: int
    """Samples with a feature."""
    missing: dict[str, int] = field(default_factory=dict)
    """Samples with an image and no feature, by reason: not-in-store, not-extracted, or the receipt's."""


def coverage(store: FeatureStore, listing: Listing, teacher: str) -> Coverage:
    """Count from the receipts which samples have a feature of `teacher`."""
    images = np.asarray([key is not None for key in listing.conversations.keys])
    uses = Counter(listing.rows[listing.rows >= 0].tolist())
    missing: Counter[str] = Counter()
    absent = int((images & (listing.rows < 0)).sum())
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


def require_features(coverages: Mapping[str, Coverage], store: str) -> None:
    """Raise CorpusError naming the teacher that has no feature for any sample."""
    for teacher, found in coverages.items():
        if not found.valid:
            reasons = (
                ", ".join(f"{count} {reason}" for reason, count in found.missing.items()) or "no sample has an image"
            )
            raise CorpusError(
                f"{store}: {teacher} has no feature for any sample ({reasons})",
                "Keys are paths relative to the image folder: check that the conversations name images as the "
                "extraction did, and that it has finished.",
            )


def require_images(listing: Listing, root: Path) -> None:
    """Raise CorpusError unless at least one of some evenly spaced images is under `root`."""
    keys = [key for key in listing.conversations.keys if key is not None]
    probed = keys[:: max(1, len(keys) // _PROBED_IMAGES)]
    if probed and not any((root / key).is_file() for key in probed):
        raise CorpusError(
            f"{root} holds none of the images tried, for instance {probed[0]}",
            "Give the folder that the images of the conversations are relative to (--images).",
        )
