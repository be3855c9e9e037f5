"""Training runs of tests: in this process, set up only, or what a finished one left."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from trainer_support import metrics, saved

from olaschema.config import load_config
from olatrain.checkpoint import latest_checkpoint
from olatrain.config import TrainConfig
from olatrain.parallel import Ranks
from olatrain.setup import Run, set_up
from olatrain.step import run_batch
from olatrain.stream import Batch
from olatrain.train import train


def run(values: dict[str, Any]) -> str:
    """Train in this process; returns what was printed."""
    text = io.StringIO()
    train(load_config(TrainConfig, flags=values), Console(file=text, width=200))
    return text.getvalue()


def prepared(values: dict[str, Any]) -> Run:
    return set_up(load_config(TrainConfig, flags=values), Ranks(0, 1, torch.device("cpu")))


def newest(out: Path | str) -> Path:
    latest = latest_checkpoint(Path(out) / "checkpoints")
    assert latest is not None
    return latest


def weights(out: Path | str) -> dict[str, Tensor]:
    return saved(newest(out), "trainable")


def losses(out: Path | str) -> list[float]:
    return [line["loss"] for line in metrics(Path(out))]


def whole_gradients(values: dict[str, Any], *, first: int = 0) -> dict[str, Tensor]:
    """Gradients of one global batch that passes through the model as a whole, in this process."""
    ready = prepared({name: value for name, value in values.items() if name not in ("micro_batch", "nproc")})
    batch = ready.collate([ready.stream[p] for p in range(first, min(first + ready.config.batch, ready.end))])
    assert isinstance(batch, Batch)
    assert len(batch.micro) == 1
    run_batch(ready.learner, batch, ready.ranks, ready.means, bf16=False)
    return {name: p.grad for name, p in ready.learner.trainable().items() if p.grad is not None}


def require_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal but for rounding, relative to each tensor's own size; all are there, and no group's are all 0."""
    assert found.keys() == expected.keys()
    live = {name.partition(".")[0] for name, value in expected.items() if value.any()}
    assert live == {name.partition(".")[0] for name in expected}
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm() + 1e-7, name
