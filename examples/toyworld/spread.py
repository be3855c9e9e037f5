"""How much of an arm's targets is about the image: the rest is a mean map, which a student learns without looking."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np

from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore

_PICTURES = 600


def measure(store: Path, teacher: str) -> dict[str, float]:
    """Return figures of a store's maps, scaled by channel as the losses have them: all variance is 1.

    `channels`; `beyond`, the variance that the mean map leaves; `loss`, the smooth-L1 distance to it; `alike`, the mean
    cosine of the maps of two images, which contrastive terms have to tell apart.
    """
    opened = FeatureStore.open(str(store))
    reader = FeatureReader(opened, teacher)
    rows = [sample.row for sample in islice(opened.samples(), _PICTURES)]
    maps = np.stack([np.asarray(reader.feature(row), dtype=np.float64) for row in rows])
    over = tuple(range(maps.ndim - 1))
    scaled = (maps - maps.mean(axis=over)) / (maps.std(axis=over) + 1e-12)
    apart = np.abs(scaled - scaled.mean(axis=0))
    flat = scaled.reshape(len(scaled), -1)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    n = len(flat)
    return {
        "channels": float(maps.shape[-1]),
        "beyond": round(float((apart**2).mean()), 4),
        "loss": round(float(np.where(apart < 1, 0.5 * apart**2, apart - 0.5).mean()), 4),
        "alike": round(float((np.square(flat.sum(axis=0)).sum() - n) / (n * (n - 1))), 4),
    }
