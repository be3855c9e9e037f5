"""Features to stored arrays and back. Decoding is one line of numpy per precision, given in docs/store-format.md.

Integer precisions are symmetric, by token and group of 64 channels: an outlier channel spoils only its group. Of maps
the mean of each channel over the image is taken away first and stored beside (`centred`): a channel that stands out
does so in all tokens alike, and what is left of it is as small as the others. The same arithmetic runs in torch where
the teacher runs (`olapipe/quantise.py`) and where the student trains (`olatrain/scaling.py`); tests hold the three
together bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from olaschema.basis import REACH, Basis
from olaschema.errors import ImageError, StoreError
from olaschema.manifest import Precision, TeacherRecord

GROUP = 64
"""Channels that share a scale; the last group of a feature may be shorter."""

LARGEST_Q: Mapping[Precision, int] = MappingProxyType({"int8": 127, "int4": 7, "klt": 127})
"""Largest integer of each integer precision; the smallest is its negative, so 0 is exact and signs are alike."""

LARGEST_HALF = 65504
# so many numbers of 40 bits and a sign have a sum that float64 holds
EXACT_TOKENS = 2**13
"""Largest finite float16."""
_DTYPES: Mapping[Precision, np.dtype] = MappingProxyType(
    {
        "float32": np.dtype("<f4"),
        "float16": np.dtype("<f2"),
        "int8": np.dtype("i1"),
        "int4": np.dtype("u1"),
        "klt": np.dtype("i1"),
    }
)


@dataclass(frozen=True)
class ArrayFormat:
    """One stored array of a teacher: its shape and dtype for one image, and what a row without a feature holds."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fill: float
    last_axis: str
    """What the last axis counts."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row before compression."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


@dataclass(frozen=True)
class Stored:
    """Features as they are stored, of one image or of several along the first axis.

    `values` is float32, float16 or int8 `(..., C)`, or for int4 uint8 `(..., ceil(C/2))`: even channels in the low
    half of a byte, odd ones in the high half, two's complement; where C is odd the last high half is 0. `scale` is
    float16 `(..., ceil(C/64))` beside integers, else None. `offset` is float16, `(C,)` for each image, beside the
    integers of centred maps `(..., H, W, C)`, else None.
    """

    values: np.ndarray
    scale: np.ndarray | None = None
    offset: np.ndarray | None = None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by the name they have in the store."""
        named = {"values": self.values, "scale": self.scale, "offset": self.offset}
        return {name: array for name, array in named.items() if array is not None}

    def __getitem__(self, index: int) -> Stored:
        return Stored(**{name: array[index] for name, array in self.arrays.items()})

    def __setitem__(self, index: int, row: Stored) -> None:
        for name, array in self.arrays.items():
            array[index] = row.arrays[name]


def is_centred(shape: tuple[int, ...], precision: Precision) -> bool:
    """Whether features of `shape` that are stored for the first time are centred: maps, in integers.

    The mean of a vector over its only token is the vector itself, and klt has a mean map of its own.
    """
    return precision in ("int8", "int4") and len(shape) == 3


def formats_of(record: TeacherRecord) -> dict[str, ArrayFormat]:
    """Return the arrays, by name, that hold a teacher's features; see `array_formats`."""
    return array_formats(record.fingerprint.shape, record.precision, centred=record.centred)


def array_formats(shape: tuple[int, ...], precision: Precision, *, centred: bool = False) -> dict[str, ArrayFormat]:
    """Return the arrays, by name, that hold features of `shape`, (H, W, C) or (C,).

    A row without a feature decodes to NaN: by its values, or by its scale where the values are integers.
    """
    *grid, channels = shape
    dtype = _DTYPES[precision]
    if precision not in LARGEST_Q:
        return {"values": ArrayFormat(shape, dtype, float("nan"), "channel")}
    last, axis = (-(-channels // 2), "channel_pair") if precision == "int4" else (channels, "channel")
    half = np.dtype("<f2")
    formats = {
        "values": ArrayFormat((*grid, last), dtype, 0, axis),
        "scale": ArrayFormat((*grid, -(-channels // GROUP)), half, float("nan"), "channel_group"),
    }
    return formats | ({"offset": ArrayFormat((channels,), half, float("nan"), "channel")} if centred else {})


def blank(rows: int, shape: tuple[int, ...], precision: Precision, *, centred: bool = False) -> Stored:
    """Return `rows` rows without a feature, to be filled."""
    arrays = {
        name: np.full((rows, *array.shape), array.fill, array.dtype)
        for name, array in array_formats(shape, precision, centred=centred).items()
    }
    return Stored(**arrays)


def require_storable(
    feature: np.ndarray, precision: Precision, *, name: str, basis: Basis | None = None, centred: bool = False
) -> None:
    """Raise ImageError unless one image's float32 feature survives `precision`.

    Reasons: `not-finite` for NaN or infinity, `overflow` where |x| exceeds what the precision can hold: 65504 for
    float16, 127 · 65504 for int8 and 7 · 65504 for int4, whose scale is a float16, and 65504 less where `centred`, as a
    value and its channel's mean may be of opposite signs; for klt the distance to the mean map of `basis` may be
    0.9 · 127 · 65504.
    """
    if not np.isfinite(feature).all():
        raise ImageError("not-finite", f"{name}: the teacher returned NaN or infinity")
    if precision == "float32":
        return
    if precision == "klt":
        mean = require_basis(basis).mean
        distance = float(np.linalg.norm(feature.reshape(mean.shape).astype(np.float64) - mean))
        if distance > REACH:
            raise ImageError(
                "overflow",
                f"{name}: a feature {distance:.6g} from the mean map does not fit klt (largest: {REACH:.6g})",
                "Extract with --precision float32.",
            )
        return
    largest = float(np.abs(feature).max(initial=0.0))
    limit = LARGEST_HALF * (LARGEST_Q.get(precision, 1) - centred)
    # 65520 is the midpoint above the largest float16: from there on values round to infinity; scales are rounded up
    if largest >= 65520.0 if precision == "float16" else largest > limit:
        raise ImageError(
            "overflow",
            f"{name}: a feature value of {largest:.6g} does not fit {precision} (largest: {limit})",
            "Extract with --precision float32.",
        )


def require_basis(basis: Basis | None) -> Basis:
    """Return the basis; raises StoreError where there is none, without which klt means nothing."""
    if basis is None:
        raise StoreError("features of the precision klt need their basis", "Read it with `FeatureStore.basis`.")
    return basis


def encode(features: np.ndarray, precision: Precision, basis: Basis | None = None, *, centred: bool = False) -> Stored:
    """Round float32 features `(..., C)` that `require_storable` accepts.

    `(..., H, W, C)` where `centred`, and for klt, with its `basis`.

    Error of an element x, with M the largest |x| of its token's group of 64 channels:
    float32: none. float16: at most 2⁻¹¹·|x|, and 2⁻²⁵ below the smallest normal 2⁻¹⁴.
    int8: at most M/254·(1 + 2⁻⁹) + 2⁻²⁵. int4: at most M/14·(1 + 2⁻⁹) + 2⁻²⁵. Where centred, M is the largest
    |x − offset| of the group, and the sum in decoding adds a rounding to float32, 2⁻²⁴ of the decoded value.
    klt: the length of an image's whole error is at most half that of its scales (one per coefficient), plus 2⁻¹⁶ of the
    lengths of the mean map and of what differs from it, for the arithmetic in float32.
    """
    if precision == "klt":
        basis = require_basis(basis)
        features = basis.forward(features)
    if precision not in LARGEST_Q:
        return Stored(features.astype(_DTYPES[precision]))
    offset = _offset(features) if centred else None
    if offset is not None:
        features = features - offset.astype(np.float32)[..., None, None, :]
    *grid, channels = features.shape
    groups = -(-channels // GROUP)
    padded = np.zeros((*grid, groups * GROUP), np.float32)
    padded[..., :channels] = features
    grouped = padded.reshape(*grid, groups, GROUP)
    scale = _scale(np.abs(grouped).max(axis=-1), LARGEST_Q[precision], 0.0 if basis is None else basis.step)
    # the scale is not below M/q (up to a rounding of M/q itself): the quotient rounds to at most q, nothing is clipped
    quotients = np.rint(grouped / scale.astype(np.float32)[..., None])
    integers = quotients.astype(np.int8).reshape(padded.shape)[..., : channels + channels % 2]
    if precision == "int4":
        return Stored(_pack(integers), scale, offset)
    return Stored(np.ascontiguousarray(integers[..., :channels]), scale, offset)


def _offset(features: np.ndarray) -> np.ndarray:
    """Return the mean of each channel over the tokens of its map, `(..., C)` float16.

    Of the features as float16 (the largest where they are larger): those are multiples of 2⁻²⁴ below 2¹⁶, and their
    sums are exact, in float64 up to EXACT_TOKENS of them and in integers beyond, so every device gets the same mean in
    whatever order it sums.
    """
    halves = np.clip(features, -LARGEST_HALF, LARGEST_HALF).astype(np.float16).astype(np.float64)
    tokens = features.shape[-3] * features.shape[-2]
    if tokens <= EXACT_TOKENS:
        sums = halves.sum(axis=(-3, -2)) * 2.0**24
    else:
        sums = (halves * 2.0**24).astype(np.int64).sum(axis=(-3, -2)).astype(np.float64)
    mean: np.ndarray = (sums / (tokens * 2.0**24)).astype(np.float32).astype("<f2")
    return mean


def _scale(largest: np.ndarray, largest_q: int, least: float) -> np.ndarray:
    """Return largest/largest_q as float16, rounded up, at least 2⁻²⁴: a scale of 0 would lose the whole group."""
    exact = np.maximum(largest / np.float32(largest_q), np.float32(least))
    nearest = exact.astype(np.float16)
    # positive floats are ordered like their bits: one more is the next float16, and 1 is the smallest above 0
    bits = nearest.view(np.uint16) + (nearest.astype(np.float32) < exact)
    scale: np.ndarray = np.maximum(bits, 1).astype("<u2").view("<f2")
    return scale


def _pack(integers: np.ndarray) -> np.ndarray:
    halves = integers.view(np.uint8) & np.uint8(15)
    packed: np.ndarray = halves[..., 0::2] | (halves[..., 1::2] << np.uint8(4))
    return packed


def decode(stored: Stored, channels: int, basis: Basis | None = None) -> np.ndarray:
    """Return stored features of one image or several as float32 `(..., channels)`; klt is decoded by its `basis`.

    An integer times its scale is exact, as it needs at most 18 bits; an offset is added with one rounding. With a
    basis, up to the rounding of sums.
    """
    if stored.scale is None:
        return stored.values.astype(np.float32)
    integers = _unpack(stored.values) if stored.values.dtype == np.uint8 else stored.values
    scale = np.repeat(stored.scale.astype(np.float32), GROUP, axis=-1)
    feature: np.ndarray = integers[..., :channels] * scale[..., :channels]
    if stored.offset is not None:
        feature += stored.offset.astype(np.float32)[..., None, None, :]
    return feature if basis is None else basis.backward(feature)


def _unpack(packed: np.ndarray) -> np.ndarray:
    """Return the signed halves of the bytes `(..., n)` as int8 `(..., 2n)`; the shift right keeps the sign."""
    halves = np.stack([packed << np.uint8(4), packed], axis=-1).view(np.int8) >> np.int8(4)
    return halves.reshape(*packed.shape[:-1], -1)
