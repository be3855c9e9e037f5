"""The mean target map: the prediction that knows nothing of any single image, and the floor of every figure."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from olaschema.errors import StoreError
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore
from olatrain.join import Coverage


def mean_maps(store: str, coverages: Mapping[str, Coverage], *, most: int) -> dict[str, Tensor]:
    """Return each teacher's mean over the training images, `(H, W, C)` or `(C,)` float32.

    Summed in float64, one row at a time. Where there are more than `most` rows, that many evenly spaced ones are read.
    Raises StoreError naming a row whose values are not finite.
    """
    opened = FeatureStore.open(store)
    means = {}
    for teacher, coverage in coverages.items():
        reader = FeatureReader(opened, teacher)
        rows = coverage.ready
        if len(rows) > most:
            rows = rows[np.arange(most) * len(rows) // most]
        total = np.zeros(reader.fingerprint.shape, dtype=np.float64)
        for row in rows:
            values = reader.feature(int(row))
            if not np.isfinite(values).all():
                raise StoreError(f"{store}: row {row} of {teacher} holds NaN or infinity", "Extract that shard again.")
            total += values
        means[teacher] = torch.from_numpy((total / max(len(rows), 1)).astype(np.float32))
    return means
