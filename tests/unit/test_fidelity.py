"""Figures of fidelity against the trainer's own losses, and against what can be worked out by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from store_support import make_store

from olapipe import fidelity
from olapipe.compare_tiers import Request, compare_tiers
from olapipe.fidelity import all_tiers, measure, smallest
from olapipe.gradients import change, contrastive, predictions_at, smooth_l1
from olapipe.klt import fit_basis
from olapipe.sample import Sampled, split, spread
from olaschema.errors import ConfigError, CorpusError
from olatrain.losses import Targets, info_nce_loss, smooth_l1_loss


def draw(count: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Maps with a mean map, strong and weak components, as float32."""
    rng = np.random.default_rng([seed, 1])
    channels = shape[-1]
    fixed = np.random.default_rng(7)
    mixing = fixed.normal(size=(channels, channels)) * 0.7 ** np.arange(channels)[:, None]
    mean = 2 * fixed.normal(size=shape)
    return (mean + rng.normal(size=(count, *shape)) @ mixing).astype(np.float32)


@pytest.mark.parametrize("scale", [0.3, 4.0])
def test_losses_and_gradients_are_the_trainers(scale: float) -> None:
    rng = np.random.default_rng(0)
    prediction, target = scale * rng.normal(size=(5, 12)), scale * rng.normal(size=(5, 12))
    leaf = torch.from_numpy(prediction).requires_grad_()
    targets = Targets.local(torch.from_numpy(target), torch.ones(5, dtype=torch.bool), torch.arange(5))
    for ours, theirs in (
        (smooth_l1(prediction, target), smooth_l1_loss(leaf, targets)),
        (contrastive(prediction, target, 2.0), info_nce_loss(leaf, targets, torch.tensor(2.0))),
        (contrastive(prediction, target, 9.0), info_nce_loss(leaf, targets, torch.tensor(9.0))),
    ):
        (gradient,) = torch.autograd.grad(theirs.mean, leaf)
        assert ours[0] == pytest.approx(float(theirs.mean.detach()), rel=1e-5)
        np.testing.assert_allclose(ours[1], gradient.numpy(), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("cosine", [0.5, 0.8, 0.9])
def test_predictions_have_the_cosine_asked_for_and_the_length_of_the_best_predictor(cosine: float) -> None:
    exact, mean = draw(4, (6,)).reshape(4, -1).astype(np.float64), draw(1, (6,), seed=3).ravel()
    centred, found = exact - mean, predictions_at(exact, mean, cosine) - mean
    lengths = np.linalg.norm(centred, axis=1)
    np.testing.assert_allclose((found * centred).sum(axis=1) / lengths / np.linalg.norm(found, axis=1), cosine)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), cosine * lengths)


def test_the_change_of_a_gradient_by_hand() -> None:
    rng = np.random.default_rng(2)
    exact = 0.1 * rng.normal(size=(40, 500))
    error = 0.01 * rng.normal(size=exact.shape)
    found = change(exact, exact + error, np.zeros(500), 0.9)
    # smooth-L1 is quadratic here: the gradient is what is not predicted, 0.19 of the variance, plus the error
    assert found.smooth_l1 == pytest.approx(1 / np.sqrt(1 + 0.01 / 0.19), abs=2e-3)
    # the contrastive gradient is about the target, all of it: the same error matters less
    assert found.smooth_l1 < found.contrastive < 1
    same = change(exact, exact, np.zeros(500), 0.9)
    assert (same.loss, same.gradient_error) == (0.0, pytest.approx(0.0, abs=1e-12))


@pytest.mark.parametrize("shape", [(4, 5, 70), (64,)])
@pytest.mark.parametrize("aim", [0.01, 0.002])
def test_a_fitted_basis_meets_its_aim_on_other_images(shape: tuple[int, ...], aim: float) -> None:
    fitting, scored = draw(300, shape), draw(40, shape, seed=1)
    basis = fit_basis(list(fitting), aim)
    for rotation in (basis.places, basis.channels):
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(len(rotation)), atol=2e-6)
    strengths = basis.forward(scored).reshape(-1, shape[-1]).var(axis=0)
    assert strengths[0] > strengths[len(strengths) // 2] > strengths[-1]
    found = measure(scored, fitting.mean(axis=0), "klt", basis)
    assert aim / 3 < 1 - found.changes[-1].smooth_l1 < aim
    again = fit_basis(list(fitting), aim)
    assert again.to_bytes() == basis.to_bytes()


def test_the_tier_beats_int8_at_a_smaller_error() -> None:
    fitting, scored = draw(60, (4, 5, 70)), draw(40, (4, 5, 70), seed=1)
    mean = fitting.mean(axis=0)
    int8 = measure(scored, mean, "int8")
    klt = measure(scored, mean, "klt", fit_basis(list(fitting), int8.gradient_error / 2))
    assert klt.gradient_error < int8.gradient_error
    assert klt.stored_bytes is not None
    assert int8.stored_bytes is not None
    assert klt.stored_bytes < 0.75 * int8.stored_bytes


def test_bytes_before_entropy_coding() -> None:
    """Int8 is at most 0.52 of float16: one byte for two, a scale for 64 channels, an offset for each channel."""
    features = draw(8, (24, 24, 128))
    sizes = {tier: measure(features, features.mean(axis=0), tier).raw_bytes for tier in ("float32", "float16", "int8")}
    values = 576 * 128
    assert sizes == {"float32": 4 * values, "float16": 2 * values, "int8": values + values // 32 + 2 * 128}
    assert sizes["int8"] / sizes["float16"] < 0.52
    # ordinary channels, no outliers: the gradient keeps its direction
    found = measure(features, features.mean(axis=0), "int8")
    assert min(found.changes[-1].smooth_l1, found.changes[-1].contrastive) > 0.999


def test_the_smallest_that_passes_is_chosen() -> None:
    fitting, scored = draw(60, (4, 5, 70)), draw(40, (4, 5, 70), seed=1)
    tiers, _ = all_tiers(fitting, scored, 0.01)
    assert [tier.name for tier in tiers] == ["float32", "float16", "int8", "int4", "klt"]
    assert smallest(tiers, 0.01).name == "klt"
    assert smallest(tiers, 1e-12).name == "float32"
    assert smallest([tier for tier in tiers if tier.name != "klt"], 1e-4).name == "float16"
    large = measure(np.full((8, 2), 1e6, np.float32), np.zeros(2), "float16")
    assert "overflow" not in large.problem and "float16" in large.problem
    assert smallest([large, tiers[0]], 0.01) is tiers[0]


def test_samples_are_spread_and_never_scored_on_what_was_fitted() -> None:
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(3, 9) == [0, 1, 2]
    features = np.arange(11, dtype=np.float32)[:, None]
    fitting, scored = split(Sampled([str(i) for i in range(11)], features), 4)
    assert sorted([*fitting.ravel(), *scored.ravel()]) == list(range(11))
    assert len(scored) == 4
    with pytest.raises(CorpusError, match="8 are needed"):
        split(Sampled(["a"] * 7, features[:7]), 4)


def test_a_store_is_its_own_reference(tmp_path: Path) -> None:
    make_store(tmp_path / "s", count=20, grid=(2, 2), channels=64)
    found = compare_tiers(Request(str(tmp_path / "s"), "depth", samples=20))
    by_name = {tier.name: tier for tier in found.figures}
    assert by_name["float16"].relative_l2 == 0.0  # they were float16 already
    assert any("as stored, float16" in note for note in found.notes)
    assert any("no yardstick" in note for note in found.notes)
    make_store(tmp_path / "i", count=20, precision="int8", grid=(2, 2), channels=64)
    with pytest.raises(ConfigError, match="int8"):
        compare_tiers(Request(str(tmp_path / "i"), "depth"))


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_plot_is_drawn(tmp_path: Path, kind: str) -> None:
    tiers, _ = all_tiers(draw(20, (2, 2, 8)), draw(9, (2, 2, 8), seed=1), 0.01)
    fidelity.plot(tmp_path / f"p.{kind}", "depth", tiers)
    start = (tmp_path / f"p.{kind}").read_bytes()[:400]
    assert start.startswith(b"\x89PNG") if kind == "png" else b"<svg" in start
    with pytest.raises(ConfigError, match=r"p\.jpg"):
        fidelity.plot(tmp_path / "p.jpg", "depth", tiers)


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="matplotlib") as caught:
        fidelity.plot(tmp_path / "p.png", "depth", [])
    assert "ola-distill[plot]" in str(caught.value.remedy)
