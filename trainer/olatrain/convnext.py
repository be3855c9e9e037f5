"""The CLIP-ConvNeXT tower of OLA-VLM: OpenCLIP's weights under the names of transformers' `ConvNextModel`.

The public code takes timm's trunk (`stem`, `stages`) without its head: the last stage's map, not normalised, row by
row. That is what `FastVlmForConditionalGeneration` gives its projector, so an imported student needs transformers
alone.

timm's `convnext_xxlarge` has layer norms with ε = 1e-5 (`norm_eps` there), transformers writes 1e-6 into its code. The
difference is folded into the weights, which is exact: with its input multiplied by c, a layer norm computes
cx̃ / √(c²σ² + ε) = x̃ / √(σ² + ε/c²), so c = √(ε/ε') turns ε into ε'. The stream between the layers carries the factor
from the first norm to the last downsampling; the last stage gives what timm's gives.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ConvNextConfig, ConvNextModel

from olaschema.errors import ConfigError
from olatrain.weights import read_json, read_weights

OPEN_CLIP_CONFIG = "open_clip_config.json"
# ε of the layer norms by timm's name of the model (timm/models/convnext.py)
_EPSILON = {"convnext_xxlarge": 1e-5, "convnext_large": 1e-6}
# ε of every layer norm that `ConvNextModel` computes before its last map; its config has none for them
THEIR_EPSILON = 1e-6
_PUBLISHED_SIZE = 768
_NAMES = (
    ("embeddings.patch_embeddings", "stem.0"), ("embeddings.layernorm", "stem.1"), ("encoder.stages", "stages"),
    ("downsampling_layer", "downsample"), (".layers.", ".blocks."), ("layer_scale_parameter", "gamma"),
    ("dwconv", "conv_dw"), ("pwconv", "mlp.fc"), (".layernorm.", ".norm."),
)  # fmt: skip


def is_convnext(tower: str) -> bool:
    """Whether a published config's `mm_vision_tower` is a ConvNeXT, as the public code tells it: by the name."""
    return "convnext" in tower.lower()


def published_name(ours: str) -> str:
    """Return timm's name of a tensor of `ConvNextModel`."""
    if ours.startswith("layernorm."):
        return f"head.norm.{ours.removeprefix('layernorm.')}"
    for theirs, timm in _NAMES:
        ours = ours.replace(theirs, timm)
    return ours


def trunk(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return timm's trunk out of OpenCLIP's `visual.trunk.…`, or of names that are the trunk's already."""
    inside = {n.removeprefix("visual.trunk."): t for n, t in weights.items() if n.startswith("visual.trunk.")}
    return inside or {n: t for n, t in weights.items() if n.startswith(("stem.", "stages.", "head.norm.", "norm_pre."))}


def convnext_config(tower: str, weights: Mapping[str, Tensor], where: Path) -> ConvNextConfig:
    """Work out the model from its published name and timm's tensors: widths, depths, ε, and the images' size.

    The size is the name's `-res768`, 768 without. `hidden_size`, the last width, is where a projector looks for it.
    Raises ConfigError for a name whose ε is not known here, for tokens resized (`interp`) or of several stages, and for
    tensors that are no ConvNeXT.
    """
    name = tower.rstrip("/").rpartition("/")[2]
    known = [model for model in _EPSILON if f"CLIP-{model}" in name]
    parts = name.split("-")
    if not known or "multi-stage" in name or any(part.startswith("interp") for part in parts):
        raise ConfigError(
            f"the vision tower {tower} is no ConvNeXT that this version knows",
            f"Known are CLIP-{', CLIP-'.join(_EPSILON)} with -resN or without, the last stage alone and not resized.",
        )
    sizes = [part.removeprefix("res") for part in parts if re.fullmatch(r"res\d+", part)]
    depths: dict[int, int] = {}
    for found in filter(None, (re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", key) for key in weights)):
        stage, block = int(found[1]), int(found[2])
        depths[stage] = max(depths.get(stage, 0), block + 1)
    try:
        widths = [len(weights[f"stages.{stage}.blocks.0.conv_dw.bias"]) for stage in range(len(depths))]
        patch = weights["stem.0.weight"].shape[-1]
    except KeyError as error:
        raise ConfigError(f"{where}: the vision tower has no tensor {error.args[0]}", "Is it complete?") from error
    size, reduction = int(sizes[-1]) if sizes else _PUBLISHED_SIZE, patch * 2 ** (len(widths) - 1)
    if not widths or size % reduction:
        raise ConfigError(
            f"{tower}: images of {size} pixels are no whole number of {reduction} pixel fields", "Check -resN."
        )
    made: Any = ConvNextConfig
    config: ConvNextConfig = made(
        hidden_sizes=widths,
        hidden_size=widths[-1],
        depths=[depths[stage] for stage in range(len(widths))],
        patch_size=patch,
        image_size=size,
        layer_norm_eps=_EPSILON[known[0]],
    )
    return config


def load_convnext(folder: Path, dtype: torch.dtype) -> ConvNextModel:
    """Load a tower from OpenCLIP's or timm's folder, whose name says which model it is, as transformers' own.

    Raises ConfigError for a name that is not known, and naming a tensor that is missing or has no place.
    """
    found = trunk(read_weights(folder))
    config = convnext_config(folder.resolve().name, found, folder)
    found = fold_epsilon(found, config.num_stages, config.layer_norm_eps)
    tower: Any = ConvNextModel(config)
    # of the head's norm, which follows the map that a student reads, some checkpoints have none
    named = {
        ours: published_name(ours)
        for ours in tower.state_dict()
        if published_name(ours) in found or not ours.startswith("layernorm.")
    }
    missing = sorted(set(named.values()) - found.keys())
    left = sorted(found.keys() - set(named.values()))
    if missing or left:
        what = f"has no tensor {missing[0]}" if missing else f"has {left[0]}, which has no place in the tower"
        raise ConfigError(f"{folder} {what}", "Give the folder of an OpenCLIP ConvNeXT as it was published (--vision).")
    try:
        tower.load_state_dict({ours: found[theirs] for ours, theirs in named.items()}, strict=False)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(f"{folder} cannot be loaded: {first}", "Is it the model that its name says?") from error
    loaded: ConvNextModel = tower.to(dtype)
    return loaded


def fold_epsilon(weights: Mapping[str, Tensor], stages: int, epsilon: float) -> dict[str, Tensor]:
    """Return timm's tensors so that layer norms of ε = 1e-6 compute what they do with `epsilon`, in their dtypes.

    Exact up to one rounding of each changed tensor to its own dtype; the head's norm keeps its input.
    """
    c = math.sqrt(THEIR_EPSILON / epsilon)
    stream = [c] * (stages - 1) + [1.0]
    found = dict(weights)

    def multiply(prefix: str, factor: float, *names: str) -> None:
        for name in (f"{prefix}{end}" for end in names):
            if factor != 1.0 and name in found:
                found[name] = (found[name].to(torch.float64) * factor).to(found[name].dtype)

    multiply("stem.0.", c, "weight", "bias")
    multiply("stem.1.", stream[0], "weight", "bias")
    for stage, carried in enumerate(stream):
        multiply(f"stages.{stage}.downsample.1.", carried, "weight", "bias")
        for prefix in sorted({m[1] for m in (re.match(rf"(stages\.{stage}\.blocks\.\d+\.)", n) for n in weights) if m}):
            multiply(prefix, c / carried, "conv_dw.weight")
            multiply(prefix, c, "conv_dw.bias")
            multiply(prefix, carried, "gamma")
    return found


def image_settings(folder: Path) -> dict[str, Any]:
    """Return mean and standard deviation from OpenCLIP's own config, where a folder has one.

    Raises ConfigError for another filter than the bicubic one, or another way to a square than CLIP's.
    """
    path = folder / OPEN_CLIP_CONFIG
    if not path.is_file():
        return {}
    found = read_json(path).get("preprocess_cfg", {})
    for name, wanted in (("interpolation", "bicubic"), ("resize_mode", "shortest")):
        if found.get(name, wanted) != wanted:
            raise ConfigError(f"{path}: {name} is {found[name]}", f"Only {wanted} is supported.")
    return {
        ours: list(found[theirs]) for theirs, ours in (("mean", "image_mean"), ("std", "image_std")) if theirs in found
    }
