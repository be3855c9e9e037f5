"""Checkpoints: safetensors and JSON, published by one rename, so that a crash leaves the last one or the new one.

    OUT/checkpoints/step-00000500/
        state.json              step, position, settings, fingerprints; sizes and digests of the other files
        trainable.safetensors   projector, predictors, latents, logit scales
        optimiser.safetensors   AdamW's moments and step counts by parameter
        random.safetensors      state of torch's generators by rank

Nothing is pickled: loading a checkpoint runs no code from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.optim import Optimizer

from olaschema.errors import OlaError

_STATE = "state.json"
_PREFIX = "step-"
_SCRATCH = ".saving-"


class CheckpointError(OlaError):
    """A checkpoint cannot be written, is damaged, or belongs to another run."""


Tensors = dict[str, Tensor]


def save_checkpoint(
    root: Path, step: int, files: Mapping[str, Tensors], state: Mapping[str, Any], *, keep_last: int
) -> Path:
    """Write `files` (name → tensors) and `state` as the checkpoint of `step`, then remove all but the last few.

    Raises CheckpointError where the disk does not take it; what was there before stays.
    """
    target = root / f"{_PREFIX}{step:08d}"
    scratch = root / f"{_SCRATCH}{step:08d}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(f"{_SCRATCH}*"):
            shutil.rmtree(left)
        scratch.mkdir()
        written = {}
        for name, tensors in files.items():
            data = save({key: value.detach().contiguous().cpu() for key, value in tensors.items()})
            _write(scratch / f"{name}.safetensors", data)
            written[f"{name}.safetensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        document = json.dumps({**state, "step": step, "files": written}, indent=1, sort_keys=True, allow_nan=False)
        _write(scratch / _STATE, document.encode())
        _sync(scratch)
        if target.exists():  # of an earlier, identical step
            shutil.rmtree(target)
        scratch.rename(target)
        _sync(root)
        for old in _complete(root)[:-keep_last]:
            shutil.rmtree(old)
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written: {error.strerror or error}",
            "Free some space or mend the permissions, then run the same command again: it goes on from the last one.",
        ) from error
    return target


def latest_checkpoint(root: Path) -> Path | None:
    """Return the newest complete checkpoint under `root`."""
    found = _complete(root)
    return found[-1] if found else None


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Tensors]]:
    """Return the state and the tensors of each file, checked against the digests that the state promises.

    Raises CheckpointError naming the damaged file.
    """
    remedy = f"Delete the folder {folder} to go on from the checkpoint before it."
    try:
        state = json.loads((folder / _STATE).read_bytes())
        files: dict[str, Tensors] = {}
        for name, promised in state["files"].items():
            data = (folder / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != promised["sha256"]:
                raise CheckpointError(f"{folder / name} is damaged: its SHA-256 is not the one in {_STATE}", remedy)
            files[name.removesuffix(".safetensors")] = load(data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}", remedy) from error
    return state, files


def optimiser_tensors(optimiser: Optimizer, names: Mapping[Tensor, str]) -> Tensors:
    """Return an optimiser's state as `parameter.slot` → tensor; learning rates follow from the step."""
    found: Tensors = {}
    for parameter, slots in optimiser.state.items():
        for slot, value in slots.items():
            found[f"{names[parameter]}.{slot}"] = value
    return found


def restore_optimiser(optimiser: Optimizer, names: Mapping[Tensor, str], tensors: Tensors) -> None:
    """Put back what `optimiser_tensors` gave, bit for bit; raises CheckpointError where a tensor fits no parameter."""
    parameters = {name: parameter for parameter, name in names.items()}
    for key, value in tensors.items():
        name, _, slot = key.rpartition(".")
        if name not in parameters:
            raise CheckpointError(
                f"the checkpoint's optimiser holds {name}, which is not trained", "Use another --out."
            )
        parameter = parameters[name]
        # AdamW keeps its step count on the CPU
        optimiser.state[parameter][slot] = value.to(parameter.device) if slot != "step" else value


def _complete(root: Path) -> list[Path]:
    return sorted(path for path in root.glob(f"{_PREFIX}*") if (path / _STATE).is_file())


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
