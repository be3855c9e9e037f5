"""Reading foreign checkpoints: safetensors or torch's files, whole or sharded. Nothing is unpickled but tensors."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from olaschema.errors import ConfigError

# In order of preference: where a folder has both, they hold the same weights.
_LAYOUTS = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def read_weights(folder: Path, *, skip: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint on the CPU, but those whose names begin with one of `skip`.

    Takes `model.safetensors` or `pytorch_model.bin`, the same of OpenCLIP, or the shards that `….index.json` names.
    Raises ConfigError naming the file that is missing or unreadable.
    """
    weights: dict[str, Tensor] = {}
    for path in _files(folder):
        with _readable(path):
            weights |= _read(path, skip)
    return weights


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises ConfigError naming the file."""
    with _readable(path):
        loaded = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds no JSON object", "Is it the checkpoint's config?")
    return loaded


def _files(folder: Path) -> list[Path]:
    for layout in _LAYOUTS:
        index = folder / f"{layout}.index.json"
        if index.is_file():
            table = read_json(index).get("weight_map")
            if not isinstance(table, dict):
                raise ConfigError(f"{index} has no weight_map", "Is the checkpoint complete?")
            names = sorted({str(name) for name in table.values()})
            outside = [name for name in names if Path(name).name != name]
            if outside:
                raise ConfigError(
                    f"{index} names {outside[0]}, a file outside the folder", "Is the checkpoint what it claims to be?"
                )
            return [folder / name for name in names]
        if (folder / layout).is_file():
            return [folder / layout]
    raise ConfigError(
        f"{folder / _LAYOUTS[0]} cannot be read: neither it nor {_LAYOUTS[1]} is there",
        "Give the folder of an OLA-VLM checkpoint, and that of its CLIP tower.",
    )


def _read(path: Path, skip: tuple[str, ...]) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if not name.startswith(skip)}  # noqa: SIM118
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(loaded, dict):
        raise ValueError(f"it holds a {type(loaded).__name__}, no tensors by name")
    return {name: value for name, value in loaded.items() if isinstance(value, Tensor) and not name.startswith(skip)}


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{path} cannot be read: {first}",
            "Give the folder of an OLA-VLM checkpoint, and that of its CLIP tower.",
        ) from error
