"""Targets standardised by channel: the store's statistics, saved with the predictors, and invertible."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn import functional
from trainer_support import Corpus, make_corpus, settings

from olaschema.config import load_config
from olaschema.errors import ConfigError
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore
from olatrain.config import TrainConfig
from olatrain.export import export, load_trained
from olatrain.order import PositionSampler
from olatrain.parallel import open_ranks
from olatrain.predictors import Standard
from olatrain.setup import set_up
from olatrain.step import run_batch
from olatrain.stream import Batch, make_loader
from olatrain.train import train

# receipts hold the statistics of the features before they were rounded to float16, which is what is read back here
ROUNDING = 2.0**-11


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def _train(corpus: Corpus, student: Path, out: Path, **changes: object) -> TrainConfig:
    config = load_config(TrainConfig, flags=settings(corpus, student, out, **changes))
    train(config, Console(file=io.StringIO()))
    return config


def _features(corpus: Corpus, teacher: str) -> np.ndarray:
    store = FeatureStore.open(corpus.store)
    reader = FeatureReader(store, teacher)
    return np.stack([reader.feature(row.row) for row in store.samples()])


def test_the_loss_is_against_targets_of_mean_0_and_deviation_1(corpus: Corpus, student: Path, tmp_path: Path) -> None:
    chosen = settings(corpus, student, tmp_path / "run", normalise="channel", contrastive=0.0)
    with open_ranks("cpu", nproc=1) as ranks, torch.no_grad():
        run = set_up(load_config(TrainConfig, flags=chosen), ranks)
        sampler = PositionSampler(start=0, end=len(run.stream), batch=len(run.stream), rank=0, world=1)
        (batch,) = make_loader(run.stream, sampler, run.collate, workers=0, pin=False)
        assert isinstance(batch, Batch)
        totals = run_batch(run.learner, batch, ranks, run.means, bf16=False)
        (micro,) = batch.micro
        output = run.learner.student(micro.inputs)
        predictions = run.learner.bank(output.taps, micro.items, run.learner.student.latents)
    for teacher, layer in (("depth", 2), ("gen", 1), ("gen", 3)):
        everything = _features(corpus, teacher).astype(np.float64)
        flat = everything.reshape(-1, everything.shape[-1])
        wanted = (everything - flat.mean(axis=0)) / flat.std(axis=0)
        targets = torch.from_numpy(wanted[batch.rows.numpy()]).float()
        loss = functional.smooth_l1_loss(predictions[teacher, layer], targets, reduction="none")
        expected = float(loss.flatten(1).mean(dim=1).sum())
        assert totals[f"{teacher}.{layer}.smooth_l1"] == pytest.approx(expected, rel=ROUNDING)


def test_it_is_undone_by_invert_and_a_constant_channel_stays_finite() -> None:
    features = torch.randn(7, 3, 4)
    features[..., 1] = 5.0
    flat = features.flatten(0, 1)
    standard = Standard(flat.mean(dim=0), flat.std(dim=0, correction=0))
    standardised = standard(features)
    assert torch.isfinite(standardised).all()
    assert standardised[..., 0].mean().abs() < 1e-6
    assert standardised[..., 0].std(correction=0) == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(standard.invert(standardised), features)


def test_statistics_travel_with_checkpoint_and_export(corpus: Corpus, student: Path, tmp_path: Path) -> None:
    _train(corpus, student, tmp_path / "run", normalise="channel")
    trained = load_trained(tmp_path / "run")
    flat = _features(corpus, "depth").reshape(-1, 5).astype(np.float64)
    found = trained.learner.bank.standards["depth"]
    np.testing.assert_allclose(found.get_buffer("mean"), flat.mean(axis=0), rtol=ROUNDING)
    np.testing.assert_allclose(found.get_buffer("deviation"), flat.std(axis=0), rtol=ROUNDING)
    export(tmp_path / "run", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"depth with normalise = channel|gen with normalise = channel"):
        _train(corpus, tmp_path / "out", tmp_path / "raw", steps=1)
    _train(corpus, tmp_path / "out", tmp_path / "again", steps=1, normalise="channel")
    _train(corpus, tmp_path / "out", tmp_path / "fresh", steps=1, init="fresh")


def test_stopping_and_going_on_is_bit_identical(corpus: Corpus, student: Path, tmp_path: Path) -> None:
    _train(corpus, student, tmp_path / "whole", normalise="channel", steps=4)
    _train(corpus, student, tmp_path / "parts", normalise="channel", steps=4, stop_after=2)
    _train(corpus, student, tmp_path / "parts", normalise="channel", steps=4)
    whole, parts = (load_trained(tmp_path / name).learner.state() for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
