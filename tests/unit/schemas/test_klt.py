"""The tier klt against an encoding written here, its stated bound, and its basis file."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from store_support import fill_shard, images, put, record, small_basis

from olapipe.quantise import DeviceBasis, quantise
from olaschema.basis import Basis
from olaschema.errors import DamagedStoreError, ImageError, StoreError
from olaschema.precision import decode, encode, require_storable
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore
from olatrain.scaling import StoredBasis
from olatrain.scaling import decode as decode_on_device

SCALES = [2.0**-149, 2.0**-126, 2.0**-40, 2.0**-24, 1e-3, 1.0, 300.0, 4e5]


@st.composite
def maps(draw: st.DrawFn) -> tuple[np.ndarray, Basis]:
    """Maps and vectors of any channel count with outlier channels, zeros and denormals, and a basis for them."""
    shape = (*draw(st.sampled_from([(), (1, 1), (2, 3)])), draw(st.sampled_from([1, 2, 5, 63, 64, 65, 129])))
    unit = draw(hnp.arrays(np.float32, shape, elements=st.floats(-1, 1, width=32)))
    with np.errstate(under="ignore"):
        found = unit * np.float32(draw(st.sampled_from(SCALES)))
        found[..., draw(st.integers(0, shape[-1] - 1))] *= np.float32(draw(st.sampled_from([1.0, 50.0, 2.0**-60])))
    reach = np.float32(7e6 / np.sqrt(found.size))  # further from the mean map is refused
    found = np.clip(found, -reach, reach)
    step = draw(st.sampled_from([2.0**-24, 2.0**-8, 0.5]))
    return found, small_basis(shape, seed=draw(st.integers(0, 3)), step=step)


def length(values: np.ndarray) -> float:
    return float(np.linalg.norm(values.astype(np.float64)))


@settings(deadline=None)
@given(drawn=maps())
def test_the_error_of_a_map_is_within_its_bound(drawn: tuple[np.ndarray, Basis]) -> None:
    found, basis = drawn
    stored = encode(found, "klt", basis)
    assert stored.scale is not None
    steps = np.repeat(stored.scale.astype(np.float64), 64, axis=-1)[..., : found.shape[-1]]
    differs = length(found.reshape(basis.mean.shape).astype(np.float64) - basis.mean)
    bound = length(steps) / 2 * (1 + 2.0**-8) + 2.0**-16 * (length(basis.mean) + differs)
    for decoded in (
        decode(stored, found.shape[-1], basis),
        decode_on_device(
            torch.from_numpy(stored.values), torch.from_numpy(stored.scale), found.shape[-1], StoredBasis(basis)
        ).numpy(),
    ):
        assert decoded.shape == found.shape
        assert decoded.dtype == np.float32
        assert length(decoded.astype(np.float64) - found) <= bound
    # the scales themselves: the step, unless a coefficient of the group needs more, rounded up to a float16
    exact = basis.places.astype(np.float64) @ (found.reshape(basis.mean.shape) - basis.mean.astype(np.float64))
    exact = (exact @ basis.channels.T.astype(np.float64)).reshape(found.shape)
    for group in range(stored.scale.shape[-1]):
        largest = np.abs(exact[..., 64 * group : 64 * (group + 1)]).max(axis=-1)
        least = np.maximum(largest / 127, basis.step)
        assert (stored.scale[..., group] >= least * (1 - 2.0**-15) - 1e-6).all()
        assert (stored.scale[..., group] <= least * (1 + 2.0**-9) + 2.0**-23 + 1e-5).all()
    assert np.abs(stored.values.astype(int)).max() <= 127


@settings(deadline=None)
@given(drawn=maps())
def test_torch_is_within_one_of_numpy(drawn: tuple[np.ndarray, Basis]) -> None:
    found, basis = drawn
    ours = encode(found[None], "klt", basis)
    theirs = quantise(torch.from_numpy(found[None]), "klt", DeviceBasis(basis, torch.device("cpu")))
    assert ours.scale is not None
    assert theirs.scale is not None
    slack = 2.0**-16 * (length(basis.mean) + length(found)) / np.minimum(ours.scale, theirs.scale).astype(np.float64)
    slack = np.repeat(slack, 64, axis=-1)[..., : found.shape[-1]]
    scales = np.abs(ours.scale.astype(np.float64) / theirs.scale - 1) * 127
    allowed = 1 + slack + np.repeat(scales, 64, axis=-1)[..., : found.shape[-1]]
    assert (np.abs(ours.values.astype(int) - theirs.values.astype(int)) <= allowed).all()


def test_weak_components_become_zeros_and_strong_ones_do_not() -> None:
    basis = Basis(np.zeros((1, 3), np.float32), np.eye(1, dtype=np.float32), np.eye(3, dtype=np.float32)[::-1], 0.25)
    stored = encode(np.array([0.1, -0.6, 5.0], np.float32), "klt", basis)
    assert stored.values.tolist() == [20, -2, 0]  # the last channel is the first component
    assert stored.scale is not None
    assert stored.scale.tolist() == [0.25]
    assert decode(stored, 3, basis).tolist() == [0.0, -0.5, 5.0]


@pytest.mark.parametrize(
    ("value", "reason"), [(np.nan, "not-finite"), (np.inf, "not-finite"), (8e6, "overflow"), (-8e6, "overflow")]
)
def test_what_does_not_fit_is_refused_with_the_image_named(value: float, reason: str) -> None:
    feature = np.zeros(70, np.float32)
    feature[3] = value
    with pytest.raises(ImageError, match=r"a\.png") as caught:
        require_storable(feature, "klt", name="a.png", basis=small_basis((70,)))
    assert caught.value.reason == reason


def test_the_largest_that_fits_is_not_clipped() -> None:
    basis = small_basis((70,))
    feature = (basis.mean[0] + basis.channels[0] * np.float32(7.4e6)).astype(np.float32)
    require_storable(feature, "klt", name="a.png", basis=basis)
    decoded = decode(encode(feature, "klt", basis), 70, basis)
    assert np.isfinite(decoded).all()
    assert length(decoded - feature) < 0.5 * 7.4e6 / 127 * np.sqrt(70) * 1.01


def test_without_a_basis_nothing_is_encoded() -> None:
    with pytest.raises(StoreError, match="basis"):
        encode(np.zeros(5, np.float32), "klt")
    with pytest.raises(StoreError, match="basis"):
        quantise(torch.zeros(1, 5), "klt")


def stored_features(root: Path) -> tuple[FeatureStore, np.ndarray]:
    store = FeatureStore.create(root, rows_per_shard=4)
    store.add_generation(images(3))
    teacher = record("klt", grid=(2, 3), channels=67)
    put(store, teacher)
    features = np.random.default_rng(1).normal(size=(3, 2, 3, 67)).astype(np.float32)
    return store, fill_shard(store, teacher, 0, features)


def test_a_store_keeps_its_basis_and_refuses_another_one(tmp_path: Path) -> None:
    store, decoded = stored_features(tmp_path / "s")
    reader = FeatureReader(store, "depth")
    np.testing.assert_array_equal(reader.feature(1), decoded[1])
    assert np.isnan(decoded[3]).all()
    file = tmp_path / "s" / "bases" / "depth.npy"
    flat = np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)
    basis = small_basis((2, 3, 67))
    assert flat.tobytes() == b"".join(part.tobytes() for part in (basis.mean, basis.places, basis.channels))
    before = file.read_bytes()
    other = small_basis((2, 3, 67), seed=9)
    again = record("klt", grid=(2, 3), channels=67).model_copy(update={"basis": other.record(4)})
    with pytest.raises(StoreError, match="basis"):
        store.put_teacher(again, other)
    assert file.read_bytes() == before
    with pytest.raises(StoreError, match="basis"):
        store.put_teacher(record("klt", teacher="seg"))


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_basis_is_named(tmp_path: Path, damage: str) -> None:
    store, _ = stored_features(tmp_path / "s")
    file = tmp_path / "s" / "bases" / "depth.npy"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(bytes(data) if damage == "flip" else bytes(data[:-4]))
    with pytest.raises(DamagedStoreError, match=r"bases/depth\.npy"):
        FeatureReader(store, "depth").feature(0)
