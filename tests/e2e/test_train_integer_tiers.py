"""Training on stored integers is training on the floats they decode to; only less is read, moved and gathered."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from rich.console import Console
from run_support import weights
from store_support import DOCS, EXECUTION, decoding, record
from torch import Tensor
from trainer_support import Corpus, end_all, make_corpus, metrics, settings, start_ranks

from olaschema.config import load_config
from olaschema.errors import DamagedStoreError
from olaschema.manifest import ChannelStatistics, Precision
from olaschema.precision import Stored
from olaschema.store import FeatureStore
from olatrain.config import TrainConfig
from olatrain.parallel import Ranks
from olatrain.setup import set_up
from olatrain.step import _gather, run_batch
from olatrain.stream import Batch
from olatrain.train import train

CHANNELS = {"depth": 67, "gen": 131}
GRIDS: dict[str, tuple[int, int] | None] = {"depth": (2, 2), "gen": None}
TIERS = pytest.mark.parametrize("tier", ["int8", "int4"])


def corpus_of(root: Path, tier: Precision) -> Corpus:
    teachers = {
        name: record(tier, teacher=name, grid=GRIDS[name], channels=channels) for name, channels in CHANNELS.items()
    }
    return make_corpus(root, images=7, texts=2, teachers=teachers, failed={"01.png": "depth"})


def decoded_copy(store: Path, tier: Precision, root: Path) -> Path:
    """The same store with the features as float32, decoded from plain zarr by the line in the docs."""
    source = FeatureStore.open(store)
    copy = FeatureStore.create(root, rows_per_shard=source.rows_per_shard)
    copy.add_generation(source.samples())
    for name, channels in CHANNELS.items():
        made = source.teacher(name).model_copy(update={"precision": "float32", "centred": False})
        copy.put_teacher(made)
        arrays = {key: array[:] for key, array in zarr.open_group(store, mode="r")[name].arrays()}
        features = decoding(DOCS, tier)(channels=channels, **arrays)
        for shard in source.committed(name):
            receipt = source.receipt(name, shard)
            assert receipt is not None
            rows = features[shard * source.rows_per_shard : (shard + 1) * source.rows_per_shard]
            statistics = ChannelStatistics.from_json(receipt.statistics, channels)
            copy.commit_shard(made, shard, Stored(rows), list(receipt.rows), statistics, EXECUTION)
    return root


def run(values: dict[str, Any], world: int) -> None:
    if world > 1:
        end_all(start_ranks(values | {"nproc": world}, world=world))
    else:
        train(load_config(TrainConfig, flags=values), Console(file=io.StringIO()))


@pytest.mark.parametrize(("tier", "world"), [("int8", 1), ("int4", 1), ("int4", 2)])
def test_training_on_integers_is_training_on_their_decoded_values(
    tier: Precision, world: int, student: Path, tmp_path: Path
) -> None:
    corpus = corpus_of(tmp_path, tier)
    values = settings(corpus, student, tmp_path / "integers", steps=3, workers=1)
    values["evaluation"] = {"conversations": str(corpus.conversations), "every": 2}
    run(values, world)
    floats = decoded_copy(corpus.store, tier, tmp_path / "float32")
    run(values | {"store": str(floats), "out": str(tmp_path / "floats")}, world)
    ours, theirs = weights(tmp_path / "integers"), weights(tmp_path / "floats")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    for event in ("train", "evaluation"):
        one, other = metrics(tmp_path / "integers", event), metrics(tmp_path / "floats", event)
        assert [line["teachers"] for line in one] == [line["teachers"] for line in other]
        assert one[0]["teachers"]["gen"]["mean_map"]["cosine"] > 0


@TIERS
def test_what_is_moved_and_gathered_has_the_size_of_the_integers(
    tier: Precision, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = corpus_of(tmp_path, tier)
    config = load_config(TrainConfig, flags=settings(corpus, student, tmp_path / "out"))
    prepared = set_up(config, Ranks(0, 1, torch.device("cpu")))
    batch = prepared.collate([prepared.stream[position] for position in range(6)])
    assert isinstance(batch, Batch)
    gathered: list[Tensor] = []

    def gather(self: Ranks, values: Tensor) -> list[Tensor]:
        gathered.append(values)
        return [values]

    monkeypatch.setattr(Ranks, "gather", gather)
    run_batch(prepared.learner, batch, prepared.ranks, prepared.means, bf16=False)
    images = len(batch.rows)
    assert images >= 3
    # a row: 4 tokens of 67 channels in 2 groups and 67 offsets, one vector of 131 in 3; int4 rounds odd counts up
    integers = 4 * 67 + 131 if tier == "int8" else 4 * 34 + 66
    moved = [tensor for tensor in gathered if tensor.ndim > 1]
    assert {str(tensor.dtype) for tensor in moved} == {
        "torch.float16",
        "torch.int8" if tier == "int8" else "torch.uint8",
    }
    assert sum(tensor.nbytes for tensor in moved) == images * (integers + 2 * (4 * 2 + 67 + 3))


@TIERS
def test_a_missing_feature_is_masked_and_moved_as_zeros(tier: Precision, student: Path, tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, tier)
    prepared = set_up(
        load_config(TrainConfig, flags=settings(corpus, student, tmp_path / "out")), Ranks(0, 1, torch.device("cpu"))
    )
    places = [place for place in range(len(prepared.stream)) if prepared.stream.name(place) in ("00.png", "01.png")]
    batch = prepared.collate([prepared.stream[place] for place in places])
    assert isinstance(batch, Batch)
    failed = batch.rows.tolist().index(1)
    depth = batch.features["depth"]
    assert depth.valid.tolist() == [place != failed for place in range(2)]
    assert depth.scale is not None
    assert depth.offset is not None
    for array in (depth.values, depth.scale, depth.offset):
        assert array[1 - failed].any() and not array[failed].any()
    assert np.isfinite(run_batch(prepared.learner, batch, prepared.ranks, prepared.means, bf16=False)["loss"])


def test_targets_in_a_basis_are_decoded_on_the_device(student: Path, tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, "klt")
    config = load_config(TrainConfig, flags=settings(corpus, student, tmp_path / "out"))
    prepared = set_up(config, Ranks(0, 1, torch.device("cpu")))
    batch = prepared.collate([prepared.stream[position] for position in range(6)])
    assert isinstance(batch, Batch)
    found = _gather(batch, prepared.ranks, prepared.learner, None)
    group = zarr.open_group(corpus.store, mode="r")
    for name, channels in CHANNELS.items():
        arrays = {key: array[:] for key, array in group[name].arrays()}
        decoded = decoding(DOCS, "klt")(channels=channels, basis=corpus.store / "bases" / f"{name}.npy", **arrays)
        valid = found[name].valid
        assert valid.any()
        np.testing.assert_allclose(
            found[name].values[valid].numpy(), decoded[batch.rows[valid].numpy()], rtol=1e-4, atol=1e-4
        )
        # the floor is in features too: a mean of coefficients would be another map
        expected = np.nanmean(decoded, axis=0)
        np.testing.assert_allclose(prepared.means[name].numpy(), expected, rtol=1e-4, atol=1e-4)
    # no part of it is trained or saved
    assert not any("bases" in name for name in (*prepared.learner.trainable(), *prepared.learner.state()))
    file = corpus.store / "bases" / "depth.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedStoreError, match=r"bases/depth\.npy"):
        set_up(config, Ranks(0, 1, torch.device("cpu")))
