"""The toy world's depth teacher: a small Depth Anything V2, trained on inverse depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from fitting import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    batch_of,
    fit,
    held_out,
    pixels_of,
    r_squared,
    write_half,
    write_json,
)
from scenes import Split
from torch import Tensor, nn
from torch.nn import functional
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

SIDE = 96
"""Pixels of a side of what it sees: pictures are squashed to squares."""
COARSE = 48
"""Side in the first part of training, which is a sixth of the work."""
COARSE_SHARE = 0.76


def depth_config() -> DepthAnythingConfig:
    """Return a Depth Anything V2 of 64 channels and 5 blocks, patches of 4 pixels: a grid of 24 × 24 at 96 pixels."""
    taps: dict[str, Any] = {"out_indices": [2, 3, 4, 5]}
    backbone = Dinov2Config(
        hidden_size=64,
        num_hidden_layers=5,
        num_attention_heads=2,
        mlp_ratio=3,
        image_size=SIDE,
        patch_size=4,
        apply_layernorm=True,
        reshape_hidden_states=False,
        **taps,
    )
    return DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=4,
        reassemble_hidden_size=64,
        reassemble_factors=[1, 0.5, 0.25, 0.125],  # a quarter of the published ones: a sixteenth of the work
        neck_hidden_sizes=[8, 16, 16, 16],
        fusion_hidden_size=16,
        head_hidden_size=8,
    )


def depth_batch(split: Split, start: int, count: int, *, draw: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return pixels (B, 3, 96, 96), inverse depth (B, 96, 96) and the mask of things (B, 96, 96)."""
    batch, mirror = batch_of(split, start, count, SIDE, draw=draw)
    truth = torch.from_numpy(np.stack([one.inverse_depth for one in batch])).float()
    things = torch.from_numpy(np.stack([one.segments > 1 for one in batch]))
    if mirror:
        truth, things = truth.flip(-1), things.flip(-1)
    return pixels_of(batch, mirror, IMAGENET_MEAN, IMAGENET_STD), truth, things


def new_depth(seed: int) -> DepthAnythingForDepthEstimation:
    """Return the model before training."""
    torch.manual_seed(seed)
    model = DepthAnythingForDepthEstimation(depth_config())
    # the head ends in a ReLU: started at a positive value it cannot die before it learns
    bias: Any = model.head.conv3.bias
    nn.init.constant_(bias, 0.3)
    return model


def train_depth(out: Path, steps: int, batch: int, *, draw: int = 0) -> None:
    """Train it, first on small pictures; another `draw` has other scenes and begins from other weights."""
    model = new_depth(1 + draw)

    def loss(step: int) -> Tensor:
        pixels, truth, things = depth_batch("train", step * batch, batch, draw=draw)
        if step < COARSE_SHARE * steps:
            pixels = functional.interpolate(pixels, size=(COARSE, COARSE), mode="area")
        predicted = functional.interpolate(
            model(pixels).predicted_depth[:, None], size=(SIDE, SIDE), mode="bilinear", align_corners=False
        )[:, 0]
        error = (predicted - truth).abs()
        return error.mean() + 2.0 * (error * things).sum() / things.sum().clamp(min=1)

    fit(model, loss, steps, lr=1.5e-3, out=out)
    write_depth(model, out)


def write_depth(model: DepthAnythingForDepthEstimation, out: Path) -> None:
    """Write model and processor in the published layout."""
    write_half(model, out)
    processor = {
        "do_normalize": True, "do_pad": False, "do_rescale": True, "do_resize": True, "ensure_multiple_of": 4,
        "image_mean": IMAGENET_MEAN, "image_processor_type": "DPTImageProcessor", "image_std": IMAGENET_STD,
        "keep_aspect_ratio": False, "resample": 3, "rescale_factor": 1 / 255,
        "size": {"height": SIDE, "width": SIDE}, "size_divisor": None,
    }  # fmt: skip
    write_json(out / "preprocessor_config.json", processor)


@torch.no_grad()
def score_depth(folder: Path) -> dict[str, float]:
    """Return held-out R² of inverse depth, over all pixels and over those of things, of one scale for all."""
    model = DepthAnythingForDepthEstimation.from_pretrained(folder)
    found: dict[str, float] = {}
    splits: tuple[Split, ...] = ("test", "ood")
    for split in splits:
        predicted, target, mask = [], [], []
        for start in held_out(32):
            pixels, truth, things = depth_batch(split, start, 32)
            predicted.append(model(pixels).predicted_depth)
            target.append(truth)
            mask.append(things)
        p, t, m = torch.cat(predicted), torch.cat(target), torch.cat(mask)
        mean_map = t.mean(dim=0, keepdim=True).expand_as(t)
        found[f"{split} R²"] = r_squared(p, t)
        found[f"{split} R² of the mean map"] = r_squared(mean_map, t)
        found[f"{split} R² on things"] = r_squared(p[m], t[m])
        found[f"{split} R² on things of the mean map"] = r_squared(mean_map[m], t[m])
    return found
