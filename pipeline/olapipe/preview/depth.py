"""Depth from stored tokens: the checkpoint's own DPT neck and head, fed the same map at every level."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import DepthAnythingConfig, Dinov2Backbone
from transformers.models.depth_anything.modeling_depth_anything import (
    DepthAnythingDepthEstimationHead,
    DepthAnythingNeck,
)

from olapipe.preview.base import Decoder, Drawing
from olapipe.preview.depth_original import head_config, head_to_hub_names
from olapipe.preview.modules import load_parts
from olapipe.preview.panels import heat
from olapipe.teachers.checkpoint import Checkpoint, locate, read_config, read_weights
from olapipe.teachers.depth import GRID, fix_positions
from olapipe.teachers.depth_original import original_file, published_config, to_hub_names
from olapipe.teachers.huggingface import load_strictly, make_config
from olaschema.manifest import Fingerprint

_BACKBONE = "backbone."


class DepthDecoder(Decoder[np.ndarray]):
    """Relative inverse depth, float32 `(H, W)`, larger is nearer. Its scale means nothing across pictures."""

    def __init__(self, backbone: torch.nn.Module, neck: Any, head: Any, device: torch.device) -> None:
        # transformers' own annotations of calling a model are lost in its decorators
        self._backbone: Any = backbone.to(device=device)
        self._neck = neck.to(device=device)
        self._head = head.to(device=device)
        self._levels = len(self._neck.convs)
        self._patch = int(self._head.patch_size)
        self._device = device

    def full(self, pixels_chw: np.ndarray) -> np.ndarray:
        """Return the depth of preprocessed pixels by the whole model, each level from its own tap."""
        _, height, width = pixels_chw.shape
        with torch.inference_mode():
            taps_bnd = self._backbone(torch.from_numpy(pixels_chw)[None].to(self._device)).feature_maps
            return self._depth(list(taps_bnd), height // self._patch, width // self._patch)

    def decode(self, feature: np.ndarray, pixels_chw: np.ndarray | None = None) -> np.ndarray:
        """Return the depth that neck and head read from one map `(H, W, C)` given as each of their levels."""
        height, width, channels = feature.shape
        with torch.inference_mode():
            tokens_bnd = torch.from_numpy(feature).reshape(1, height * width, channels).to(self._device)
            # the neck drops the class token, which is not stored: any value will do
            tokens_bnd = torch.cat((torch.zeros_like(tokens_bnd[:, :1]), tokens_bnd), dim=1)
            return self._depth([tokens_bnd] * self._levels, height, width)

    def draw(self, output: np.ndarray) -> Drawing:
        """Draw near as bright and far as dark, over the picture's own range."""
        low, high = float(output.min()), float(output.max())
        return Drawing(heat(output), f"bright is near; {low:.3g} to {high:.3g} (relative)")

    def agreement(self, full: np.ndarray, decoded: np.ndarray) -> str:
        """Pearson's correlation over pixels: relative depth is defined up to scale and shift."""
        if min(full.std(), decoded.std()) == 0:
            return "one of the depth maps is constant"
        return f"correlation with the full teacher's depth {np.corrcoef(full.ravel(), decoded.ravel())[0, 1]:.4f}"

    def _depth(self, levels_bnd: list[torch.Tensor], height: int, width: int) -> np.ndarray:
        depth_bhw: torch.Tensor = self._head(self._neck(levels_bnd, height, width), height, width)
        depth: np.ndarray = depth_bhw[0].cpu().numpy()
        return depth


def load(checkpoint: str, fingerprint: Fingerprint, device: torch.device) -> DepthDecoder:
    """Load encoder, neck and head from the Hugging Face layout or an original `.pth`; raises TeacherError.

    The position embedding is interpolated as the fingerprint says, so that the encoder is the teacher's.
    """
    found = locate(fingerprint.teacher, checkpoint)
    values, tensors = _read(found)
    ours = {"apply_layernorm": True, "reshape_hidden_states": False, "use_mask_token": False}
    values["backbone_config"] = {**values["backbone_config"], **ours}
    config: Any = make_config(DepthAnythingConfig, values, found)
    encoder = {name.removeprefix(_BACKBONE): tensor for name, tensor in tensors.items() if name.startswith(_BACKBONE)}
    backbone = load_strictly(Dinov2Backbone, config.backbone_config, encoder, found)
    fix_positions(backbone, grid=GRID, interpolation=str(fingerprint.options["position_interpolation"]))
    neck = DepthAnythingNeck(config)  # type: ignore[no-untyped-call]
    head = DepthAnythingDepthEstimationHead(config)  # type: ignore[no-untyped-call]
    load_parts({"neck.": neck, "head.": head}, tensors, found)
    return DepthDecoder(backbone.requires_grad_(False), neck, head, device)


def _read(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the config's values and all tensors that compute depth, by their Hugging Face names."""
    original = original_file(checkpoint)
    if original is None:
        return _described(checkpoint), read_weights(checkpoint, checkpoint.path, keep=_computes_depth)
    encoder = {name: tensor for name, tensor in to_hub_names(checkpoint, original).items() if _computes_depth(name)}
    head = head_to_hub_names(checkpoint, original)
    if checkpoint.path.is_dir() and (checkpoint.path / "config.json").is_file():
        return _described(checkpoint), encoder | head
    backbone = published_config(checkpoint, encoder)
    return {"backbone_config": {"model_type": "dinov2", **backbone}, **head_config(backbone, head)}, encoder | head


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    what = "Depth Anything V2 checkpoint"
    return read_config(checkpoint, checkpoint.path, model_type="depth_anything", what=what)


def _computes_depth(name: str) -> bool:
    return not name.endswith(".mask_token")
