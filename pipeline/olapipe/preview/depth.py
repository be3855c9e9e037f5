"""Depth from stored tokens: the checkpoint's own DPT neck and head, fed the same map at every level."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from olapipe.preview.base import Decoder, Drawing
from olapipe.preview.panels import heat
from olapipe.teachers.checkpoint import locate
from olapipe.teachers.depth_map import whole_model
from olaschema.manifest import Fingerprint


class DepthDecoder(Decoder[np.ndarray]):
    """Float32 `(H, W)`: relative inverse depth, whose scale means nothing across pictures, or metres.

    Which one the checkpoint's config tells.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        # transformers' own annotations of calling a model are lost in its decorators
        self._model: Any = model.eval().requires_grad_(False).to(device=device)
        self._levels = len(self._model.neck.convs)
        self._metric = self._model.config.depth_estimation_type == "metric"
        self._device = device

    def full(self, pixels_chw: np.ndarray) -> np.ndarray:
        """Return the depth of preprocessed pixels by the whole model, each level from its own tap."""
        with torch.inference_mode():
            return _first(self._model(torch.from_numpy(pixels_chw)[None].to(self._device)).predicted_depth)

    def decode(self, feature: np.ndarray, pixels_chw: np.ndarray | None = None) -> np.ndarray:
        """Return the depth that neck and head read from one map `(H, W, C)` given as each of their levels."""
        height, width, channels = feature.shape
        with torch.inference_mode():
            tokens_bnd = torch.from_numpy(feature).reshape(1, height * width, channels).to(self._device)
            # the neck drops the class token, which is not stored: any value will do
            tokens_bnd = torch.cat((torch.zeros_like(tokens_bnd[:, :1]), tokens_bnd), dim=1)
            levels_bchw = self._model.neck([tokens_bnd] * self._levels, height, width)
            return _first(self._model.head(levels_bchw, height, width))

    def draw(self, output: np.ndarray) -> Drawing:
        """Draw near as bright and far as dark, over the picture's own range."""
        low, high = float(output.min()), float(output.max())
        unit = "metres" if self._metric else "relative"
        return Drawing(heat(-output if self._metric else output), f"bright is near; {low:.3g} to {high:.3g} ({unit})")

    def agreement(self, full: np.ndarray, decoded: np.ndarray) -> str:
        """Pearson's correlation over pixels: relative depth is defined up to scale and shift."""
        if min(full.std(), decoded.std()) == 0:
            return "one of the depth maps is constant"
        return f"correlation with the full teacher's depth {np.corrcoef(full.ravel(), decoded.ravel())[0, 1]:.4f}"


def _first(depth_bhw: torch.Tensor) -> np.ndarray:
    depth: np.ndarray = depth_bhw[0].cpu().numpy()
    return depth


def load(checkpoint: str, fingerprint: Fingerprint, device: torch.device) -> DepthDecoder:
    """Load encoder, neck and head from the Hugging Face layout or an original `.pth`; raises TeacherError.

    The position embedding is interpolated as the fingerprint says, so that the encoder is the teacher's.
    """
    return DepthDecoder(read_model(checkpoint, fingerprint), device)


def read_model(checkpoint: str, fingerprint: Fingerprint) -> Any:
    """Return the whole model, its encoder that of the fingerprint; raises TeacherError."""
    interpolation = str(fingerprint.options["position_interpolation"])
    model, _ = whole_model(locate(fingerprint.teacher, checkpoint), interpolation=interpolation)
    return model
