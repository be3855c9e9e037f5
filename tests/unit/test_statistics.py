"""Norm histograms, drift and dull channels, against sums written out here with numpy alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pipeline_support import olapipe
from store_support import fill_shard, images, make_store, record

from olapipe.drift import ShardStatistics, drifts, dull_channels
from olaschema.digest import sealed
from olaschema.layout import receipt_file
from olaschema.manifest import ChannelStatistics
from olaschema.norms import NormHistogram, edges
from olaschema.store import FeatureStore

FIXTURES = Path(__file__).parents[1] / "fixtures" / "store_v1"


def _histogram(features: np.ndarray) -> NormHistogram:
    statistics = ChannelStatistics(features.shape[-1])
    statistics.update(features)
    return statistics.norms


def test_the_bins_are_those_of_numpy() -> None:
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(4000, 7)) * 10 ** rng.uniform(-6, 6, size=(4000, 1))).astype(np.float32)
    features[:5] = 0
    found = _histogram(features)
    norms = np.linalg.norm(features[5:].astype(np.float64), axis=1)
    expected, _ = np.histogram(norms, bins=edges(found.first, len(found.counts)))
    np.testing.assert_array_equal(found.counts, expected)
    assert (found.zero, found.total) == (5, 4000)
    assert found.counts[0] and found.counts[-1]


def test_a_norm_on_an_edge_opens_its_bin() -> None:
    for octave in (-20, 0, 7):
        found = _histogram(np.asarray([[2.0**octave, 0.0]], np.float32))
        assert (found.first, found.counts.tolist()) == (8 * octave, [1])
    tiny = _histogram(np.asarray([[2.0**-149], [3e38]], np.float32))
    assert tiny.first == -149 * 8 and tiny.total == 2


def test_shards_merge_exactly_in_any_order() -> None:
    rng = np.random.default_rng(1)
    parts = [(rng.normal(size=(n, 3)) * s).astype(np.float32) for n, s in ((50, 1), (3, 1e-3), (70, 200), (1, 0))]
    whole = _histogram(np.concatenate(parts))
    for order in ((0, 1, 2, 3), (3, 2, 1, 0)):
        merged = NormHistogram()
        for index in order:
            merged.merge(NormHistogram.from_json(json.loads(json.dumps(_histogram(parts[index]).to_json()))))
        assert merged.to_json() == whole.to_json()


def test_quantiles_lie_in_the_bin_of_the_value() -> None:
    features = np.random.default_rng(2).gamma(3.0, size=(5000, 1)).astype(np.float32)
    found = _histogram(features)
    for share in (0.01, 0.5, 0.99):
        assert found.quantile(share) == pytest.approx(np.quantile(features, share), rel=2 ** (1 / 8) - 1)
    assert _histogram(np.zeros((3, 2), np.float32)).quantile(0.5) == 0


@pytest.mark.parametrize(
    "broken",
    [None, {}, {"zero": -1, "first": 0, "counts": []}, {"zero": 0, "first": 0.5, "counts": [1]},
     {"zero": 0, "first": 0, "counts": [1, -1]}, {"zero": 0, "first": 0, "counts": 3}],
)  # fmt: skip
def test_what_is_no_histogram_is_refused(broken: object) -> None:
    with pytest.raises(ValueError, match="norms"):
        NormHistogram.from_json(broken)


def test_the_receipt_holds_the_norms_of_all_channels_statistics(tmp_path: Path) -> None:
    store, _, values = make_store(tmp_path / "s", precision="float32", count=6, rows_per_shard=4)
    found = store.statistics("depth")
    tokens = values[:6].reshape(-1, 5).astype(np.float64)
    expected, _ = np.histogram(np.linalg.norm(tokens, axis=1), bins=edges(found.norms.first, len(found.norms.counts)))
    np.testing.assert_array_equal(found.norms.counts, expected)
    np.testing.assert_allclose(found.variance, tokens.var(axis=0), rtol=1e-12)


def test_receipts_without_norms_are_read_and_merged() -> None:
    store = FeatureStore.open(FIXTURES / "float32")
    assert "norms" not in (store.receipt("depth", 0) or pytest.fail()).statistics
    found = store.statistics("depth")
    assert found.count > 0 and found.norms.total == 0
    shown = json.loads(olapipe("inspect", FIXTURES / "float32", "--json").stdout)
    assert shown["teachers"]["depth"]["token_norms"] is None
    assert olapipe("verify", FIXTURES / "float32").exit_code == 0


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "int4"])
def test_verify_accepts_norms_of_the_features_and_finds_others(tmp_path: Path, precision: str) -> None:
    store, _, _ = make_store(tmp_path / "s", precision=precision, channels=70)  # type: ignore[arg-type]
    assert olapipe("verify", tmp_path / "s").exit_code == 0
    receipt = store.receipt("depth", 0)
    assert receipt is not None
    norms = dict(receipt.statistics["norms"])
    for wrong in (
        norms | {"first": norms["first"] + 3},
        norms | {"zero": 1},
        norms | {"counts": [*norms["counts"][:-1], norms["counts"][-1] - 1], "zero": 1},
        {"zero": 0},
    ):
        changed = receipt.model_copy(update={"statistics": receipt.statistics | {"norms": wrong}})
        store.place.publish(receipt_file("depth", 0), sealed(changed))
        result = olapipe("verify", tmp_path / "s")
        assert result.exit_code == 1
        assert "norms" in result.stdout


def _shards(rng: np.random.Generator, count: int, images: int, last: int) -> list[np.ndarray]:
    sizes = [images] * (count - 1) + [last]
    # tokens of one image have a mean of their own, as features have
    return [(rng.normal(size=(n, 1, 12)) + rng.normal(size=(n, 9, 12)) + 3).astype(np.float32) for n in sizes]


def _told(shards: list[np.ndarray]) -> list[ShardStatistics]:
    told = []
    for number, features in enumerate(shards):
        statistics = ChannelStatistics(features.shape[-1])
        statistics.update(features)
        told.append(ShardStatistics(number, len(features), statistics))
    return told


def test_drift_is_the_formula_that_the_docs_name() -> None:
    shards = _shards(np.random.default_rng(3), 6, 8, 8)
    found = drifts(_told(shards))
    for number, drift in enumerate(found):
        mine = shards[number].reshape(-1, 12).astype(np.float64)
        rest = np.concatenate([s for i, s in enumerate(shards) if i != number]).reshape(-1, 12).astype(np.float64)
        effect = (mine.mean(0) - rest.mean(0)) / rest.std(0)
        assert drift.shift == pytest.approx(np.sqrt((effect**2).mean()), rel=1e-9)
        assert drift.channel == np.abs(effect).argmax()
        bins = 2.0 ** (np.arange(-80, 80) / 8)
        p, q = (np.histogram(np.linalg.norm(x, axis=1), bins)[0] / len(x) for x in (mine, rest))
        m = (p + q) / 2
        terms = [np.where(x > 0, x * np.log2(np.where(x > 0, x, 1) / np.where(m > 0, m, 1)), 0).sum() for x in (p, q)]
        assert drift.divergence == pytest.approx(sum(terms) / 2, abs=1e-9)


def test_a_shard_of_other_images_is_flagged_and_a_short_one_is_not() -> None:
    for seed in range(5):
        shards = _shards(np.random.default_rng(seed), 20, 16, 1)
        assert not [drift.shard for drift in drifts(_told(shards)) if drift.flagged]
        shards[7] = shards[7] * 1.0
        shards[7][..., 4] += 8
        shards[11] = shards[11] * 2.0
        assert [drift.shard for drift in drifts(_told(shards)) if drift.flagged] == [7, 11]


def test_constant_channels_and_few_shards_make_no_drift() -> None:
    shards = _shards(np.random.default_rng(4), 4, 8, 8)
    for features in shards:
        features[..., 2] = 0.1
    found = drifts(_told(shards))
    assert all(drift.shift_z is None and not drift.flagged for drift in found)
    assert all(np.isfinite(drift.shift) and drift.channel != 2 for drift in found)
    assert drifts(_told(shards[:1])) == []


def test_dull_channels_are_named() -> None:
    rng = np.random.default_rng(5)
    features = rng.normal(size=(500, 8)).astype(np.float32)
    features[:, 1] = 3
    features[:, 4] = 100 + 1e-3 * features[:, 4]
    features[:, 6] *= 1e-4
    statistics = ChannelStatistics(8)
    statistics.update(features)
    found = dull_channels(statistics)
    assert (found.dead, found.near_constant) == ([1], [4, 6])


def test_inspect_says_what_stands_out(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / "s", rows_per_shard=4)
    store.add_generation(images(32))
    teacher = record("float32")
    store.put_teacher(teacher)
    rng = np.random.default_rng(6)
    for shard in range(8):
        features = rng.normal(size=(4, 3, 3, 5)).astype(np.float32) + (9 if shard == 3 else 0)
        features[..., 1] = 2
        features[0, 0, 0] *= np.float32(shard != 3)
        fill_shard(store, teacher, shard, features)
    shown = olapipe("inspect", tmp_path / "s").stdout
    assert "shard 3 differs from the others" in shown
    assert "1 of 288 tokens are zero in every channel" in shown
    found = json.loads(olapipe("inspect", tmp_path / "s", "--json").stdout)["teachers"]["depth"]
    assert [drift["shard"] for drift in found["drift"] if drift["flagged"]] == [3]
    assert sum(found["token_norms"]["counts"]) + 1 == found["token_norms"]["tokens"] == found["token_norms"]["of"]
