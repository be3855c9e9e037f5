"""Stages: what trains, what the losses are, one rank or several, and out again as a plain model."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from trainer_support import (
    Corpus,
    end_all,
    make_corpus,
    make_student,
    metrics,
    saved,
    settings,
    start_ranks,
)

from olaschema.config import load_config
from olatrain.checkpoint import latest_checkpoint
from olatrain.config import TrainConfig
from olatrain.parallel import Ranks
from olatrain.setup import Run, set_up
from olatrain.train import train

LLM = ["projector", "predictors", "task_tokens", "llm"]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"), images=9)


@pytest.fixture
def chosen(corpus: Corpus, student: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def choose(**changes: Any) -> dict[str, Any]:
        return settings(corpus, student, tmp_path / "out", **changes)

    return choose


def run(values: dict[str, Any]) -> str:
    text = io.StringIO()
    train(load_config(TrainConfig, flags=values), Console(file=text))
    return text.getvalue()


def prepared(values: dict[str, Any]) -> Run:
    return set_up(load_config(TrainConfig, flags=values), Ranks(0, 1, torch.device("cpu")))


def newest(out: Path | str) -> Path:
    latest = latest_checkpoint(Path(out) / "checkpoints")
    assert latest is not None
    return latest


def losses(out: Path | str) -> list[float]:
    return [line["loss"] for line in metrics(Path(out))]


def moved(values: dict[str, Any]) -> set[str]:
    """Names of the saved tensors that training changed."""
    before = {name: value.clone() for name, value in prepared(values).learner.state().items()}
    after = saved(newest(values["out"]), "trainable")
    assert after.keys() == before.keys()
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}])
def test_a_split_language_model_trains_as_a_whole_one(
    chosen: Callable[..., dict[str, Any]], tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    """One rank; two, then four that go on where two stopped. The last batch leaves three ranks without a sample."""
    values = chosen(steps=None, epochs=1, train=LLM, lora=lora, micro_batch=2, lrs={"llm": 2e-3})
    run(values)
    split = values | {"out": str(tmp_path / "split")}
    end_all(start_ranks(split | {"nproc": 2, "stop_after": 2}, world=2))
    end_all(start_ranks(split | {"nproc": 4}, world=4))
    assert losses(split["out"]) == pytest.approx(losses(values["out"]), rel=1e-5)
    one, many = (saved(newest(v["out"]), "trainable") for v in (values, split))
    assert one.keys() == many.keys()
    assert any(name.startswith("llm.") for name in moved(values))
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, rtol=1e-2, atol=2e-4, msg=name)
