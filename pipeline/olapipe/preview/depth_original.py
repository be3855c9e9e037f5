"""The DPT head of Depth Anything V2 in its original naming, `depth_head.…` in `depth_anything_v2_vit{s,b,l}.pth`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olapipe.teachers.checkpoint import Checkpoint, read_original

if TYPE_CHECKING:
    import torch

_LEVELS = 4
_PREFIX = "depth_head."
_UNIT = re.compile(r"scratch\.refinenet([1-4])\.(?:resConfUnit([12])\.conv([12])|out_conv)\.(weight|bias)")
_OUTPUT = {"output_conv1": "conv1", "output_conv2.0": "conv2", "output_conv2.2": "conv3"}
_RENAMED = (
    (re.compile(r"projects\.(\d)\."), r"neck.reassemble_stage.layers.\1.projection."),
    (re.compile(r"resize_layers\.(\d)\."), r"neck.reassemble_stage.layers.\1.resize."),
)


def head_to_hub_names(checkpoint: Checkpoint, path: Path) -> dict[str, torch.Tensor]:
    """Read an original file and return its head's tensors by the names of the Hugging Face layout.

    Raises TeacherError where the file holds the encoder alone.
    """
    tensors = {
        _renamed(name.removeprefix(_PREFIX)): tensor
        for name, tensor in read_original(checkpoint, path).items()
        if name.startswith(_PREFIX)
    }
    if "head.conv2.weight" not in tensors:
        raise checkpoint.error(
            f"{path.name} has no depth head, only an encoder", "Pass the file as it was published, head included."
        )
    return tensors


def _renamed(name: str) -> str:
    if match := _UNIT.fullmatch(name):
        level, unit, convolution, kind = match.groups()
        layer = f"neck.fusion_stage.layers.{_LEVELS - int(level)}"  # counted from the coarsest level
        if unit is None:
            return f"{layer}.projection.{kind}"
        return f"{layer}.residual_layer{unit}.convolution{convolution}.{kind}"
    if match := re.fullmatch(r"scratch\.layer([1-4])_rn\.weight", name):
        return f"neck.convs.{int(match[1]) - 1}.weight"
    if match := re.fullmatch(r"scratch\.(output_conv1|output_conv2\.[02])\.(weight|bias)", name):
        return f"head.{_OUTPUT[match[1]]}.{match[2]}"
    for pattern, replacement in _RENAMED:
        if pattern.match(name):
            return pattern.sub(replacement, name)
    return name  # strict loading names it as unexpected


def head_config(backbone: Mapping[str, Any], head: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the head's settings in `config.json`'s words, read off the shapes of its tensors."""
    levels = [f"neck.reassemble_stage.layers.{level}.projection.weight" for level in range(_LEVELS)]
    return {
        "reassemble_hidden_size": backbone["hidden_size"],
        "patch_size": backbone["patch_size"],
        "neck_hidden_sizes": [head[name].shape[0] for name in levels if name in head],
        "fusion_hidden_size": head["head.conv1.weight"].shape[1],
        "head_hidden_size": head["head.conv2.weight"].shape[0],
    }
