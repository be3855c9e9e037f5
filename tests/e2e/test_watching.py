"""What a run tells about itself, against computations of the test's own."""

from __future__ import annotations

import io
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional
from trainer_support import Corpus, end_all, make_corpus, metrics, settings, start_ranks
from typer.testing import CliRunner

from olapipe.cli import app as olapipe_app
from olaschema.config import load_config
from olaschema.errors import ConfigError
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore
from olatrain.config import TrainConfig
from olatrain.insight import Insight, _Spread, due, entropy_rank
from olatrain.parallel import Ranks
from olatrain.setup import Run, set_up
from olatrain.step import run_batch
from olatrain.stream import Batch, Sample
from olatrain.train import train
from olatrain.watch import below_mean_map, last_events

LLM = ["projector", "predictors", "task_tokens", "llm"]
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The third image is used twice, the fifth has no depth."""
    return make_corpus(tmp_path_factory.mktemp("corpus"), images=7, texts=1, failed={"04.png": "depth"})


def prepared(values: dict[str, Any]) -> Run:
    return set_up(load_config(TrainConfig, flags=values), ALONE)


def fit(values: dict[str, Any]) -> str:
    text = io.StringIO()
    train(load_config(TrainConfig, flags=values), Console(file=text))
    return text.getvalue()


def by_hand(run: Run, batch: Batch) -> tuple[dict[str, Any], dict[tuple[str, int], list[Tensor]]]:
    """Retrieval and effective rank of one whole batch, image after image."""
    predicted: dict[tuple[str, int], list[Tensor]] = {}
    with torch.no_grad():
        for micro in batch.micro:
            output = run.learner.student(micro.inputs)
            for name, values in run.learner.bank(output.taps, micro.items, run.learner.student.latents).items():
                predicted.setdefault(name, []).extend(values)
    found: dict[str, Any] = {}
    for (teacher, layer), values in predicted.items():
        targets = batch.features[teacher]
        valid = [n for n in range(len(values)) if targets.valid[n]]
        if len(valid) < 2:
            continue
        hits, chance = 0, 0.0
        for n in valid:
            others = [m for m in valid if m == n or batch.rows[m] != batch.rows[n]]
            cosines = [
                float(functional.cosine_similarity(values[n].flatten(), targets.values[m].float().flatten(), dim=0))
                for m in others
            ]
            hits += others[int(np.argmax(cosines))] == n
            chance += 1 / len(others)
        found[teacher, layer] = hits / len(valid)
        found[teacher] = chance / len(valid)
        for name, maps in (
            ("rank", torch.stack([values[n] for n in valid])),
            ("target", torch.stack([targets.values[n].float() for n in valid])),
        ):
            centred = (maps - maps.mean(dim=0)).double().reshape(-1, maps.shape[-1]).numpy()
            singular = np.linalg.svd(centred, compute_uv=False)
            shares = singular / singular.sum()
            rank = math.exp(-sum(p * math.log(p) for p in shares if p > 0))
            found[name, teacher, layer] = (rank, float((singular**2).sum()))
    return found, predicted


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_retrieval_rank_and_gradients_are_those_of_the_whole_batch(
    corpus: Corpus, student: Path, tmp_path: Path, micro_batch: int | None
) -> None:
    run = prepared(settings(corpus, student, tmp_path / "out", batch=9, micro_batch=micro_batch))
    batch = run.collate([run.stream[p] for p in range(9)])
    assert isinstance(batch, Batch)
    insight = Insight(run.learner.bank, run.learner.student.projector, ALONE.device)
    totals = run_batch(run.learner, batch, ALONE, run.means, bf16=False, insight=insight)
    expected, _ = by_hand(run, batch)
    for teacher, layers in (("depth", (2,)), ("gen", (1, 3))):
        figures = insight.figures["teachers"][teacher]
        assert figures["retrieval_chance"] == pytest.approx(expected[teacher])
        for layer in layers:
            found = figures["layers"][str(layer)]
            (rank, energy), (target, whole) = (expected[kind, teacher, layer] for kind in ("rank", "target"))
            assert found["retrieval"] == pytest.approx(expected[teacher, layer])
            assert found["effective_rank"] == pytest.approx(rank, rel=1e-4)
            assert found["spread"] == pytest.approx(energy / whole, rel=1e-4)
            assert figures["target_effective_rank"] == pytest.approx(target, rel=1e-4)

    # the gradients of a run with the text loss alone, and of one with the embedding losses alone
    with_insight = {name: p.grad.clone() for name, p in run.learner.trainable().items() if p.grad is not None}
    run.learner.zero_grad()
    run_batch(run.learner, batch, ALONE, run.means, bf16=False)
    for name, parameter in run.learner.trainable().items():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, with_insight[name]), "looking changes nothing"
    pulls = []
    for losses in ({"text": 1.0, "teachers": {"depth": 0.0, "gen": 0.0}}, {"text": 0.0}):
        run.learner.zero_grad()
        run.learner.losses = run.learner.losses.model_copy(update=losses)
        run_batch(run.learner, batch, ALONE, run.means, bf16=False)
        pulls.append(torch.cat([p.grad.flatten() for p in run.learner.student.projector.parameters()]))  # type: ignore[union-attr]
        run.learner.losses = prepared(settings(corpus, student, tmp_path / "out")).learner.losses
    found = insight.figures["projector_gradient"]
    assert found["text"] == pytest.approx(float(pulls[0].norm()), rel=1e-4)
    assert found["embedding"] == pytest.approx(float(pulls[1].norm()), rel=1e-3)
    assert found["cosine"] == pytest.approx(float(functional.cosine_similarity(*pulls, dim=0)), abs=1e-3)
    assert totals["samples"] == 9


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"train": LLM, "micro_batch": 1, "gradient_checkpointing": True},
        {"train": LLM, "micro_batch": 1, "lora": {"rank": 2}},
    ],
)
def test_ranks_change_no_figure(corpus: Corpus, student: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    """Of a language model that is split too, where a rank has a micro-batch without an image or none at all."""
    values = settings(corpus, student, tmp_path / "one", steps=2, batch=5, look_every=1, **more)
    fit(values)
    end_all(start_ranks(values | {"out": str(tmp_path / "two"), "nproc": 2}, world=2))
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one["projector_gradient"] == pytest.approx(two["projector_gradient"], rel=1e-3, abs=1e-4)
        for teacher, found in one["teachers"].items():
            other = two["teachers"][teacher]
            assert found["retrieval_chance"] == pytest.approx(other["retrieval_chance"])
            for layer, figures in found["layers"].items():
                for name in ("retrieval", "effective_rank", "spread"):
                    assert figures[name] == pytest.approx(other["layers"][layer][name], rel=1e-3), (teacher, name)


def test_collapse_shows() -> None:
    maps = torch.randn(6, 2, 2, 5, generator=torch.Generator().manual_seed(1)) + 100
    spread = _Spread((2, 2, 5), ALONE.device)
    spread.add(maps[:1].expand(4, -1, -1, -1))
    spread.add(maps[:1])
    assert spread.finish(ALONE) == (0.0, 0.0)
    flat = _Spread((5,), ALONE.device)
    flat.add(torch.arange(4.0)[:, None] * torch.ones(5) + 50)
    rank, energy = flat.finish(ALONE)
    assert rank == pytest.approx(1.0, abs=1e-3)  # one direction only
    assert energy == pytest.approx(5 * 5.0)  # Σ (n − 1.5)² over five channels
    assert entropy_rank(torch.ones(7)) == pytest.approx(7.0)
    assert entropy_rank(torch.zeros(3)) == 0.0


def test_the_closer_look_is_taken_when_it_is_due(corpus: Corpus, student: Path, tmp_path: Path) -> None:
    assert [step for step in range(1, 12) if due(4, step)] == [1, 4, 8]
    assert not any(due(0, step) for step in range(1, 12))
    said = fit(settings(corpus, student, tmp_path / "out", steps=5, look_every=3))
    lines = metrics(tmp_path / "out")
    assert ["projector_gradient" in line for line in lines] == [True, False, True, False, False]
    for line in lines:
        assert line["memory_gib"] > 0.05
        for found in line["teachers"].values():
            assert found["temperature"] == pytest.approx(min(math.exp(found["logit_scale"]), 100))
            for layer in found["layers"].values():
                assert {"smooth_l1", "contrastive", "cosine", "r2"} <= layer.keys()
                assert {"smooth_l1", "contrastive", "cosine"} <= found["mean_map"].keys()
    assert " GiB" in said
    assert " left" in said


def test_the_first_batch_is_told_before_anything_changes(corpus: Corpus, student: Path, tmp_path: Path) -> None:
    values = settings(corpus, student, tmp_path / "out", steps=1, batch=9)
    said = fit(values)
    samples = [prepared(values).stream[p] for p in range(9)]
    assert all(isinstance(sample, Sample) for sample in samples)
    tokens = sum(label != -100 for sample in samples for label in sample.labels)  # type: ignore[union-attr]
    valid = {name: sum(one[name] is not None for s in samples for one in s.features) for name in ("depth", "gen")}  # type: ignore[union-attr]
    assert valid == {"depth": 7, "gen": 8}
    (line,) = metrics(tmp_path / "out", "first_batch")
    assert (line["step"], line["supervised_tokens"], line["valid_targets"]) == (0, tokens, valid)
    assert f"first batch: 9 samples, {tokens} supervised tokens, valid targets: 7 of depth, 8 of gen" in said


# --- predictions


def test_predictions_are_a_store_for_each_layer_that_preview_draws(
    corpus: Corpus, student: Path, tmp_path: Path
) -> None:
    values = settings(
        corpus, student, tmp_path / "out", steps=2, predictions={"every": 2, "images": 3}, normalise="channel"
    )
    fit(values)
    folder = tmp_path / "out/predictions/step-00000002"
    assert sorted(path.name for path in folder.iterdir()) == ["layer-01", "layer-02", "layer-03"]
    assert [line["path"] for line in metrics(tmp_path / "out", "predictions")] == ["step-00000002"]
    run = prepared(values)
    from olatrain.resume import resume

    resume(run, torch.optim.AdamW(run.learner.trainable().values()))
    store = FeatureStore.open(folder / "layer-02")
    assert store.teachers() == ["depth"]
    assert store.teacher("depth").licence == "MIT"
    assert store.teacher("depth").source == "predicted from layer 2 at step 2"
    keys = [sample.key for sample in store.samples()]
    assert len(keys) == len(set(keys)) >= 3
    reader = FeatureReader(store, "depth")
    values_seen = FeatureStore.open(corpus.store).statistics("depth")
    compared = set[str]()
    for position in range(len(run.stream)):
        sample = run.stream[position]
        assert isinstance(sample, Sample)
        if sample.keys and sample.keys[0] in set(keys) - compared:
            compared.add(sample.keys[0])
            batch = run.collate([sample])
            assert isinstance(batch, Batch)
            _, predicted = by_hand(run, batch)
            raw = predicted["depth", 2][0].numpy() * np.sqrt(values_seen.variance) + values_seen.mean
            np.testing.assert_allclose(reader.feature(keys.index(sample.keys[0])), raw, rtol=1e-3, atol=1e-3)
    picture = tmp_path / "look.png"
    arguments = ["preview", str(corpus.store), keys[0], "--predictions", str(folder / "layer-02"), "--teacher", "depth"]
    result = CliRunner().invoke(olapipe_app, [*arguments, "--out", str(picture)])
    assert result.exit_code == 0, result.output
    assert "prediction against stored: relative L2" in " ".join(result.output.split())
    assert picture.stat().st_size > 1000


# --- trackers


def test_mlflow_keeps_the_figures_of_a_run_that_went_on(
    corpus: Corpus, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the store that mlflow-skinny has too
    values = settings(corpus, student, tmp_path / "out", steps=3, trackers=["mlflow"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, of libraries that it uses
        fit(values | {"stop_after": 2})
        fit(values)
        from mlflow import MlflowClient

        client = MlflowClient()
        experiment = client.get_experiment_by_name("ola-distill")
        assert experiment is not None
        (kept,) = client.search_runs([experiment.experiment_id])
        history = client.get_metric_history(kept.info.run_id, "train/loss")
    lines = metrics(tmp_path / "out")
    assert {m.step: m.value for m in history} == pytest.approx({line["step"]: line["loss"] for line in lines})
    assert kept.info.status == "FINISHED"
    assert json.loads(kept.data.params["batch"]) == 4


def test_wandb_keeps_an_offline_run(
    corpus: Corpus, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(settings(corpus, student, tmp_path / "out", steps=2, trackers=["wandb"]))
    (kept,) = (tmp_path / "out/wandb").glob("offline-run-*")
    identity = json.loads((tmp_path / "out/trackers.json").read_text())["wandb"]
    assert (kept / f"run-{identity}.wandb").stat().st_size > 1000


def test_a_tracker_that_is_not_installed_is_named(
    corpus: Corpus, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb is not installed"):
        fit(settings(corpus, student, tmp_path / "out", trackers=["wandb"]))


def test_predictions_that_end_below_the_mean_map_are_named(corpus: Corpus, student: Path, tmp_path: Path) -> None:
    said = fit(settings(corpus, student, tmp_path / "short", steps=2))
    events = last_events(tmp_path / "short")
    found, told = events["train"]["teachers"], events["below_mean_map"]["teachers"]
    worse = {name for name, one in found.items() if sum(layer["r2"] for layer in one["layers"].values()) < 0}
    assert worse, "two steps from random weights tell nothing of an image"
    assert set(told) == worse
    for name in worse:
        assert f"{name}: predictions end worse than the mean map" in said
        for layer, one in found[name]["layers"].items():
            assert told[name][layer] == pytest.approx(one["r2"])
    assert "--set normalise=channel" in said
    said = fit(settings(corpus, student, tmp_path / "scaled", steps=2, normalise="channel"))
    assert "worse than the mean map" in said and "--set normalise=channel" not in said, "it is done already"
    said = fit(settings(corpus, student, tmp_path / "control", steps=2, target_control="shuffle"))
    assert "worse than the mean map" not in said, "what a control cannot learn is no news"


def test_the_mean_map_is_compared_over_the_last_steps_and_the_layers_that_train(tmp_path: Path) -> None:
    def line(step: int, **r2: float | None) -> str:
        layers = {name[1:]: {"r2": value} for name, value in r2.items()}
        return json.dumps({"event": "train", "step": step, "teachers": {"depth": {"layers": layers}}}) + "\n"

    lines = [line(1, _1=-9.0, _2=-9.0), line(2, _1=0.5, _2=-0.1), line(3, _1=None, _2=-0.3), line(4, _1=0.1, _2=-0.1)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + json.dumps({"event": "checkpoint", "step": 4}) + "\n")
    assert below_mean_map(tmp_path, {"depth": [1, 2]}, first=2) == {}
    assert below_mean_map(tmp_path, {"depth": [1, 2]}, first=1)["depth"]["2"] == pytest.approx(-2.375)
    only = below_mean_map(tmp_path, {"depth": [2]}, first=2)
    assert only == {"depth": {"2": pytest.approx(-1 / 6)}}
