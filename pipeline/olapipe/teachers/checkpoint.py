"""Where a teacher's files are, what is in them, and the digest of the weights that compute a feature."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError  # raised by torch.load; nothing is unpickled with it here
from typing import TYPE_CHECKING, Any

from olaschema.errors import TeacherError

if TYPE_CHECKING:
    import torch

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SAFETENSORS = (
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*-of-*.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)  # fmt: skip
_BIN = (
    "pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json", "diffusion_pytorch_model.bin"
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """The files of one teacher on this machine.

    `path` is a folder, or a single `.pth` file. `source` is what is recorded: hub id or base name.
    """

    teacher: str
    path: Path
    source: str

    def error(self, problem: str, remedy: str) -> TeacherError:
        """Make an error that names teacher and checkpoint."""
        return TeacherError(f"{self.teacher}: checkpoint {self.path}: {problem}", remedy)


def locate(teacher: str, checkpoint: str, *, subfolder: str = "", extra: tuple[str, ...] = ()) -> Checkpoint:
    """Find a checkpoint: a local path, else a hub id (its local copy if complete, else downloaded).

    `subfolder` holds config and weights, `extra` are further files needed, both relative to the checkpoint.
    Raises TeacherError where there is no such path or id, or it cannot be fetched.
    """
    path = local_path(teacher, checkpoint)
    if path is not None:
        return Checkpoint(teacher, path, path.resolve().name)
    return Checkpoint(teacher, _fetch(teacher, checkpoint, subfolder, extra), checkpoint)


def local_path(teacher: str, checkpoint: str) -> Path | None:
    """Return the path where it exists here, or None for a hub id; raises TeacherError for what is neither."""
    try:
        path = Path(checkpoint).expanduser()
    except RuntimeError as error:  # pathlib's answer to ~NAME where there is no such user
        raise TeacherError(
            f"{teacher}: {checkpoint} is in the home folder of a user who does not exist",
            f"Pass an existing folder: --checkpoint {teacher}=FOLDER",
        ) from error
    if path.exists():
        return path
    if not _HUB_ID.fullmatch(checkpoint):
        raise TeacherError(
            f"{teacher}: there is no folder {checkpoint}, and it is no hub id (OWNER/NAME) either",
            f"Pass an existing folder: --checkpoint {teacher}=FOLDER",
        )
    return None


def hub_copy(hub_id: str) -> Path | None:
    """Return the folder of what is already here of a hub id, whole or not; None where there is nothing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _fetch(teacher: str, hub_id: str, subfolder: str, extra: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # The error class of the HTTP library that this version of the hub's client is built on.
    http_error: type[Exception] = HfHubHTTPError.__mro__[1]

    base = f"{subfolder}/" if subfolder else ""
    needed = [f"{base}config.json", *extra]
    patterns = [*needed, *(base + name for name in _SAFETENSORS)]

    def complete(folder: Path) -> bool:
        return all((folder / name).is_file() for name in needed) and weight_file(folder / subfolder) is not None

    def snapshot(allowed: list[str], *, local_only: bool = False) -> Path:
        with _no_progress_bars():
            return Path(snapshot_download(hub_id, allow_patterns=allowed, local_files_only=local_only))

    try:
        local = snapshot(patterns, local_only=True)
        if complete(local):
            return local
    except LocalEntryNotFoundError:
        pass  # not downloaded yet, which is what the rest is for
    except HFValidationError as error:
        raise TeacherError(f"{teacher}: {hub_id} is no hub id: {error}", _elsewhere(teacher)) from error
    try:
        folder = snapshot(patterns)
        if not complete(folder):
            folder = snapshot([*patterns, *(base + name for name in _BIN)])
    except (OSError, http_error) as error:
        raise TeacherError(
            f"{teacher}: there is no folder {hub_id}, and the hub's {hub_id} cannot be fetched: {_first_line(error)}",
            _elsewhere(teacher),
        ) from error
    return folder


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            enable_progress_bars()


def _elsewhere(teacher: str) -> str:
    return f"Download the checkpoint on a machine that can, and pass --checkpoint {teacher}=FOLDER"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def read_config(
    checkpoint: Checkpoint, folder: Path, *, model_type: str | tuple[str, ...], what: str
) -> dict[str, Any]:
    """Read `config.json` of `folder` and check its `model_type`; `what` names the expected model in words.

    Several types may be accepted; an empty tuple accepts every one.

    Raises TeacherError naming what was found and what was expected.
    """
    path = folder / "config.json"
    remedy = f"Pass the folder of a {what}: --checkpoint {checkpoint.teacher}=FOLDER"
    if not path.is_file():
        raise checkpoint.error(f"{_relative(path, checkpoint)} is missing; {_contents(folder)}", remedy)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        found = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise checkpoint.error(f"{path.name} is not a JSON object: {error}", "Download it again.") from error
    types = (model_type,) if isinstance(model_type, str) else model_type
    if types and found not in types:
        names = ", ".join(config.get("architectures") or ()) or "no architecture named"
        raise checkpoint.error(
            f"holds a model of type {found!r} ({names}), expected {' or '.join(map(repr, types))} ({what})", remedy
        )
    return dict(config)


def _relative(path: Path, checkpoint: Checkpoint) -> str:
    return path.relative_to(checkpoint.path).as_posix()


def _contents(folder: Path) -> str:
    if not folder.is_dir():
        return "that folder does not exist" if not folder.exists() else "that is a file"
    names = sorted(entry.name for entry in folder.iterdir())
    shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    return f"the folder holds {shown}" if names else "the folder is empty"


def weight_file(folder: Path) -> Path | None:
    """Return the file that holds or indexes a folder's weights: safetensors, else `.bin`, else None."""
    names = [name for name in (*_SAFETENSORS, *_BIN) if "*" not in name]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_weights(checkpoint: Checkpoint, folder: Path, *, keep: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """Read the floating-point tensors whose names `keep` accepts, on the CPU, in the stored dtype.

    Integer tensors are left out: in these models they are index tables that the class rebuilds.
    Raises TeacherError for missing, damaged or truncated weights.
    """
    first = weight_file(folder)
    if first is None:
        raise checkpoint.error(
            f"no weights (model.safetensors or pytorch_model.bin); {_contents(folder)}",
            "Download the checkpoint's weights into that folder.",
        )
    tensors: dict[str, torch.Tensor] = {}
    for path in _parts(checkpoint, first):
        read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
        tensors |= read(checkpoint, path, keep)
    return tensors


def _parts(checkpoint: Checkpoint, first: Path) -> list[Path]:
    if first.suffix != ".json":
        return [first]
    try:
        names = set(json.loads(first.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise checkpoint.error(f"{first.name} is not an index of weights: {error}", "Download it again.") from error
    parts = [first.parent / str(name) for name in sorted(names)]
    for part in parts:
        if part.parent != first.parent or not part.is_file():
            raise checkpoint.error(
                f"{first.name} names {part.name}, which is not in the folder", "Download the missing part."
            )
    return parts


def _read_safetensors(checkpoint: Checkpoint, path: Path, keep: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if keep(name)}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _damaged(checkpoint, path, _first_line(error)) from error
    return _floats(tensors)


def _read_torch(checkpoint: Checkpoint, path: Path, keep: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        # torch's own text advises weights_only=False, which would run whatever code the file holds
        reason = "no file of torch.save, or one that holds more than tensors"
        raise _damaged(checkpoint, path, reason) from error
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        raise _damaged(checkpoint, path, _first_line(error)) from error
    if not isinstance(loaded, dict):
        raise checkpoint.error(f"{path.name} holds a {type(loaded).__name__}, not named tensors", "Download it again.")
    tensors = {str(name): value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    return _floats({name: value for name, value in tensors.items() if keep(name)})


def read_original(checkpoint: Checkpoint, path: Path) -> dict[str, torch.Tensor]:
    """Read all floating-point tensors of one `.pth` file, with `weights_only`. Raises TeacherError if damaged."""
    return _read_torch(checkpoint, path, lambda name: True)


def _floats(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def _damaged(checkpoint: Checkpoint, path: Path, reason: str) -> TeacherError:
    size = path.stat().st_size if path.is_file() else 0
    return checkpoint.error(
        f"{path.name} ({size} bytes) cannot be read as weights: {reason}",
        "Download it again, in full (a file of a few hundred bytes is a Git LFS pointer).",
    )


def weights_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over name, shape and little-endian float32 bytes of each tensor, in the order of names.

    The names are those of the checkpoint file, which stay the same when a library renames its attributes.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].detach().float().cpu().contiguous().numpy().astype("<f4", copy=False)
        digest.update(json.dumps([name, list(array.shape)]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
