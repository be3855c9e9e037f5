"""Depth Anything V2 in its original naming: `depth_anything_v2_vit{s,b,l}.pth`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olapipe.teachers.checkpoint import Checkpoint, read_original, weight_file

if TYPE_CHECKING:
    import torch

MEAN = (0.485, 0.456, 0.406)
"""ImageNet's channel means, by which DINOv2 and Depth Anything normalise."""
STD = (0.229, 0.224, 0.225)

# Blocks tapped by the published models, 0-based, by number of blocks (DepthAnything/Depth-Anything-V2).
_PUBLISHED_TAPS = {12: (2, 5, 8, 11), 24: (4, 11, 17, 23)}
_HEAD_WIDTH = 64
_LEVELS = 4
_DPT_PREFIX = "depth_head."

_RENAMED = (
    (re.compile(r"^pretrained\.cls_token$"), "backbone.embeddings.cls_token"),
    (re.compile(r"^pretrained\.mask_token$"), "backbone.embeddings.mask_token"),
    (re.compile(r"^pretrained\.pos_embed$"), "backbone.embeddings.position_embeddings"),
    (re.compile(r"^pretrained\.patch_embed\.proj\."), "backbone.embeddings.patch_embeddings.projection."),
    (re.compile(r"^pretrained\.norm\."), "backbone.layernorm."),
    (re.compile(r"^pretrained\.blocks\.(\d+)\.attn\.proj\."), r"backbone.encoder.layer.\1.attention.output.dense."),
    (re.compile(r"^pretrained\.blocks\.(\d+)\.ls([12])\.gamma$"), r"backbone.encoder.layer.\1.layer_scale\2.lambda1"),
    (re.compile(r"^pretrained\.blocks\.(\d+)\.(norm[12]|mlp\.fc[12])\."), r"backbone.encoder.layer.\1.\2."),
)  # fmt: skip
_QKV = re.compile(r"^pretrained\.blocks\.(\d+)\.attn\.qkv\.(weight|bias)$")
_DPT_UNIT = re.compile(r"scratch\.refinenet([1-4])\.(?:resConfUnit([12])\.conv([12])|out_conv)\.(weight|bias)")
_DPT_OUTPUT = {"output_conv1": "conv1", "output_conv2.0": "conv2", "output_conv2.2": "conv3"}
_DPT_RENAMED = (
    (re.compile(r"projects\.(\d)\."), r"neck.reassemble_stage.layers.\1.projection."),
    (re.compile(r"resize_layers\.(\d)\."), r"neck.reassemble_stage.layers.\1.resize."),
)


def original_file(checkpoint: Checkpoint) -> Path | None:
    """Return the `.pth` file if the checkpoint is one, or a folder with one and no Hugging Face weights.

    Raises TeacherError where a folder holds several.
    """
    if checkpoint.path.is_file():
        return checkpoint.path
    if weight_file(checkpoint.path) is not None:
        return None
    found = sorted(checkpoint.path.glob("*.pth"))
    if len(found) > 1:
        raise checkpoint.error(
            f"holds several .pth files: {', '.join(path.name for path in found)}",
            f"Pass the file itself: --checkpoint {checkpoint.teacher}={found[0]}",
        )
    return found[0] if found else None


def to_hub_names(checkpoint: Checkpoint, path: Path) -> dict[str, torch.Tensor]:
    """Read an original file and return the encoder's tensors by the names of the Hugging Face layout.

    The fused query-key-value matrix, `(3 · D, D)`, is cut into its three parts.
    Raises TeacherError where the file is damaged or not of this model.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in read_original(checkpoint, path).items():
        if match := _QKV.match(name):
            block, kind = match.groups()
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                tensors[f"backbone.encoder.layer.{block}.attention.attention.{part}.{kind}"] = piece
        elif name.startswith("pretrained."):
            tensors[_renamed(name)] = tensor
    if "backbone.embeddings.position_embeddings" not in tensors:
        raise checkpoint.error(
            f"{path.name} holds no tensor pretrained.pos_embed, so it is no Depth Anything V2 model",
            "Pass a published depth_anything_v2_vits.pth, …_vitb.pth or …_vitl.pth, or the Hugging Face folder.",
        )
    return tensors


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMED:
        if pattern.match(name):
            return pattern.sub(replacement, name)
    return name  # strict loading names it as unexpected


def published_config(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Describe the published ViT-S, ViT-B or ViT-L whose tensors these are, as a DINOv2 config.

    Raises TeacherError for another number of blocks or another width of head.
    """
    positions = tensors["backbone.embeddings.position_embeddings"]
    width = positions.shape[-1]
    blocks = len({name.split(".")[3] for name in tensors if name.startswith("backbone.encoder.layer.")})
    if blocks not in _PUBLISHED_TAPS or width % _HEAD_WIDTH:
        raise checkpoint.error(
            f"has {blocks} blocks of width {width}: not a published ViT-S, ViT-B or ViT-L",
            "Put the config.json of its Hugging Face layout beside it.",
        )
    patch = tensors["backbone.embeddings.patch_embeddings.projection.weight"].shape[-1]
    return {
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": width // _HEAD_WIDTH,
        "image_size": round((positions.shape[1] - 1) ** 0.5) * patch,
        "patch_size": patch,
        "out_indices": [tap + 1 for tap in _PUBLISHED_TAPS[blocks]],
    }


def head_to_hub_names(checkpoint: Checkpoint, path: Path) -> dict[str, torch.Tensor]:
    """Read an original file and return its head's tensors by the names of the Hugging Face layout.

    Raises TeacherError where the file holds the encoder alone.
    """
    tensors = {
        _dpt_renamed(name.removeprefix(_DPT_PREFIX)): tensor
        for name, tensor in read_original(checkpoint, path).items()
        if name.startswith(_DPT_PREFIX)
    }
    if "head.conv2.weight" not in tensors:
        raise checkpoint.error(
            f"{path.name} has no depth head, only an encoder", "Pass the file as it was published, head included."
        )
    return tensors


def _dpt_renamed(name: str) -> str:
    if match := _DPT_UNIT.fullmatch(name):
        level, unit, convolution, kind = match.groups()
        layer = f"neck.fusion_stage.layers.{_LEVELS - int(level)}"  # counted from the coarsest level
        if unit is None:
            return f"{layer}.projection.{kind}"
        return f"{layer}.residual_layer{unit}.convolution{convolution}.{kind}"
    if match := re.fullmatch(r"scratch\.layer([1-4])_rn\.weight", name):
        return f"neck.convs.{int(match[1]) - 1}.weight"
    if match := re.fullmatch(r"scratch\.(output_conv1|output_conv2\.[02])\.(weight|bias)", name):
        return f"head.{_DPT_OUTPUT[match[1]]}.{match[2]}"
    for pattern, replacement in _DPT_RENAMED:
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
