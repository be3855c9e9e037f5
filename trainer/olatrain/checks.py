"""What stops a run before its weights change, with the samples or features named that are to blame."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from olaschema.errors import OlaError
from olatrain.setup import Run
from olatrain.stream import Sample, SampleStream
from olatrain.watch import SKIPPED

_SHOWN = 8
"""Names in a message, at most."""
_SPOILED = "there is NaN or infinity in the stored features of"
_SPOILED_REMEDY = "Extract their shards again (`olapipe verify --live` compares features with their teacher's)."


class TrainingError(OlaError):
    """The training went wrong at one batch, whose samples are named."""


def require_sound(run: Run, totals: dict[str, float], norm: float, position: int) -> None:
    """Stop before the weights change: a loss that is not finite, or exactly zero where there is something to learn."""
    layers = [f"{name}.{layer}" for name, teacher in run.config.teachers.items() for layer in teacher.layers]
    parts = ["loss", "text", *(f"{layer}.{part}" for layer in layers for part in ("smooth_l1", "contrastive"))]
    wrong = [name for name in parts if not math.isfinite(totals[name])]
    if wrong or not math.isfinite(norm):
        what = ", ".join(wrong) or "the gradient"
        spoiled = _spoiled(run.stream, _positions(run, position))
        if spoiled:
            raise TrainingError(f"{what} not finite: {_SPOILED} {', '.join(spoiled)}", _SPOILED_REMEDY)
        raise TrainingError(
            f"{what} not finite in the batch of {names_at(run, position)}",
            "Look at these samples, or lower the learning rate.",
        )
    for name, teacher in run.config.teachers.items():
        if teacher.trains and totals[f"{name}.valid"]:
            for layer in teacher.layers:
                if totals[f"{name}.{layer}.smooth_l1"] == 0.0:
                    raise TrainingError(
                        f"the embedding loss of {name} at layer {layer} is exactly 0 in the batch of "
                        f"{names_at(run, position)}",
                        "A prediction never equals its target: a mask or a target is not what it should be.",
                    )


def _spoiled(stream: SampleStream, positions: range) -> list[str]:
    """Images at these positions whose stored features are not finite, by key and teacher; the first few."""
    found: list[str] = []
    for sample in (stream[p] for p in positions):
        if len(found) >= _SHOWN:
            break
        for key, features in zip(sample.keys, sample.features, strict=True) if isinstance(sample, Sample) else ():
            for teacher, stored in features.items():
                if stored is not None and not all(np.isfinite(array).all() for array in stored.arrays.values()):
                    found.append(f"{key} ({teacher})")
    return found


def _positions(run: Run, position: int) -> range:
    return range(position, min(position + run.config.batch, run.end))


def names_at(run: Run, position: int) -> str:
    """Name the samples of the batch that begins at a position, the first few."""
    names = [run.stream.name(p) for p in _positions(run, position)]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def require_scored(run: Run, totals: Mapping[str, float], step: int) -> None:
    """Raise TrainingError where figures of the samples held out are of none, or not finite."""
    if run.heldout is None:
        return
    held = len(run.heldout)
    if not totals["samples"]:
        raise TrainingError(
            f"not one of the {held} samples held out could be used",
            f"The reasons are in {run.config.out / SKIPPED}; check --images, then run the same command again.",
        )
    if math.isfinite(sum(totals.values())):
        return
    problem = f"figures of the samples held out are not finite at step {step}"
    spoiled = _spoiled(run.heldout, range(held))
    if not spoiled:
        raise TrainingError(problem, "Lower the learning rate.")
    raise TrainingError(f"{problem}: {_SPOILED} {', '.join(spoiled)}", _SPOILED_REMEDY)
