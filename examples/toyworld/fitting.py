"""What training the toy world's teachers has in common: scenes drawn once, a loop that can be resumed, scores."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scenes import DRAW, SHAPES, STUFF, Split, make_scene, render
from torch import Tensor, nn
from transformers import PreTrainedModel

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLASSES = (*STUFF, *SHAPES)
POOL = 8000
"""Training scenes drawn; beyond them they come again, mirrored at every other round."""
HELD_OUT = 512
"""Scenes that scores are taken on."""
SAVE_EVERY = 100


class Seen:
    """A scene squashed to a square of `side` pixels, as a teacher sees it."""

    def __init__(self, split: Split, index: int, side: int) -> None:
        scene = make_scene(split, index)
        picture = render(scene)
        rgb = picture.image().resize((side, side), Image.Resampling.BICUBIC)
        self.rgb = np.asarray(rgb)
        """(side, side, 3) uint8."""
        self.inverse_depth = nearest(picture.inverse_depth, side).astype(np.float16)
        """(side, side) in 1/m."""
        self.segments = nearest(picture.segments, side).astype(np.uint8)
        """(side, side): 0 sky, 1 ground, 2 + i the i-th thing."""
        self.classes = (0, 1, *(len(STUFF) + SHAPES.index(thing.shape) for thing in scene.things))
        """Class of each segment."""


@cache
def seen(split: Split, index: int, side: int) -> Seen:
    """Return a scene as seen; drawn once and kept."""
    return Seen(split, index, side)


def batch_of(split: Split, start: int, count: int, side: int, *, draw: int = 0) -> tuple[list[Seen], bool]:
    """Return scenes of a drawing of the world from a number on, and whether to mirror them (training only)."""
    first = draw * DRAW
    if split != "train":
        return [Seen(split, first + index, side) for index in range(start, start + count)], False
    mirror = (start // POOL) % 2 == 1
    return [seen(split, first + index % POOL, side) for index in range(start, start + count)], mirror


def pixels_of(batch: list[Seen], mirror: bool, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return normalised pixels (B, 3, side, side) float32."""
    values = torch.from_numpy(np.stack([one.rgb for one in batch])).permute(0, 3, 1, 2).float() / 255.0
    normalised = (values - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    return normalised.flip(-1) if mirror else normalised


def nearest(values: np.ndarray, side: int) -> np.ndarray:
    """Return a map (H, W) at (side, side), the nearest value of each place."""
    rows = (np.arange(side) + 0.5) * values.shape[0] / side
    columns = (np.arange(side) + 0.5) * values.shape[1] / side
    sized: np.ndarray = values[rows.astype(int)][:, columns.astype(int)]
    return sized


def held_out(count: int) -> Iterator[int]:
    """Yield where batches of the held-out scenes start."""
    yield from range(0, HELD_OUT, count)


def fit(model: nn.Module, loss: Callable[[int], Tensor], steps: int, *, lr: float, out: Path) -> None:
    """Minimise a loss with AdamW, warm-up and a cosine; logs to `OUT.log`.

    The state is kept in `OUT.state` every 100 steps: started again, training goes on from there.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.02, betas=(0.9, 0.98))
    warm = max(1, steps // 20)
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = out.with_name(out.name + ".state")
    first = 0
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        first = state["step"]
    began, total, since = time.process_time(), 0.0, 0
    model.train()
    with out.with_name(out.name + ".log").open("a", encoding="utf-8") as log:
        for step in range(first, steps):
            rate = (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
            for group in optimiser.param_groups:
                group["lr"] = lr * rate
            value = loss(step)
            optimiser.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            total, since = total + float(value.detach()), since + 1
            if (step + 1) % 50 == 0:
                seconds = round(time.process_time() - began, 1)
                line = {"step": step + 1, "loss": round(total / since, 5), "cpu_seconds": seconds}
                log.write(json.dumps(line) + "\n")
                log.flush()
                total, since = 0.0, 0
            if (step + 1) % SAVE_EVERY == 0:
                fresh = kept.with_name(kept.name + ".new")
                torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step + 1}, fresh)
                fresh.replace(kept)
    model.eval()
    kept.unlink(missing_ok=True)


def r_squared(predicted: Tensor, truth: Tensor) -> float:
    """Return 1 - residual over total sum of squares around the one mean of all values."""
    return float(1 - ((predicted - truth) ** 2).sum() / ((truth - truth.mean()) ** 2).sum())


def write_half(model: PreTrainedModel, folder: Path) -> None:
    """Write a model with weights of float16, half the size; the configuration has them computed with in float32."""
    module: nn.Module = model  # whose annotation of half() transformers loses
    module.half()
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", config | {"dtype": "float32"})


def write_json(path: Path, value: object) -> None:
    """Write JSON, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
