"""Loading parts of a diffusers checkpoint strictly, the noise schedule, and noise drawn from a digest."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from olapipe.teachers.checkpoint import Checkpoint, read_weights
from olaschema.errors import TeacherError
from olaschema.manifest import Scalar

_DIGEST = re.compile(r"[0-9a-f]{64}")
# Attention of autoencoders published before diffusers 0.18.
_OLD_ATTENTION = re.compile(r"(?P<block>.*attentions\.\d+)\.(?P<part>query|key|value|proj_attn)\.")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_WHOLE = "Use the files of one published checkpoint in the diffusers layout."


@dataclass(frozen=True)
class Schedule:
    """Factors of latents and noise at one step, and what they were computed from."""

    signal: float
    noise: float
    record: Mapping[str, Scalar]


def load_part(
    checkpoint: Checkpoint, folder: Path, name: str, *, keep: Callable[[str], bool]
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Load one model of a diffusers checkpoint in float32, and return the tensors that `keep` accepts as well.

    Tensors that `keep` refuses are neither read nor checked: nothing may be computed with them. Raises
    TeacherError for another class, and for missing, surplus or misshapen tensors.
    """
    config = read_json(checkpoint, folder / "config.json")
    if config.get("_class_name") != name:
        raise checkpoint.error(f"{folder.name}/config.json is for {config.get('_class_name')}, expected {name}", _WHOLE)
    try:
        model = getattr(importlib.import_module("diffusers"), name).from_config(config)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise checkpoint.error(f"{folder.name}/config.json does not describe a {name}: {error}", _WHOLE) from error
    tensors = read_weights(checkpoint, folder, keep=keep)
    given = {_new_name(key): tensor.float() for key, tensor in tensors.items()}
    wanted = {key: tensor.shape for key, tensor in model.state_dict().items() if keep(key)}
    wrong = [
        f"{len(keys)} {what} ({', '.join(sorted(keys)[:3])})"
        for what, keys in (
            ("missing", wanted.keys() - given.keys()),
            ("unexpected", given.keys() - wanted.keys()),
            ("of another shape", {key for key in wanted.keys() & given.keys() if wanted[key] != given[key].shape}),
        )
        if keys
    ]
    if wrong:
        raise checkpoint.error(
            f"the weights in {folder.name} are not those of the {name} that config.json describes: "
            f"tensors {'; '.join(wrong)}",
            _WHOLE,
        )
    model.load_state_dict(given, strict=False)  # checked above, name by name
    return model, tensors


def signal_and_noise(checkpoint: Checkpoint, path: Path, step: int) -> Schedule:
    """Return √ᾱ and √(1 − ᾱ) of a step, by the betas of the scheduler's config (DDPM, arXiv 2006.11239).

    `scaled_linear` betas are squares of evenly spaced roots, as in latent diffusion (arXiv 2112.10752). Raises
    TeacherError for another schedule or a step that it does not have.
    """
    config = read_json(checkpoint, path)
    kind = config.get("beta_schedule")
    try:
        steps, start, end = (
            int(config["num_train_timesteps"]), float(config["beta_start"]), float(config["beta_end"])
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise checkpoint.error(f"{path.name} does not state its betas: {error}", _WHOLE) from error
    if config.get("trained_betas") is not None or kind not in ("linear", "scaled_linear"):
        raise checkpoint.error(
            f"{path.name} has the schedule {kind!r}, expected linear or scaled_linear without trained_betas", _WHOLE
        )
    if step >= steps:
        raise checkpoint.error(f"timestep={step} is beyond its {steps} steps", f"timestep is 0 to {steps - 1}.")
    power = 2 if kind == "scaled_linear" else 1
    betas = np.linspace(start ** (1 / power), end ** (1 / power), steps) ** power
    remaining = float(np.prod(1 - betas[: step + 1]))
    record: dict[str, Scalar] = {"beta_schedule": str(kind), "beta_start": start, "beta_end": end, "steps": steps}
    return Schedule(remaining**0.5, (1 - remaining) ** 0.5, record)


def noise_from_digest(teacher: str, digest: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw standard normal float32 values from the first 128 bits of a SHA-256 in hexadecimal.

    Philox's raw 64-bit words, whose stream numpy promises to keep, give uniforms u = word · 2⁻⁶⁴ rounded down to 53
    bits; Box and Muller's √(−2 ln(1 − u₁)) · (cos 2πu₂, sin 2πu₂) makes two normals of two uniforms.
    Raises TeacherError for what is no such digest.
    """
    if not _DIGEST.fullmatch(digest):
        raise TeacherError(f"{teacher}: {digest!r} is no SHA-256 in hexadecimal", "Give the digest of the image file.")
    pairs = -(-int(np.prod(shape)) // 2)
    words = np.random.Philox(key=int(digest[:32], 16)).random_raw(2 * pairs)
    first, second = ((words >> np.uint64(11)) * 2.0**-53).reshape(2, pairs)
    radius = np.sqrt(-2 * np.log1p(-first))
    normal = np.concatenate((radius * np.cos(2 * np.pi * second), radius * np.sin(2 * np.pi * second)))
    return normal[: int(np.prod(shape))].reshape(shape).astype(np.float32)


def _new_name(name: str) -> str:
    match = _OLD_ATTENTION.match(name)
    return f"{match['block']}.{_NEW_ATTENTION[match['part']]}.{name[match.end() :]}" if match else name


def read_json(checkpoint: Checkpoint, path: Path) -> dict[str, Any]:
    """Read a file that must hold a JSON object; raises TeacherError."""
    shown = f"{path.parent.name}/{path.name}"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise checkpoint.error(f"{shown} is missing", _WHOLE) from error
    except (OSError, ValueError) as error:
        raise checkpoint.error(f"{shown} cannot be read as JSON: {error}", "Download it again.") from error
    if not isinstance(config, dict):
        raise checkpoint.error(f"{shown} does not hold a JSON object", "Download it again.")
    return config
