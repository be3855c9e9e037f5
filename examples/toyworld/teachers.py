"""Small teachers trained on the toy world, in the on-disk layouts of the published ones.

    python examples/toyworld/teachers.py train OUT [depth seg gen]     trains and scores (an hour on a core)
    python examples/toyworld/teachers.py score FOLDER                  scores what is there on held-out scenes

`depth` is a Depth Anything V2 (inverse depth; accepted at a held-out R² above 0.9), `seg` a OneFormer with a Swin
backbone (panoptic: sky, ground, four shapes), `gen` the image encoder of an unCLIP pipeline, trained to draw a
thumbnail of the picture back from its embedding. Scores stand beside a trivial baseline: the training mean.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scenes import COLOURS, SHAPES, STUFF, Picture, Scene, make_scene, render
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    SwinConfig,
)

SIDE = 96
"""Pixels of a side of what depth and gen see: pictures are squashed to squares."""
SEG_SIDE = 192
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLASSES = (*STUFF, *SHAPES)
THUMBNAIL = 24
BICUBIC, BILINEAR = 3, 2
HELD_OUT = 512
"""Scenes of the test split that scores are taken on."""


def squashed(picture: Picture, side: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return a picture as the teachers see it, (3, side, side) float32."""
    filter_ = Image.Resampling.BICUBIC
    pixels = np.asarray(picture.image().resize((side, side), filter_), dtype=np.float32) / 255.0
    values = (pixels - np.array(mean, dtype=np.float32)) / np.array(std, dtype=np.float32)
    return torch.from_numpy(values.transpose(2, 0, 1).copy())


def nearest(values: np.ndarray, side: int) -> np.ndarray:
    """Return a map (H, W) at (side, side), the nearest value of each place."""
    rows = (np.arange(side) + 0.5) * values.shape[0] / side
    columns = (np.arange(side) + 0.5) * values.shape[1] / side
    return values[rows.astype(int)][:, columns.astype(int)]


def pictures(split: str, start: int, count: int) -> Iterator[tuple[Scene, Picture]]:
    """Yield scenes and their pictures."""
    for index in range(start, start + count):
        scene = make_scene(split, index)  # type: ignore[arg-type]
        yield scene, render(scene)


# ---------------------------------------------------------------- depth


def depth_config() -> DepthAnythingConfig:
    """Return a Depth Anything V2 of 64 channels and 6 blocks, patches of 4 pixels: a grid of 24 × 24 at 96 pixels."""
    taps: dict[str, Any] = {"out_indices": [2, 3, 5, 6]}
    backbone = Dinov2Config(
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
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
        reassemble_factors=[2, 1, 0.5, 0.25],  # half the published ones: a quarter of the work
        neck_hidden_sizes=[16, 24, 32, 32],
        fusion_hidden_size=24,
        head_hidden_size=12,
    )


def depth_batch(start: int, count: int, split: str = "train") -> tuple[Tensor, Tensor, Tensor]:
    """Return pixels (B, 3, 96, 96), inverse depth (B, 96, 96) and the mask of things (B, 96, 96)."""
    pixels, targets, things = [], [], []
    for _, picture in pictures(split, start, count):
        pixels.append(squashed(picture, SIDE, IMAGENET_MEAN, IMAGENET_STD))
        targets.append(torch.from_numpy(nearest(picture.inverse_depth, SIDE)))
        things.append(torch.from_numpy(nearest(picture.segments, SIDE) > 1))
    return torch.stack(pixels), torch.stack(targets), torch.stack(things)


def train_depth(out: Path, steps: int, batch: int) -> None:
    """Train Depth Anything on inverse depth."""
    torch.manual_seed(1)
    model = DepthAnythingForDepthEstimation(depth_config())
    # the head ends in a ReLU: started at a positive value it cannot die before it learns
    nn.init.constant_(model.head.conv3.bias, 0.3)

    def loss(step: int) -> Tensor:
        pixels, target, things = depth_batch(step * batch, batch)
        error = (model(pixels).predicted_depth - target).abs()
        return error.mean() + 2.0 * (error * things).sum() / things.sum().clamp(min=1)

    fit(model, loss, steps, lr=1e-3, out=out)
    model.save_pretrained(out)
    processor = {
        "do_normalize": True, "do_pad": False, "do_rescale": True, "do_resize": True, "ensure_multiple_of": 4,
        "image_mean": IMAGENET_MEAN, "image_processor_type": "DPTImageProcessor", "image_std": IMAGENET_STD,
        "keep_aspect_ratio": False, "resample": BICUBIC, "rescale_factor": 1 / 255,
        "size": {"height": SIDE, "width": SIDE}, "size_divisor": None,
    }  # fmt: skip
    write_json(out / "preprocessor_config.json", processor)


@torch.no_grad()
def score_depth(folder: Path) -> dict[str, float]:
    """Return held-out R² of inverse depth, over all pixels and over those of things, of one scale for all."""
    model = DepthAnythingForDepthEstimation.from_pretrained(folder).eval()
    found: dict[str, float] = {}
    for split in ("test", "ood"):
        predicted, target, mask = [], [], []
        for start in range(0, HELD_OUT, 32):
            pixels, truth, things = depth_batch(start, 32, split)
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


# ---------------------------------------------------------------- seg


def seg_config(vocabulary: int, *, training: bool) -> OneFormerConfig:
    """Return a OneFormer of 32 channels whose Swin backbone ends in a 6 × 6 map of 128 channels."""
    features: dict[str, Any] = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    backbone = SwinConfig(
        image_size=SEG_SIDE, embed_dim=16, depths=[1, 1, 2, 1], num_heads=[2, 2, 4, 4], window_size=6, **features
    )
    return OneFormerConfig(
        backbone_config=backbone,
        conv_dim=32,
        mask_dim=32,
        hidden_dim=32,
        encoder_feedforward_dim=96,
        encoder_layers=2,
        decoder_layers=4,
        dim_feedforward=96,
        num_attention_heads=4,
        num_queries=14,
        query_dec_layers=1,
        text_encoder_width=64,
        text_encoder_num_layers=1,
        text_encoder_n_ctx=0,
        text_encoder_vocab_size=vocabulary,
        text_encoder_proj_layers=1,
        contrastive_weight=0.0,
        train_num_points=1024,
        is_training=training,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
    )


def seg_batch(start: int, count: int, split: str = "train") -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return pixels (B, 3, 192, 192), and for each picture its masks (M, 192, 192) and classes (M,)."""
    pixels, masks, classes = [], [], []
    for scene, picture in pictures(split, start, count):
        pixels.append(squashed(picture, SEG_SIDE, IMAGENET_MEAN, IMAGENET_STD))
        segments = nearest(picture.segments, SEG_SIDE)
        present = [number for number in range(2 + len(scene.things)) if (segments == number).any()]
        masks.append(torch.from_numpy(np.stack([segments == number for number in present]).astype(np.float32)))
        classes.append(torch.tensor([n if n < 2 else 2 + SHAPES.index(scene.things[n - 2].shape) for n in present]))
    return torch.stack(pixels), masks, classes


def train_seg(out: Path, steps: int, batch: int) -> None:
    """Train OneFormer with its own loss, for the panoptic task; its text branch is left out of the loss."""
    torch.manual_seed(2)
    tokenizer = write_seg_files(out)
    model = OneFormerForUniversalSegmentation(seg_config(len(tokenizer), training=True))
    task = tokenizer("the task is panoptic", padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    none = tokenizer("", padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    texts = none.expand(14, -1)

    def loss(step: int) -> Tensor:
        pixels, masks, classes = seg_batch(step * batch, batch)
        result = model(
            pixel_values=pixels,
            task_inputs=task.expand(batch, -1),
            text_inputs=texts.expand(batch, -1, -1),
            mask_labels=masks,
            class_labels=classes,
        )
        value: Tensor = result.loss.squeeze()
        return value

    fit(model, loss, steps, lr=5e-4, out=out)
    final = OneFormerForUniversalSegmentation(seg_config(len(tokenizer), training=False))
    state = {name: value for name, value in model.state_dict().items() if name in final.state_dict()}
    final.load_state_dict(state, strict=True)
    final.save_pretrained(out)


def write_seg_files(out: Path) -> CLIPTokenizer:
    """Write class file, processor and a tokenizer of single characters; return the tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    write_json(out / "vocab.json", {token: number for number, token in enumerate(tokens)})
    (out / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 77,
        },
    )
    things = [index for index, name in enumerate(CLASSES) if name in SHAPES]
    write_json(
        out / "toyworld_panoptic.json",
        {str(index): {"name": name, "isthing": int(index in things)} for index, name in enumerate(CLASSES)},
    )
    processor = {
        "class_info_file": "toyworld_panoptic.json", "do_normalize": True, "do_reduce_labels": False,
        "do_rescale": True, "do_resize": True, "ignore_index": None, "image_mean": IMAGENET_MEAN,
        "image_processor_type": "OneFormerImageProcessor", "image_std": IMAGENET_STD,
        "metadata": {
            **{str(index): name for index, name in enumerate(CLASSES)},
            "class_names": list(CLASSES),
            "thing_ids": things,
        },
        "num_text": 14, "processor_class": "OneFormerProcessor", "repo_path": "toyworld", "resample": BILINEAR,
        "rescale_factor": 1 / 255, "size": {"longest_edge": SEG_SIDE, "shortest_edge": SEG_SIDE},
    }  # fmt: skip
    write_json(out / "preprocessor_config.json", processor)
    return CLIPTokenizer.from_pretrained(out)


@torch.no_grad()
def score_seg(folder: Path) -> dict[str, float]:
    """Return mean intersection over union of the classes, and the recall of things, on held-out scenes.

    A thing is found where a query of its class covers it at an IoU above 0.5. The baseline calls every pixel by the
    class that is most frequent at its place.
    """
    model = OneFormerForUniversalSegmentation.from_pretrained(folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    task = tokenizer("the task is panoptic", padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    truth, predicted, found, things = [], [], 0, 0
    for start in range(0, HELD_OUT, 16):
        pixels, masks, classes = seg_batch(start, 16, "test")
        result = model(pixel_values=pixels, task_inputs=task.expand(16, -1))
        probabilities = result.class_queries_logits.softmax(-1)[..., :-1]
        covers = functional.interpolate(
            result.masks_queries_logits, size=(SEG_SIDE, SEG_SIDE), mode="bilinear", align_corners=False
        ).sigmoid()
        predicted.append(torch.einsum("bqc,bqhw->bchw", probabilities, covers).argmax(1))
        for number, (mask, label) in enumerate(zip(masks, classes, strict=True)):
            truth.append((mask * label[:, None, None]).sum(0).long())
            for each, kind in zip(mask.bool(), label.tolist(), strict=True):
                if kind < len(STUFF):
                    continue
                things += 1
                guesses = covers[number][probabilities[number].argmax(-1) == kind] > 0.5
                union = (guesses | each).sum((1, 2))
                found += bool(((guesses & each).sum((1, 2)) > 0.5 * union).any())
    t, p = torch.stack(truth), torch.cat(predicted)
    majority = torch.stack([(t == c).sum(0) for c in range(len(CLASSES))]).argmax(0).expand_as(t)
    return {
        "test mIoU": mean_iou(p, t),
        "test mIoU of the most frequent class by place": mean_iou(majority, t),
        "test recall of things": found / things,
    }


def mean_iou(predicted: Tensor, truth: Tensor) -> float:
    """Return the mean over classes of intersection over union."""
    ratios = [
        float(((predicted == c) & (truth == c)).sum() / ((predicted == c) | (truth == c)).sum().clamp(min=1))
        for c in range(len(CLASSES))
    ]
    return sum(ratios) / len(ratios)


# ---------------------------------------------------------------- gen


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


def gen_batch(start: int, count: int, split: str = "train") -> tuple[Tensor, Tensor]:
    """Return pixels (B, 3, 96, 96) and thumbnails (B, 3, 24, 24), both normalised."""
    pixels = torch.stack([squashed(p, SIDE, CLIP_MEAN, CLIP_STD) for _, p in pictures(split, start, count)])
    return pixels, functional.interpolate(pixels, size=(THUMBNAIL, THUMBNAIL), mode="area")


def train_gen(out: Path, steps: int, batch: int) -> None:
    """Train CLIP's image encoder with projection to tell everything that a thumbnail shows."""
    torch.manual_seed(3)
    config = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=8,
        projection_dim=128,
        hidden_act="gelu",
    )
    model = CLIPVisionModelWithProjection(config)
    drawer = Drawer(128)
    both = nn.ModuleList([model, drawer])

    def loss(step: int) -> Tensor:
        pixels, thumbnails = gen_batch(step * batch, batch)
        drawn = drawer(model(pixels).image_embeds)
        return functional.mse_loss(drawn, thumbnails) + 0.5 * functional.l1_loss(drawn, thumbnails)

    fit(both, loss, steps, lr=1e-3, out=out)
    model.save_pretrained(out / "image_encoder")
    torch_save(drawer, out / "drawer.safetensors")
    processor = {
        "crop_size": {"height": SIDE, "width": SIDE}, "do_center_crop": True, "do_convert_rgb": True,
        "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": CLIP_MEAN,
        "image_processor_type": "CLIPImageProcessor", "image_std": CLIP_STD, "resample": BICUBIC,
        "rescale_factor": 1 / 255, "size": {"shortest_edge": SIDE},
    }  # fmt: skip
    write_json(out / "feature_extractor" / "preprocessor_config.json", processor)
    absent = ("image_normalizer", "image_noising_scheduler", "scheduler", "text_encoder", "tokenizer", "unet", "vae")
    index: dict[str, Any] = {
        "_class_name": "StableUnCLIPImg2ImgPipeline",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    }
    write_json(out / "model_index.json", index | {part: [None, None] for part in absent})


def torch_save(module: nn.Module, path: Path) -> None:
    """Write a module's weights as safetensors."""
    from safetensors.torch import save_file

    save_file(module.state_dict(), path)


@torch.no_grad()
def score_gen(folder: Path) -> dict[str, float]:
    """Return how much of the thumbnails' variance is drawn back from the embeddings, on held-out scenes."""
    from safetensors.torch import load_file

    model = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder").eval()
    drawer = Drawer(model.config.projection_dim).eval()
    drawer.load_state_dict(load_file(folder / "drawer.safetensors"))
    drawn, truth = [], []
    for start in range(0, HELD_OUT, 32):
        pixels, thumbnails = gen_batch(start, 32, "test")
        drawn.append(drawer(model(pixels).image_embeds))
        truth.append(thumbnails)
    p, t = torch.cat(drawn), torch.cat(truth)
    mean_map = t.mean(dim=0, keepdim=True).expand_as(t)
    return {"test R²": r_squared(p, t), "test R² of the mean thumbnail": r_squared(mean_map, t)}


# ---------------------------------------------------------------- common


def r_squared(predicted: Tensor, truth: Tensor) -> float:
    """Return 1 - residual over total sum of squares around the one mean of all values."""
    return float(1 - ((predicted - truth) ** 2).sum() / ((truth - truth.mean()) ** 2).sum())


def fit(model: nn.Module, loss: Callable[[int], Tensor], steps: int, *, lr: float, out: Path) -> None:
    """Minimise a loss with AdamW, warm-up and a cosine; log to `OUT.log`."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.02, betas=(0.9, 0.98))
    warm = max(1, steps // 20)
    began, total = time.monotonic(), 0.0
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_name(out.name + ".log").open("w", encoding="utf-8") as log:
        for step in range(steps):
            rate = (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
            for group in optimiser.param_groups:
                group["lr"] = lr * rate
            value = loss(step)
            optimiser.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            total += float(value.detach())
            if (step + 1) % 50 == 0:
                line = {"step": step + 1, "loss": round(total / 50, 5), "seconds": round(time.monotonic() - began, 1)}
                log.write(json.dumps(line) + "\n")
                log.flush()
                total = 0.0


def write_json(path: Path, value: object) -> None:
    """Write JSON, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8", newline="\n")


@dataclass(frozen=True)
class Recipe:
    """How a teacher is trained and scored."""

    train: Callable[[Path, int, int], None]
    score: Callable[[Path], dict[str, float]]
    steps: int
    batch: int


RECIPES = {
    "depth": Recipe(train_depth, score_depth, 4000, 8),
    "seg": Recipe(train_seg, score_seg, 3000, 8),
    "gen": Recipe(train_gen, score_gen, 4000, 16),
}


def main() -> int:
    """Train or score; return the exit status."""
    parser = argparse.ArgumentParser(description="Small teachers of the toy world.")
    parser.add_argument("action", choices=("train", "score"))
    parser.add_argument("folder", type=Path, help="folder that holds depth/, seg/ and gen/")
    parser.add_argument("names", nargs="*", default=[], help="which; all by default")
    parser.add_argument("--steps", type=int, help="training steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.names or RECIPES:
        recipe = RECIPES[name]
        if options.action == "train":
            recipe.train(options.folder / name, options.steps or recipe.steps, recipe.batch)
        scores = {key: round(value, 4) for key, value in recipe.score(options.folder / name).items()}
        print(name, json.dumps(scores, ensure_ascii=False))
    print(f"({len(COLOURS)} colours, {len(SHAPES)} shapes, {HELD_OUT} held-out scenes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
