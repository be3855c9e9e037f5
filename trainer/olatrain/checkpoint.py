"""Checkpoints: safetensors and JSON, published by one rename, so that a crash leaves the last one or the new one.

    OUT/checkpoints/step-00000500/
        state.json                       step, position, settings, fingerprints; sizes and digests of the other files
        shard-00001-….safetensors        one file of each rank: weights, AdamW's moments, generators' states, by name

torch.distributed.checkpoint decides what each rank writes and puts tensors together again for any number of ranks. It
writes through its safetensors storage: the default one pickles its index. Loading a checkpoint runs no code from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.optim import Optimizer

from olaschema.errors import OlaError
from olatrain.parallel import Ranks

_STATE = "state.json"
_PREFIX = "step-"
_SCRATCH = ".saving-"
BACKGROUND_BYTES = 1 << 30
"""Smaller checkpoints, over all ranks, are written before the training goes on; larger ones while it does."""


class CheckpointError(OlaError):
    """A checkpoint cannot be written, is damaged, or belongs to another run."""


Tensors = dict[str, Tensor]


class Saver:
    """Writes checkpoints under `root`, one at a time; every rank must call alike.

    A checkpoint exists once it is published, whole and with its digests. One of less than BACKGROUND_BYTES is when
    `save` returns. A larger one is copied by then, and `wait` returns when it is published. Both raise CheckpointError
    where the disk does not take it; what was there before stays.
    """

    def __init__(self, root: Path, ranks: Ranks, *, keep_last: int) -> None:
        self._root, self._ranks, self._keep_last = root, ranks, keep_last
        self._pending: tuple[int, Future[Any]] | None = None
        if ranks.first:
            with _writing(root):
                for left in root.glob(f"{_SCRATCH}*"):
                    shutil.rmtree(left)
        ranks.barrier()

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Save this rank's part of `tensors`, and `state` beside them; waits for the one before."""
        self.wait()
        # copies: the writer takes tensors on the CPU as they are, and the next step changes them
        staged = {name: _copied(tensor) for name, tensor in tensors.items()}
        target = self._root / f"{_PREFIX}{step:08d}"
        scratch = self._root / f"{_SCRATCH}{step:08d}"
        document = {**state, "step": step}
        writer = _Writer(scratch, lambda: _publish(scratch, target, document, self._keep_last))
        with _writing(target):
            future: Any = async_save(staged, storage_writer=writer, process_group=self._ranks.saving)
            if sum(tensor.nbytes for tensor in tensors.values()) < BACKGROUND_BYTES:
                future.result()
        self._pending = step, future

    @property
    def ready(self) -> bool:
        """Whether `wait` has something to say and would return at once."""
        return self._pending is not None and self._pending[1].done()

    def wait(self) -> tuple[int, Path] | None:
        """Wait until what `save` began is published; its step and folder, None where nothing was begun."""
        if self._pending is None:
            return None
        (step, future), self._pending = self._pending, None
        target = self._root / f"{_PREFIX}{step:08d}"
        with _writing(target):
            future.result()
        return step, target


class _Writer(HuggingFaceStorageWriter):
    """Each rank's tensors in safetensors of its own; `publish` runs on rank 0 when every rank has written."""

    def __init__(self, folder: Path, publish: Callable[[], None]) -> None:
        super().__init__(str(folder), save_distributed=True)
        self._publish = publish

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        self._publish()


def _publish(scratch: Path, target: Path, state: Mapping[str, Any], keep_last: int) -> None:
    written = {path.name: _digest(path) for path in sorted(scratch.glob("*.safetensors"))}
    document = json.dumps({**state, "files": written}, indent=1, sort_keys=True, allow_nan=False)
    _write(scratch / _STATE, document.encode())
    _sync(scratch)
    if target.exists():  # of an earlier, identical step
        shutil.rmtree(target)
    scratch.rename(target)
    _sync(target.parent)
    for old in _complete(target.parent)[:-keep_last]:
        shutil.rmtree(old)


class _writing:
    """Turns what goes wrong while writing into a CheckpointError that names the folder."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: Any) -> None:
        if isinstance(error, CheckpointException):
            error = next(iter(error.failures.values()))[0]
        elif not isinstance(error, OSError):
            return
        problem = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(
            f"{self._target} cannot be written: {problem}",
            "Free some space or mend the permissions, then run the same command again: it goes on from the last one.",
        ) from error


def latest_checkpoint(root: Path) -> Path | None:
    """Return the newest complete checkpoint under `root`."""
    found = _complete(root)
    return found[-1] if found else None


def read_state(folder: Path) -> dict[str, Any]:
    """Return the state that was saved beside the tensors; raises CheckpointError where it cannot be read."""
    try:
        state = json.loads((folder / _STATE).read_bytes())
        if not isinstance(state["files"], dict):
            raise TypeError("files is no table")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}", _remedy(folder)) from error
    return dict(state)


def load_tensors(
    folder: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensor], *, ranks: Ranks | None = None
) -> None:
    """Fill `tensors` in place with what a checkpoint holds under their names, whatever ranks it was written by.

    The files are checked first against the digests in `state`, each by one rank. With `ranks`, every rank must call
    this. Raises CheckpointError naming the damaged file, or what is missing, too much, or of another shape. Names that
    begin with `random.`, and names of a part of which none is asked for, may be too much.
    """
    damaged = _damaged(folder, state, *((ranks.rank, ranks.world) if ranks else (0, 1)))
    if ranks is not None and ranks.most(damaged is not None) and damaged is None:
        damaged = f"{folder} is damaged, as another rank found"
    if damaged is not None:
        raise CheckpointError(damaged, _remedy(folder))
    try:
        reader = HuggingFaceStorageReader(str(folder))
        _require_fit(folder, reader.read_metadata(), tensors)
        with warnings.catch_warnings():
            # loading in one process, which is what is meant where nobody has made a process group
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(dict(tensors), storage_reader=reader, process_group=ranks.saving if ranks else None)
    except (OSError, SafetensorError, CheckpointException) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}", _remedy(folder)) from error


def _damaged(folder: Path, state: Mapping[str, Any], rank: int, world: int) -> str | None:
    for name in sorted(state["files"])[rank::world]:
        try:
            if _digest(folder / name) != state["files"][name]:
                return f"{folder / name} is damaged: its SHA-256 is not the one in {_STATE}"
        except OSError as error:
            return f"{folder / name} cannot be read: {error.strerror}"
    return None


def _require_fit(folder: Path, metadata: Metadata, tensors: Mapping[str, Tensor]) -> None:
    held: Mapping[str, Any] = metadata.state_dict_metadata
    parts = {name.partition(".")[0] for name in tensors} - {"random"}
    wanted = {name for name in held if name.partition(".")[0] in parts}
    wrong = sorted(tensors.keys() - held.keys()) + sorted(wanted - tensors.keys())
    wrong += [n for n in sorted(tensors.keys() & held.keys()) if tuple(held[n].size) != tuple(tensors[n].shape)]
    if wrong:
        raise CheckpointError(
            f"{folder} does not fit the student: {', '.join(wrong[:5])}", "Use the student it was made with."
        )


def optimiser_tensors(optimiser: Optimizer, names: Mapping[Tensor, str]) -> Tensors:
    """Return the state of an AdamW as `parameter.slot` → the live tensor, zeros before its first step.

    Learning rates follow from the step and are no state.
    """
    found: Tensors = {}
    for parameter, name in names.items():
        slots = optimiser.state[parameter]
        if not slots:
            slots["step"] = torch.tensor(0.0)  # AdamW keeps its step count on the CPU
            slots["exp_avg"], slots["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        found |= {f"{name}.{slot}": value for slot, value in slots.items()}
    return found


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Return the tensors under `prefix.name`: one part of a checkpoint."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def _complete(root: Path) -> list[Path]:
    return sorted(path for path in root.glob(f"{_PREFIX}*") if (path / _STATE).is_file())


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone() if tensor.device.type == "cpu" else tensor.detach()


def _remedy(folder: Path) -> str:
    return f"Delete the folder {folder} to go on from the checkpoint before it."


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


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
