"""Integers of maps, of which each channel's mean over the image is taken away, against arithmetic written out here."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from store_support import DOCS, decoding

from olapipe.quantise import quantise
from olapipe.stored import decode as decode_for_verify
from olapipe.stored import error_bound
from olaschema.errors import ImageError
from olaschema.manifest import Precision
from olaschema.precision import Stored, array_formats, blank, decode, encode, is_centred, require_storable
from olatrain.scaling import decode as decode_on_device

LARGEST: dict[Precision, int] = {"int8": 127, "int4": 7}
TIERS = pytest.mark.parametrize("tier", ["int8", "int4"])
SIZES = [0.0, 2.0**-149, 2.0**-126, 2.0**-40, 2.0**-24, 1e-3, 1.0, 300.0, 4e5, 8e6]


@st.composite
def maps(draw: st.DrawFn) -> np.ndarray:
    """(H, W, C) of any channel count: channels and tokens of very different sizes, zeros, denormals, outliers."""
    height, width = draw(st.sampled_from([(1, 1), (1, 2), (2, 3), (3, 1)]))
    channels = draw(st.sampled_from([1, 2, 5, 63, 64, 65, 127, 129]))
    unit = draw(hnp.arrays(np.float32, (height, width, channels), elements=st.floats(-1, 1, width=32)))
    sizes = draw(hnp.arrays(np.float32, (height, width, 1), elements=st.sampled_from(SIZES)))
    common = draw(hnp.arrays(np.float32, (channels,), elements=st.floats(-1, 1, width=32)))
    with np.errstate(under="ignore"):
        found = unit * sizes + common * np.float32(draw(st.sampled_from(SIZES)))
        outlier = draw(st.integers(-1, channels - 1))
        if outlier >= 0:
            found[..., outlier] += np.float32(draw(st.sampled_from([50.0, -3e5, 2.0**-60])))
    return np.clip(found, -6 * 65504, 6 * 65504).astype(np.float32)


@TIERS
@settings(deadline=None)
@given(found=maps())
def test_the_error_stays_within_the_stated_bound(tier: Precision, found: np.ndarray) -> None:
    require_storable(found, tier, name="a.jpg", centred=True)
    stored = encode(found, tier, centred=True)
    assert stored.offset is not None
    channels = found.shape[-1]
    back = decode(stored, channels)
    assert (back.dtype, back.shape) == (np.float32, found.shape)
    apart = np.abs(found.astype(np.float64) - stored.offset.astype(np.float64))
    error = np.abs(back.astype(np.float64) - found)
    for first in range(0, channels, 64):
        group = slice(first, first + 64)
        furthest = apart[..., group].max(axis=-1, keepdims=True)
        bound = furthest / (2 * LARGEST[tier]) * (1 + 2.0**-9) + 2.0**-25 + 2.0**-24 * np.abs(back[..., group])
        assert (error[..., group] <= bound).all()
    # by the docs alone, and by the code that verifies, which has a bound of its own from what is stored
    np.testing.assert_array_equal(decoding(DOCS, tier)(channels=channels, **stored.arrays), back)
    np.testing.assert_array_equal(decode_for_verify(stored.arrays, channels), back)
    assert (error <= error_bound(stored.arrays, channels)).all()


@TIERS
@settings(deadline=None, max_examples=40)
@given(found=maps())
def test_offsets_are_means_and_nothing_clips(tier: Precision, found: np.ndarray) -> None:
    stored = encode(found, tier, centred=True)
    assert stored.offset is not None and stored.scale is not None
    for channel in range(found.shape[-1]):
        values = np.clip(found[..., channel], -65504, 65504).astype(np.float16).ravel()
        mean = sum(map(Fraction, values.tolist()), Fraction()) / len(values)
        half = max(2.0 ** (math.frexp(float(mean))[1] - 12), 2.0**-25)  # of the last of 11 bits
        assert abs(Fraction(float(stored.offset[channel])) - mean) <= half * (1 + 2.0**-12)
    residual = found - stored.offset.astype(np.float32)
    alone = encode(residual, tier)  # the form without offsets, which has tests of its own
    assert alone.scale is not None
    assert stored.values.tobytes() == alone.values.tobytes()
    assert stored.scale.tobytes() == alone.scale.tobytes()


@TIERS
@settings(deadline=None)
@given(found=maps())
def test_torch_writes_the_same_bytes_and_reads_the_same_floats(tier: Precision, found: np.ndarray) -> None:
    require_agreement(found[None], tier, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@TIERS
@settings(deadline=None)
@given(found=maps())
def test_a_gpu_does_too(tier: Precision, found: np.ndarray) -> None:
    require_agreement(found[None], tier, "cuda")


@TIERS
def test_images_of_a_batch_have_offsets_of_their_own(tier: Precision) -> None:
    rng = np.random.default_rng(0)
    found = (rng.normal(size=(3, 24, 24, 70)) + 40 * rng.normal(size=(3, 1, 1, 70))).astype(np.float32)
    require_agreement(found, tier, "cpu")
    for index, one in enumerate(found):
        alone = encode(one, tier, centred=True)
        for name, array in encode(found, tier, centred=True)[index].arrays.items():
            assert array.tobytes() == alone.arrays[name].tobytes()


@pytest.mark.parametrize("tokens", [8192, 8193])  # float64 holds the sum of so many, and of one more no longer
def test_the_mean_of_a_large_map_is_exact(tokens: int) -> None:
    """All as large as they can be but one, in three channels: sums of 53 bits."""
    found = np.full((2, tokens, 1, 3), 65504, np.float32)
    found[:, 0, 0] = [2**-24, 0.3, -65504]
    found[1] *= -1
    require_agreement(found, "int8", "cpu")
    offset = encode(found, "int8", centred=True).offset
    assert offset is not None
    for channel in range(3):
        values = found[0, :, 0, channel].astype(np.float16).tolist()
        mean = sum(map(Fraction, values), Fraction()) / tokens
        assert float(offset[0, channel]) == float(np.float16(np.float32(float(mean)))) == -float(offset[1, channel])


def require_agreement(found: np.ndarray, tier: Precision, device: str) -> None:
    wanted = encode(found, tier, centred=True)
    stored = quantise(torch.from_numpy(found).to(device), tier, centred=True)
    assert list(stored.arrays) == list(wanted.arrays) == ["values", "scale", "offset"]
    formats = array_formats(found.shape[1:], tier, centred=True)
    for name, array in wanted.arrays.items():
        assert (array.shape[1:], array.dtype) == (formats[name].shape, formats[name].dtype)
        assert stored.arrays[name].dtype == array.dtype
        assert stored.arrays[name].tobytes() == array.tobytes()
    tensors = {name: torch.from_numpy(array).to(device) for name, array in wanted.arrays.items()}
    back = decode_on_device(channels=found.shape[-1], **tensors)
    assert back.cpu().numpy().tobytes() == decode(wanted, found.shape[-1]).tobytes()


@TIERS
def test_by_hand(tier: Precision) -> None:
    found = np.zeros((1, 2, 65), np.float32)
    found[0, :, 0] = [1000.0 + LARGEST[tier], 1000.0 - LARGEST[tier]]  # stands out, and hardly varies
    found[0, :, 1] = [3.0, -3.0]
    found[0, :, 64] = 0.5
    stored = encode(found, tier, centred=True)
    assert stored.offset is not None and stored.scale is not None
    assert stored.offset[[0, 1, 2, 64]].tolist() == [1000.0, 0.0, 0.0, 0.5]
    assert stored.scale.tolist() == [[[1.0, 2.0**-24], [1.0, 2.0**-24]]]
    assert decode(stored, 65).tobytes() == found.tobytes()


@TIERS
def test_a_channel_that_stands_out_does_not_spoil_its_group(tier: Precision) -> None:
    """Why there are offsets: with a mean 30 times the usual the errors of the others stay what they were."""
    rng = np.random.default_rng(1)
    usual = rng.normal(size=(24, 24, 64)).astype(np.float32)
    standing = usual.copy()
    standing[..., 7] += 30
    rest = [channel for channel in range(64) if channel != 7]
    errors = {}
    for name, found in (("usual", usual), ("standing", standing)):
        for centred in (True, False):
            error = decode(encode(found, tier, centred=centred), 64) - found
            errors[name, centred] = float(np.square(error[..., rest]).mean())
    assert errors["standing", True] == pytest.approx(errors["usual", True], rel=0.01)
    assert errors["standing", False] > 20 * errors["usual", False] if tier == "int8" else 5 * errors["usual", False]


@TIERS
def test_the_largest_value_fits_and_the_next_overflows(tier: Precision) -> None:
    limit = np.float32((LARGEST[tier] - 1) * 65504)
    for signs in ((1, 1), (1, -1), (-1, -1)):
        feature = np.stack([np.full(3, limit * sign, np.float32) for sign in signs])[None]
        feature[..., 0] = limit
        require_storable(feature, tier, name="a.jpg", centred=True)
        back = decode(encode(feature, tier, centred=True), 3)
        assert (np.abs(back - feature) <= (limit + 65504) / (2 * LARGEST[tier]) * 1.01).all()
    beyond = np.nextafter(limit, np.float32(np.inf))
    with pytest.raises(ImageError, match=rf"^a\.jpg: .* does not fit {tier} \(largest: {int(limit)}\)") as caught:
        require_storable(np.full((1, 1, 1), -beyond), tier, name="a.jpg", centred=True)
    assert caught.value.reason == "overflow"
    with pytest.raises(ImageError, match="NaN or infinity"):
        require_storable(np.full((1, 1, 1), np.nan, np.float32), tier, name="a.jpg", centred=True)


@TIERS
def test_a_blank_row_decodes_to_nan(tier: Precision) -> None:
    empty = blank(2, (3, 2, 67), tier, centred=True)
    assert decode(empty, 67).shape == (2, 3, 2, 67)
    assert np.isnan(decode(empty, 67)).all()
    empty[1] = encode(np.full((3, 2, 67), 0.3, np.float32), tier, centred=True)
    assert np.isnan(decode(empty, 67)[0]).all()
    np.testing.assert_allclose(decode(empty[1], 67), 0.3, rtol=2.0**-11)
    assert isinstance(empty[0], Stored) and set(empty[0].arrays) == {"values", "scale", "offset"}


def test_maps_of_integers_are_centred_and_nothing_else() -> None:
    shapes = ((24, 24, 8), (8,))
    tiers: tuple[Precision, ...] = ("float32", "float16", "int8", "int4", "klt")
    found = [(shape, tier) for shape in shapes for tier in tiers if is_centred(shape, tier)]
    assert found == [((24, 24, 8), "int8"), ((24, 24, 8), "int4")]


def test_int8_costs_at_most_52_percent_of_float16_at_the_published_sizes() -> None:
    shapes = {"depth": (24, 24, 1024), "seg": (24, 24, 1536), "gen": (1024,)}
    cost = {
        tier: sum(
            math.prod(array.shape) * array.dtype.itemsize
            for shape in shapes.values()
            for array in array_formats(shape, tier, centred=is_centred(shape, tier)).values()
        )
        for tier in ("float16", "int8", "int4")
    }
    # 576·1024 + 576·1536 + 1024 values, a float16 scale for every 64, a float16 offset for each channel of the maps
    values, beside = 576 * 1024 + 576 * 1536 + 1024, 2 * (1024 + 1536)
    assert cost == {
        "float16": 2 * values,
        "int8": values + values // 32 + beside,
        "int4": values // 2 + values // 32 + beside,
    }
    assert cost["int8"] <= 0.52 * cost["float16"]
    assert cost["int4"] <= 0.27 * cost["float16"]
