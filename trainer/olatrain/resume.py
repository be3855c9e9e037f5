"""Going on from a checkpoint: what is saved beside the weights, and what must not have changed since."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.optim import Optimizer

from olaschema.manifest import TeacherRecord, canonical_json
from olatrain.checkpoint import (
    CheckpointError,
    Saver,
    Tensors,
    latest_checkpoint,
    load_tensors,
    optimiser_tensors,
    prefixed,
    read_state,
)
from olatrain.config import TrainConfig, changed_settings
from olatrain.setup import Run
from olatrain.source import require_same_form

_ANOTHER = "Give the settings it was started with, or start a new run with another --out."
_CHANGED = {
    "samples": "the conversations, or the rows of the store that their images have",
    "student": "the student's folder",
}


@dataclass(frozen=True)
class Progress:
    """How far a run has come: steps done, and the position of the next sample."""

    step: int
    position: int


def resume(run: Run, optimiser: Optimizer) -> Progress:
    """Restore the newest checkpoint of `run.config.out`; the start where there is none.

    With the same number of ranks, everything is as it was, bit for bit; with another number, the samples go on where
    they stopped. Raises CheckpointError naming each setting that has changed, FingerprintError for other features.
    """
    folder = latest_checkpoint(_root(run.config))
    if folder is None:
        return Progress(0, 0)
    state = read_state(folder)
    _require_same_run(run, state, folder)
    tensors = _tensors(run, optimiser)
    random = _random(run) if state["world"] == run.ranks.world else {}
    load_tensors(folder, state, tensors | random, ranks=run.ranks)
    _restore_random(run, random)
    return Progress(int(state["step"]), int(state["position"]))


def saver(run: Run) -> Saver:
    """Return what saves the run's checkpoints; every rank must call this."""
    return Saver(_root(run.config), run.ranks, keep_last=run.config.keep_last)


def save(run: Run, optimiser: Optimizer, progress: Progress, saver: Saver) -> None:
    """Save a checkpoint, or begin to (`Saver`); every rank must call this."""
    state = {
        "position": progress.position,
        "world": run.ranks.world,
        "config": run.config.model_dump(mode="json"),
        "identity": run.identity,
        "teachers": {name: record.model_dump(mode="json") for name, record in run.teachers.items()},
    }
    saver.save(progress.step, _tensors(run, optimiser) | _random(run), state)


def write_config(config: TrainConfig) -> None:
    """Write the resolved settings as `config.json`, which `--config` reads."""
    scratch = config.out / ".config.tmp"
    scratch.write_bytes(canonical_json(config))
    os.replace(scratch, config.out / "config.json")


def _root(config: TrainConfig) -> Path:
    return config.out / "checkpoints"


def _tensors(run: Run, optimiser: Optimizer) -> Tensors:
    """What is the same on every rank, or split over them: the live tensors."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in run.learner.trainable().items()}
    state = optimiser_tensors(optimiser, names)
    return prefixed("trainable", run.learner.state()) | prefixed("optimiser", state)


def _require_same_run(run: Run, state: dict[str, Any], folder: Path) -> None:
    try:
        before = TrainConfig.model_validate(state["config"])
    except ValidationError as error:
        raise CheckpointError(f"{folder}: its settings are not readable: {error}", _ANOTHER) from error
    changed = changed_settings(before, run.config)
    if changed:
        raise CheckpointError(f"{folder} was made with other settings: {'; '.join(changed)}", _ANOTHER)
    for teacher, fingerprint in before.fingerprints.items():
        fingerprint.require_equal(
            run.config.fingerprints[teacher], mine=f"in {folder}", theirs="in the store", remedy=_ANOTHER
        )
    for name, record in state["teachers"].items():
        require_same_form(
            TeacherRecord.model_validate(record), run.teachers[name], mine=f"in {folder}", theirs="in the store",
            remedy="Go on with a store of the same form, or start a new run with another --out.",
        )  # fmt: skip
    for name, digest in run.identity.items():
        if state["identity"].get(name) != digest:
            raise CheckpointError(
                f"{_CHANGED[name]} changed since {folder} was saved: samples could be lost or seen twice",
                "Put back what was there, or start a new run with another --out.",
            )


def _random(run: Run) -> Tensors:
    """The states of this rank's generators; each rank saves its own."""
    found = {f"random.cpu.{run.ranks.rank}": torch.get_rng_state()}
    if run.ranks.device.type == "cuda":
        found[f"random.cuda.{run.ranks.rank}"] = torch.cuda.get_rng_state(run.ranks.device)
    return found


def _restore_random(run: Run, states: Tensors) -> None:
    for name, state in states.items():
        if name.startswith("random.cpu."):
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, run.ranks.device)
