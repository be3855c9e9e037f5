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

from olaschema.manifest import canonical_json
from olatrain.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    optimiser_tensors,
    restore_optimiser,
    save_checkpoint,
)
from olatrain.config import TrainConfig, changed_settings
from olatrain.setup import Run

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
    state, files = load_checkpoint(folder)
    _require_same_run(run, state, folder)
    run.learner.restore(files["trainable"])
    restore_optimiser(optimiser, _names(run), files["optimiser"])
    if state["world"] == run.ranks.world:
        _restore_random(run, files["random"])
    return Progress(int(state["step"]), int(state["position"]))


def save(run: Run, optimiser: Optimizer, progress: Progress) -> Path:
    """Save a checkpoint; every rank must call this, rank 0 writes."""
    random = _random(run)
    root = _root(run.config)
    path = root / f"step-{progress.step:08d}"
    if run.ranks.first:
        state = {
            "position": progress.position,
            "world": run.ranks.world,
            "config": run.config.model_dump(mode="json"),
            "identity": run.identity,
            "teachers": {name: record.model_dump(mode="json") for name, record in run.teachers.items()},
        }
        files = {
            "trainable": run.learner.state(),
            "optimiser": optimiser_tensors(optimiser, _names(run)),
            "random": random,
        }
        path = save_checkpoint(root, progress.step, files, state, keep_last=run.config.keep_last)
    run.ranks.barrier()
    return path


def write_config(config: TrainConfig) -> None:
    """Write the resolved settings as `config.json`, which `--config` reads."""
    scratch = config.out / ".config.tmp"
    scratch.write_bytes(canonical_json(config))
    os.replace(scratch, config.out / "config.json")


def _root(config: TrainConfig) -> Path:
    return config.out / "checkpoints"


def _names(run: Run) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in run.learner.trainable().items()}


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
    for name, digest in run.identity.items():
        if state["identity"].get(name) != digest:
            raise CheckpointError(
                f"{_CHANGED[name]} changed since {folder} was saved: samples could be lost or seen twice",
                "Put back what was there, or start a new run with another --out.",
            )


def _random(run: Run) -> dict[str, Tensor]:
    """The states of torch's generators, of every rank."""
    found = {}
    states = {"cpu": torch.get_rng_state()}
    if run.ranks.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(run.ranks.device)
    for kind, own in states.items():
        for rank, state in enumerate(run.ranks.gather(own.to(run.ranks.device))):
            found[f"{kind}.{rank}"] = state.cpu()
    return found


def _restore_random(run: Run, states: dict[str, Tensor]) -> None:
    rank = run.ranks.rank
    torch.set_rng_state(states[f"cpu.{rank}"])
    if run.ranks.device.type == "cuda" and f"cuda.{rank}" in states:
        torch.cuda.set_rng_state(states[f"cuda.{rank}"], run.ranks.device)
