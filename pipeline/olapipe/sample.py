"""Features of a few images, to fit and to measure precisions on: from a corpus through the teacher, or from a store."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from olapipe.corpus import Entry, Listing, read_image
from olapipe.stored import committed_receipt
from olapipe.teachers.base import Teacher
from olaschema.errors import CorpusError, ImageError, StoreError
from olaschema.images import decode_image
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore


@dataclass(frozen=True)
class Sampled:
    """Features of some images, float32 (N, ...), and the images' keys."""

    keys: list[str]
    features: np.ndarray


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` of the numbers 0 … count − 1, evenly spaced."""
    taken = min(count, most)
    return [place * count // taken for place in range(taken)]


def from_corpus(listing: Listing, teacher: Teacher, most: int, max_pixels: int, batch_size: int) -> Sampled:
    """Run a teacher on at most `most` images, evenly spaced in the listing; those that cannot be used are passed over.

    Depends on the listing and the settings alone. Raises CorpusError if no image can be used.
    """
    places = set(spread(len(listing.entries), most))
    chosen = [entry for place, entry in enumerate(listing.entries) if place in places]
    keys: list[str] = []
    features: list[np.ndarray] = []
    for first in range(0, len(chosen), batch_size):
        found = _encode(chosen[first : first + batch_size], listing, teacher, max_pixels)
        keys += found.keys
        features += list(found.features)
    if not features:
        raise CorpusError(f"{teacher.name}: none of {len(chosen)} sampled images can be used", "Check the corpus.")
    return Sampled(keys, np.stack(features))


def _encode(entries: Sequence[Entry], listing: Listing, teacher: Teacher, max_pixels: int) -> Sampled:
    keys, pixels, digests = [], [], []
    for entry in entries:
        sample = entry.sample()
        try:
            data = read_image(listing.root, sample, max_pixels, mended=True)
            pixels.append(teacher.preprocessor(decode_image(data, name=sample.key, max_pixels=max_pixels)))
        except ImageError:
            continue  # `extract` says which images are unusable, and why
        keys.append(sample.key)
        digests.append(hashlib.sha256(data).hexdigest())
    if not keys:
        return Sampled([], np.zeros(0, np.float32))
    features = teacher.encode_images(torch.from_numpy(np.stack(pixels)), digests).cpu().numpy()
    finite = np.isfinite(features).reshape(len(features), -1).all(axis=1)
    return Sampled([key for key, good in zip(keys, finite, strict=True) if good], features[finite])


def from_store(store: FeatureStore, teacher: str, most: int) -> Sampled:
    """Read at most `most` stored features, evenly spaced; raises StoreError if there is none."""
    reader = FeatureReader(store, teacher)
    rows = [
        shard * store.rows_per_shard + index
        for shard in store.committed(teacher)
        for index, row in enumerate(committed_receipt(store, teacher, shard).rows)
        if row.status == "ok"
    ]
    if not rows:
        raise StoreError(f"{store.url} has no feature of {teacher}", "Extract some first.")
    chosen = [rows[place] for place in spread(len(rows), most)]
    keys = [store.shard_samples(row // store.rows_per_shard)[row % store.rows_per_shard].key for row in chosen]
    return Sampled(keys, np.stack([reader.feature(row) for row in chosen]))


def split(sampled: Sampled, scored: int) -> tuple[np.ndarray, np.ndarray]:
    """Return features to fit on and features to score: other images, drawn alternately from the whole sample.

    Raises CorpusError where there are too few.
    """
    count = len(sampled.keys)
    if count < 8:
        raise CorpusError(f"{count} usable images are too few to measure on: 8 are needed", "Give more images.")
    places = set(spread(count, min(scored, count // 2)))
    fitting = [place for place in range(count) if place not in places]
    return sampled.features[fitting], sampled.features[sorted(places)]
