"""Features to stored values and back. Decoding is one line of numpy per precision, given in docs/store-format.md."""

from __future__ import annotations

import numpy as np

from olaschema.errors import ImageError
from olaschema.manifest import Precision

DTYPES: dict[Precision, np.dtype] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}


def require_storable(feature: np.ndarray, precision: Precision, *, name: str) -> None:
    """Raise ImageError unless one image's float32 feature survives `precision`.

    Reasons: `not-finite` for NaN or infinity, `overflow` where |x| exceeds what the precision can hold.
    """
    if not np.isfinite(feature).all():
        raise ImageError("not-finite", f"{name}: the teacher returned NaN or infinity")
    largest = float(np.abs(feature).max(initial=0.0))
    # 65520 is the midpoint above the largest float16: from there on values round to infinity
    if precision == "float16" and largest >= 65520.0:
        raise ImageError(
            "overflow",
            f"{name}: a feature value of {largest:.6g} does not fit float16 (largest: 65504)",
            "Extract with --precision float32.",
        )


def encode(features: np.ndarray, precision: Precision) -> np.ndarray:
    """Round float32 features of any shape to stored values. Error: half a unit in the last place of the precision.

    For float16 that is at most 2⁻¹¹ of |x|, and 2⁻²⁵ below the smallest normal 2⁻¹⁴.
    """
    return features.astype(DTYPES[precision])


def decode(values: np.ndarray) -> np.ndarray:
    """Return stored float values as float32, exactly."""
    return values.astype(np.float32)
