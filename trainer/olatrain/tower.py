"""The control `target_control = self`: the student's own vision tower in the teacher's place.

The target of an image is what the student's initial tower gives for it, at the layer that the student itself reads, on
the teacher's grid: averages over as equal rectangles as can be (`adaptive_avg_pool2d`) where that grid is no finer than
the tower's, bilinear (`align_corners=False`) where it is finer in a direction; the mean over all patches for a teacher
of one vector. Channels are the tower's. An arm trained so learns nothing that the student does not see already.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from olaschema.errors import ConfigError
from olaschema.manifest import Fingerprint
from olatrain.stream import Sample, SampleStream
from olatrain.tokens import TaskTokens


class Tower(nn.Module):
    """A student's vision tower as it was when the run began; `frozen_copy` where the student's own trains.

    Raises ConfigError for a student that is no LLaVA: tiles and patches of a shape of their own have no common grid.
    """

    def __init__(self, model: Any, tokens: TaskTokens, *, frozen_copy: bool) -> None:
        super().__init__()
        if tokens.family != "llava":
            raise ConfigError(
                f"target_control = self is for LLaVA students; this one is {tokens.family}, whose tower has no grid of "
                "its own for an image",
                "Use the control shuffle or mean.",
            )
        config = model.config
        tower = model.model.vision_tower
        self._tower = copy.deepcopy(tower).requires_grad_(False) if frozen_copy else tower
        layers = config.vision_feature_layer
        self._layers: list[int] = [layers] if isinstance(layers, int) else list(layers)
        self._is_map = config.model_type == "fast_vlm"
        self._drop_first = config.vision_feature_select_strategy == "default"
        self.channels = int(tower.config.hidden_size) * len(self._layers)

    def shape(self, teacher: Fingerprint) -> tuple[int, ...]:
        """Return the shape of the targets in a teacher's place: its grid, the tower's channels."""
        return (*(teacher.grid or ()), self.channels)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the features (I, h, w, C) of images (I, 3, H, W) as they enter the student's projector, float32."""
        if self._is_map:  # (I, C, h, w), the whole of it as the projector reads it
            found: Tensor = self._tower(pixel_values).last_hidden_state
            return found.permute(0, 2, 3, 1).float()
        states = self._tower(pixel_values, output_hidden_states=True).hidden_states
        chosen = [states[layer][:, 1:] if self._drop_first else states[layer] for layer in self._layers]
        patches = torch.cat(chosen, dim=-1).float()
        side = math.isqrt(patches.shape[1])
        if side * side != patches.shape[1]:
            raise ConfigError(
                f"the tower gives {patches.shape[1]} vectors for an image, which are no square",
                "target_control = self needs a student that drops the class token (vision_feature_select_strategy).",
            )
        return patches.reshape(len(patches), side, side, self.channels)


def on_grid(maps: Tensor, shape: Sequence[int]) -> Tensor:
    """Bring features (I, h, w, C) to a target's shape: (I, H, W, C), or (I, C) where it has no grid."""
    if len(shape) == 1:
        return maps.mean(dim=(1, 2))
    grid = (shape[0], shape[1])
    channels_first = maps.permute(0, 3, 1, 2)
    if grid[0] <= maps.shape[1] and grid[1] <= maps.shape[2]:
        resized = functional.adaptive_avg_pool2d(channels_first, grid)
    else:
        resized = functional.interpolate(channels_first, size=grid, mode="bilinear", align_corners=False)
    return resized.permute(0, 2, 3, 1).contiguous()


def tower_means(
    tower: Tower, stream: SampleStream, shapes: Mapping[str, tuple[int, ...]], *, most: int, device: torch.device
) -> dict[str, Tensor]:
    """Return each teacher's mean target over the training images that have one of its features, (*shape) float32.

    Summed in float64, each image once; of more than `most` samples, that many evenly spaced ones are read.
    """
    totals = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    counts = dict.fromkeys(shapes, 0)
    seen: set[int] = set()
    tried = min(len(stream), most)
    for position in (number * len(stream) // tried for number in range(tried)):
        sample = stream[position]
        if not isinstance(sample, Sample):
            continue  # the training meets it again, and says why
        for row, shown, features in zip(sample.rows, sample.shown, sample.features, strict=True):
            wanted = [name for name in shapes if features[name] is not None]
            if row in seen or not wanted:
                continue
            seen.add(row)
            maps = tower(shown.inputs["pixel_values"].to(device)).cpu()
            for name in wanted:
                totals[name] += on_grid(maps, shapes[name])[0].double()
                counts[name] += 1
    return {name: (total / max(counts[name], 1)).float() for name, total in totals.items()}
