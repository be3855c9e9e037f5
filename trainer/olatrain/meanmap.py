"""The mean target map: the prediction that knows nothing of any single image, and the floor of every figure."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from olaschema.errors import StoreError
from olaschema.precision import decode
from olatrain.join import Coverage
from olatrain.source import Data


def mean_maps(data: Data, coverages: Mapping[str, Coverage], *, most: int) -> dict[str, Tensor]:
    """Return each teacher's mean over the training images, `(H, W, C)` or `(C,)` float32.

    Summed in float64, one row at a time. Where there are more than `most` rows, that many evenly spaced ones are read.
    Raises StoreError naming a row whose values are not finite.
    """
    opened = data.open()
    means = {}
    for teacher, coverage in coverages.items():
        fingerprint = data.teacher(teacher).fingerprint
        basis = data.basis(teacher)
        rows = coverage.ready
        if len(rows) > most:
            rows = rows[np.arange(most) * len(rows) // most]
        total = np.zeros(fingerprint.shape, dtype=np.float64)
        for place in rows.tolist():
            stored = opened.feature(teacher, place)
            if stored is None:
                raise StoreError(
                    f"{data.url}: {opened.describe(place)} has no feature of {teacher} any more",
                    "Run the same command again.",
                )
            values = decode(stored, fingerprint.channels, basis)
            if not np.isfinite(values).all():
                raise StoreError(
                    f"{data.url}: {opened.describe(place)} of {teacher} holds NaN or infinity",
                    "Extract that shard again.",
                )
            total += values
        means[teacher] = torch.from_numpy((total / max(len(rows), 1)).astype(np.float32))
    return means
