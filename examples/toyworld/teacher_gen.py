"""The toy world's unCLIP image encoder, trained to let a small decoder draw the picture's thumbnail back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fitting import CLIP_MEAN, CLIP_STD, batch_of, fit, held_out, pixels_of, r_squared, write_half, write_json
from safetensors.torch import load_file, save_file
from scenes import Split
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

SIDE = 96
"""Pixels of a side of what it sees: pictures are squashed to squares."""
THUMBNAIL = 24
EMBEDDING = 128


class Drawer(nn.Module):
    """Draws a thumbnail (B, 3, 24, 24) from an embedding (B, D)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first = nn.Linear(size, 96 * 6 * 6)
        self.layers = nn.Sequential(
            nn.GELU(), nn.Upsample(scale_factor=2), nn.Conv2d(96, 64, 3, padding=1),
            nn.GELU(), nn.Upsample(scale_factor=2), nn.Conv2d(64, 32, 3, padding=1), nn.GELU(),
            nn.Conv2d(32, 3, 3, padding=1),
        )  # fmt: skip

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the thumbnails."""
        drawn: Tensor = self.layers(self.first(embeddings).reshape(-1, 96, 6, 6))
        return drawn


def gen_batch(split: Split, start: int, count: int, *, draw: int = 0) -> tuple[Tensor, Tensor]:
    """Return pixels (B, 3, 96, 96) and thumbnails (B, 3, 24, 24), both normalised."""
    batch, mirror = batch_of(split, start, count, SIDE, draw=draw)
    pixels = pixels_of(batch, mirror, CLIP_MEAN, CLIP_STD)
    return pixels, functional.interpolate(pixels, size=(THUMBNAIL, THUMBNAIL), mode="area")


def train_gen(out: Path, steps: int, batch: int, *, draw: int = 0) -> None:
    """Train CLIP's image encoder with projection to tell everything that a thumbnail shows."""
    torch.manual_seed(3 + draw)
    config = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=8,
        projection_dim=EMBEDDING,
        hidden_act="gelu",
    )
    model, drawer = CLIPVisionModelWithProjection(config), Drawer(EMBEDDING)

    def loss(step: int) -> Tensor:
        pixels, thumbnails = gen_batch("train", step * batch, batch, draw=draw)
        drawn = drawer(model(pixels).image_embeds)
        return functional.mse_loss(drawn, thumbnails) + 0.5 * functional.l1_loss(drawn, thumbnails)

    fit(nn.ModuleList([model, drawer]), loss, steps, lr=1e-3, out=out)
    write_gen(model, drawer, out)


def write_gen(model: CLIPVisionModelWithProjection, drawer: Drawer, out: Path) -> None:
    """Write what an unCLIP pipeline sees images with, and the decoder beside it."""
    write_half(model, out / "image_encoder")
    save_file(drawer.half().state_dict(), out / "drawer.safetensors")
    processor = {
        "do_center_crop": False, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_mean": CLIP_MEAN, "image_processor_type": "CLIPImageProcessor", "image_std": CLIP_STD, "resample": 3,
        "rescale_factor": 1 / 255, "size": {"height": SIDE, "width": SIDE},
    }  # fmt: skip
    write_json(out / "feature_extractor" / "preprocessor_config.json", processor)
    # The pipeline's other parts are not here; diffusers' way to say so is a pair of nulls.
    absent = ("image_normalizer", "image_noising_scheduler", "scheduler", "text_encoder", "tokenizer", "unet", "vae")
    index: dict[str, Any] = {
        "_class_name": "StableUnCLIPImg2ImgPipeline",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    }
    write_json(out / "model_index.json", index | {part: [None, None] for part in absent})


@torch.no_grad()
def score_gen(folder: Path) -> dict[str, float]:
    """Return how much of the thumbnails' variance is drawn back from the embeddings, on held-out scenes."""
    model = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder")
    drawer = Drawer(EMBEDDING).eval()
    drawer.load_state_dict(load_file(folder / "drawer.safetensors"))
    drawn, truth = [], []
    for start in held_out(32):
        pixels, thumbnails = gen_batch("test", start, 32)
        drawn.append(drawer(model(pixels).image_embeds))
        truth.append(thumbnails)
    p, t = torch.cat(drawn), torch.cat(truth)
    mean_map = t.mean(dim=0, keepdim=True).expand_as(t)
    return {"test R²": r_squared(p, t), "test R² of the mean thumbnail": r_squared(mean_map, t)}
