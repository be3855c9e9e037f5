"""Depth from stored means: laid out in the picture's plane."""

from __future__ import annotations

import numpy as np
import torch

from olapipe.preview.depth import DepthDecoder, read_model
from olaschema.manifest import Fingerprint


class DepthMapDecoder(DepthDecoder):
    """Float32 `(H, W)`, beside the whole model's map of the same size."""

    def decode(self, feature: np.ndarray, pixels_chw: np.ndarray | None = None) -> np.ndarray:
        """Lay out one map of means `(h, w, parts²)`, each over the pixels that it was taken over."""
        height, width, channels = feature.shape
        parts = round(channels**0.5)
        means = feature.reshape(height, width, parts, parts).swapaxes(1, 2).reshape(height * parts, width * parts)
        side = int(self._model.config.patch_size)
        laid_out = torch.nn.functional.interpolate(
            torch.from_numpy(means)[None, None], size=(height * side, width * side), mode="nearest-exact"
        )
        return laid_out[0, 0].numpy()


def load(checkpoint: str, fingerprint: Fingerprint, device: torch.device) -> DepthMapDecoder:
    """Load encoder, neck and head as the teacher does; raises TeacherError."""
    return DepthMapDecoder(read_model(checkpoint, fingerprint), device)
