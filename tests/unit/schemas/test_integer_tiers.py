"""Integer precisions against an encoding and a decoding written here, and against their stated bounds."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from olapipe.quantise import quantise
from olaschema.errors import ImageError
from olaschema.manifest import Precision
from olaschema.precision import Stored, blank, decode, encode, require_storable
from olatrain.scaling import decode as decode_on_device

LARGEST: dict[Precision, int] = {"int8": 127, "int4": 7}
TIERS = pytest.mark.parametrize("tier", ["int8", "int4"])
SCALES = [2.0**-149, 2.0**-126, 2.0**-40, 2.0**-24, 1e-3, 1.0, 300.0, 4e5]


@st.composite
def features(draw: st.DrawFn) -> np.ndarray:
    """Tokens of any channel count whose size differs by token, with outlier channels, zeros and denormals."""
    channels = draw(st.sampled_from([1, 2, 5, 63, 64, 65, 127, 128, 129, 200]))
    tokens = draw(st.integers(1, 3))
    unit = draw(hnp.arrays(np.float32, (tokens, channels), elements=st.floats(-1, 1, width=32)))
    sizes = draw(hnp.arrays(np.float32, (tokens, 1), elements=st.sampled_from(SCALES)))
    with np.errstate(under="ignore"):
        found = unit * sizes
        outlier = draw(st.integers(-1, channels - 1))
        if outlier >= 0:
            found[:, outlier] *= np.float32(draw(st.sampled_from([50.0, 2.0**-60])))
    return np.clip(found, -7 * 65504, 7 * 65504).astype(np.float32)


def groups(array: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """(token, group, its channels) of a (tokens, C) array."""
    tokens, channels = array.shape
    return [(t, g // 64, array[t, g : g + 64]) for t in range(tokens) for g in range(0, channels, 64)]


@TIERS
@settings(deadline=None)
@given(found=features())
def test_the_error_stays_within_the_stated_bound(tier: Precision, found: np.ndarray) -> None:
    back = decode(encode(found, tier), found.shape[-1])
    assert back.dtype == np.float32
    assert back.shape == found.shape
    for (_, _, exact), (_, _, near) in zip(groups(found), groups(back), strict=True):
        largest = float(np.abs(exact).max())
        bound = largest / (2 * LARGEST[tier]) * (1 + 2.0**-9) + 2.0**-25
        assert np.abs(near.astype(np.float64) - exact).max() <= bound


@TIERS
@settings(deadline=None)
@given(found=features())
def test_scales_are_rounded_up_and_never_0_and_nothing_clips(tier: Precision, found: np.ndarray) -> None:
    stored = encode(found, tier)
    assert stored.scale is not None
    for token, group, exact in groups(found):
        scale = float(stored.scale[token, group])
        quotient = np.float32(np.abs(exact).max()) / np.float32(LARGEST[tier])
        assert scale >= max(float(quotient), 2.0**-24)
        # the next smaller float16 would not do
        below = float(np.nextafter(np.float16(scale), np.float16(0)))
        assert below < max(float(quotient), 2.0**-24)
    integers = unpacked(stored, found.shape[-1])
    assert np.abs(integers).max(initial=0) <= LARGEST[tier]
    nearest = found.astype(np.float64) / np.repeat(stored.scale.astype(np.float64), 64, axis=-1)[:, : found.shape[1]]
    assert np.abs(integers - nearest).max() <= 0.5 + 127 * 2.0**-24


def unpacked(stored: Stored, channels: int) -> np.ndarray:
    """The integers, halves taken apart by division: even channel low, odd channel high, two's complement."""
    if stored.values.dtype == np.int8:
        return stored.values.astype(np.int64)
    out = np.zeros((len(stored.values), 2 * stored.values.shape[1]), np.int64)
    for (token, byte), value in np.ndenumerate(stored.values):
        for half, nibble in enumerate((int(value) % 16, int(value) // 16)):
            out[token, 2 * byte + half] = nibble - 16 if nibble > 7 else nibble
    assert (out[:, channels:] == 0).all(), "the padding of an odd channel count is 0"
    return out[:, :channels]


def test_int4_packs_the_even_channel_low() -> None:
    feature = np.array([[7.0, -7.0, 1.0, 0.0, -2.0]], np.float32)  # a scale of 1
    stored = encode(feature, "int4")
    assert stored.values.tolist() == [[0x97, 0x01, 0x0E]]
    assert stored.scale is not None
    assert stored.scale.tolist() == [[1.0]]
    assert decode(stored, 5).tolist() == feature.tolist()


def test_int8_by_hand() -> None:
    feature = np.zeros((1, 65), np.float32)
    feature[0, :3] = [254.0, -1.0, 3.1]
    feature[0, 64] = -0.5  # a group of its own: the outlier does not touch it
    stored = encode(feature, "int8")
    assert stored.values[0, [0, 1, 2, 64]].tolist() == [127, 0, 2, -127]
    assert stored.scale is not None
    assert stored.scale[0, 0] == 2.0
    # 0.5/127 lies between two float16 numbers; the upper one, worked out in exact fractions
    step = Fraction(1, 2 ** (10 + 8))
    assert Fraction(float(stored.scale[0, 1])) == math.ceil(Fraction(1, 254) / step) * step


@TIERS
@settings(deadline=None)
@given(found=features())
def test_torch_writes_the_same_bytes_and_reads_the_same_floats(tier: Precision, found: np.ndarray) -> None:
    require_agreement(found, tier, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("tier", ["float16", "int8", "int4"])
@settings(deadline=None)
@given(found=features())
def test_a_gpu_does_too(tier: Precision, found: np.ndarray) -> None:
    require_agreement(np.clip(found, -65504, 65504), tier, "cuda")


@pytest.mark.parametrize("shape", [(2, 3, 4, 70), (5, 64), (2, 2, 2, 1536)])
@pytest.mark.parametrize("tier", ["float32", "float16", "int8", "int4"])
def test_torch_agrees_on_maps_and_vectors(tier: Precision, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    require_agreement((rng.normal(size=shape) * rng.lognormal(size=shape)).astype(np.float32), tier, "cpu")


DEVICES = pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))],
)


@DEVICES
@TIERS
def test_a_group_whose_scale_is_a_float16_gets_just_that_scale(tier: Precision, device: str) -> None:
    """Every float16: a product with the rounded inverse, not a division, would give the next one here and there."""
    scales = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16)
    exact = scales.astype(np.float32)[:, None] * np.float32(LARGEST[tier])
    stored = encode(exact, tier)
    assert stored.scale is not None
    np.testing.assert_array_equal(stored.scale[:, 0], scales)
    np.testing.assert_array_equal(decode(stored, 1), exact)
    for direction in (0, np.inf):
        near = np.nextafter(exact, np.float32(direction))[:-1]
        require_agreement(near, tier, device)
    require_agreement(exact, tier, device)


def require_agreement(found: np.ndarray, tier: Precision, device: str) -> None:
    wanted = encode(found, tier)
    stored = quantise(torch.from_numpy(found).to(device), tier)
    assert stored.arrays.keys() == wanted.arrays.keys()
    for name, array in wanted.arrays.items():
        assert stored.arrays[name].dtype == array.dtype
        assert stored.arrays[name].shape == array.shape
        assert stored.arrays[name].tobytes() == array.tobytes()
    scale = None if wanted.scale is None else torch.from_numpy(wanted.scale).to(device)
    back = decode_on_device(torch.from_numpy(wanted.values).to(device), scale, found.shape[-1])
    assert back.float().cpu().numpy().tobytes() == decode(wanted, found.shape[-1]).tobytes()


@TIERS
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(tier: Precision, poison: float) -> None:
    with pytest.raises(ImageError, match=r"^a\.jpg: the teacher returned NaN") as caught:
        require_storable(np.array([1.0, poison], np.float32), tier, name="a.jpg")
    assert caught.value.reason == "not-finite"


@TIERS
def test_the_largest_value_fits_and_the_next_overflows(tier: Precision) -> None:
    limit = np.float32(LARGEST[tier] * 65504)
    feature = np.array([limit, -limit, 1.0], np.float32)
    require_storable(feature, tier, name="a.jpg")
    assert decode(encode(feature, tier), 3)[:2].tolist() == [limit, -limit]
    beyond = np.nextafter(limit, np.float32(np.inf))
    with pytest.raises(ImageError, match=rf"^a\.jpg: .* does not fit {tier} \(largest: {int(limit)}\)") as caught:
        require_storable(np.array([-beyond], np.float32), tier, name="a.jpg")
    assert caught.value.reason == "overflow"
    assert "--precision float32" in caught.value.remedy


@TIERS
def test_zeros_come_back_as_zeros(tier: Precision) -> None:
    assert (decode(encode(np.zeros((2, 70), np.float32), tier), 70) == 0).all()


@pytest.mark.parametrize("tier", ["float32", "float16", "int8", "int4"])
def test_a_blank_row_decodes_to_nan(tier: Precision) -> None:
    empty = blank(2, (3, 2, 67), tier)
    assert decode(empty, 67).shape == (2, 3, 2, 67)
    assert np.isnan(decode(empty, 67)).all()
    empty[1] = encode(np.ones((3, 2, 67), np.float32), tier)
    assert np.isnan(decode(empty, 67)[0]).all()
    assert (decode(empty[1], 67) == 1).all() or tier in LARGEST
    np.testing.assert_allclose(decode(empty[1], 67), 1, rtol=2.0**-10)
