"""Features for a student that is fed some and is used, not trained: found in a store by the bytes of the image."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from olaschema.errors import ConfigError, StoreError
from olaschema.manifest import Fingerprint
from olaschema.packed import is_packed
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore
from olatrain.feed import Fed, Feeds
from olatrain.sidecar import Sidecar
from olatrain.tokens import TaskTokens


class FedFeatures:
    """Features of some teachers by SHA-256 of the image's bytes, as the receipts tell it; keys do not matter."""

    def __init__(self, store: FeatureStore | None, teachers: Mapping[str, Fingerprint]) -> None:
        self.counts = {teacher: {"images": 0, "missing": 0} for teacher in teachers}
        self._shapes = {teacher: fingerprint.shape for teacher, fingerprint in teachers.items()}
        self._readers: dict[str, FeatureReader] = {}
        self._rows: dict[str, dict[str, int]] = {}
        if store is not None:
            for teacher, fingerprint in teachers.items():
                self._open(store, teacher, fingerprint)

    def find(self, image: bytes, device: torch.device) -> dict[str, Fed]:
        """Return each teacher's feature of one image, (1, *shape) float32, and count whether there is one.

        Raises StoreError for damage.
        """
        digest = hashlib.sha256(image).hexdigest() if self._rows else ""
        found = {}
        for teacher, rows in self._rows.items():
            row = rows.get(digest)
            values = np.zeros(self._shapes[teacher], dtype=np.float32)
            if row is not None:
                values = self._readers[teacher].feature(row)
            self.counts[teacher]["missing" if row is None else "images"] += 1
            valid = torch.tensor([row is not None], device=device)
            found[teacher] = Fed(torch.from_numpy(values)[None].to(device), valid)
        return found

    def _open(self, store: FeatureStore, teacher: str, fingerprint: Fingerprint) -> None:
        record = store.teacher(teacher)
        fingerprint.require_equal(
            record.fingerprint,
            mine="that the student was fed with",
            theirs="in the store",
            remedy="Extract the images with the settings of the store that the student was trained from.",
        )
        self._readers[teacher] = FeatureReader(store, teacher)
        rows: dict[str, int] = {}
        for shard in store.committed(teacher):
            receipt = store.receipt(teacher, shard)
            for place, status in enumerate(receipt.rows if receipt is not None else ()):
                if status.status == "ok" and status.sha256 is not None:
                    rows.setdefault(status.sha256, shard * store.rows_per_shard + place)
        self._rows[teacher] = rows


def open_feeds(student: Path, tokens: TaskTokens, model: Any, store: str | None) -> tuple[Feeds, FedFeatures]:
    """Return what feeds a student's model, and the features; both empty for a student that is fed none.

    Raises ConfigError where it is fed and no store is given, or the reverse, StoreError where there is no such store
    or it lacks a teacher, FingerprintError for other features.
    """
    sidecar = Sidecar.load(student)
    fed = dict(sidecar.record.feeds) if sidecar is not None else {}
    if fed and store is None:
        raise ConfigError(
            f"the student is fed features of {', '.join(fed)}, and no store of them is given",
            "Extract the images of the benchmark with these teachers (`olapipe extract`) and give the store (--store).",
        )
    if store is not None and not fed:
        raise ConfigError(f"{student} is fed no features", "Leave --store out: it sees the image alone.")
    if store is not None and is_packed(store):
        raise StoreError(f"{store} is a packed training set", "Give the feature store that it was packed from.")
    shapes = {teacher: fingerprint.shape for teacher, fingerprint in fed.items()}
    feeds = Feeds(shapes, tokens, model.get_input_embeddings(), seed=0)
    if sidecar is not None:
        sidecar.fill_feeds(feeds)
    return feeds, FedFeatures(FeatureStore.open(store) if store is not None else None, fed)
