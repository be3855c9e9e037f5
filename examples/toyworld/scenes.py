"""A small world whose truth is known: coloured shapes on a plain, with depth, masks and captions.

A scene is a pure function of (split, index). Three cues tell how far a thing is away, each drawn on its own:

- `size`: its apparent size is its true size over its distance (else: drawn without regard to distance);
- `contact`: its foot stands where the plain has that distance (else: it floats at a height of its own);
- `haze`: its colour fades towards the sky's with distance (else: it does not).

Splits say which of them hold. The teachers' scenes of `train` and `test` always carry `size`; those of `ood` never do,
so what is learnt there must come from the other two. Questions of depth are about scenes with one cue: `haze` to train
on and `haze-test` to be scored on, `contact-test` to be scored on without having been asked about such before: where
apparent size or height tell a distance, a rule about the picture's plane answers, and nobody needs to see depth.
Distances are in metres of that world, 1 to 8; the plain starts below the horizon.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

Split = Literal["train", "test", "ood", "haze", "haze-test", "contact-test"]
Cue = Literal["size", "contact", "haze"]

SHAPES = ("disc", "square", "triangle", "cross")
COLOURS = {
    "red": (214, 48, 42),
    "green": (46, 160, 67),
    "blue": (38, 92, 214),
    "yellow": (236, 200, 40),
    "purple": (140, 62, 190),
    "white": (240, 240, 240),
}
STUFF = ("sky", "ground")
"""Panoptic classes are STUFF, then SHAPES."""
CANVASES = ((96, 96), (96, 128), (128, 96), (96, 112))
"""Height and width in pixels."""
NEAR, FAR = 1.0, 8.0

_HORIZON = 0.38
"""Share of the picture's height that is sky."""
_CUES: dict[Split, tuple[frozenset[Cue], ...]] = {
    "train": (
        frozenset({"size", "contact", "haze"}),
        frozenset({"size", "contact"}),
        frozenset({"size", "haze"}),
    ),
    "test": (
        frozenset({"size", "contact", "haze"}),
        frozenset({"size", "contact"}),
        frozenset({"size", "haze"}),
    ),
    "ood": (frozenset({"contact", "haze"}), frozenset({"contact"}), frozenset({"haze"})),
    "haze": (frozenset({"haze"}),),
    "haze-test": (frozenset({"haze"}),),
    "contact-test": (frozenset({"contact"}),),
}
_SPLIT_NUMBER: dict[Split, int] = {"train": 0, "test": 1, "ood": 2, "haze": 3, "haze-test": 4, "contact-test": 5}
HAZE = np.array([196, 205, 214], dtype=np.float64)
DRAW = 1_000_000
"""Scenes of one drawing of the world, at most: the first of another one has this number times the drawing's."""
_MARGIN = 0.35
"""Distances of two things differ by at least this, so that "which is closer" has an answer to be seen."""


@dataclass(frozen=True)
class Thing:
    """A shape of the world. `x`, `foot` and `size` are in shares of the picture's width, height and shorter side."""

    shape: str
    colour: str
    distance: float
    x: float
    foot: float
    size: float

    @property
    def name(self) -> str:
        """How questions and captions call it: no scene has two things of one name."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What is in a picture: things from far to near."""

    key: str
    height: int
    width: int
    cues: frozenset[Cue]
    things: tuple[Thing, ...]
    noise_seed: int


@dataclass(frozen=True)
class Picture:
    """A scene drawn."""

    rgb: np.ndarray
    """(H, W, 3) uint8."""
    distance: np.ndarray
    """(H, W) float32 in metres; infinite in the sky."""
    segments: np.ndarray
    """(H, W) int32: 0 sky, 1 ground, 2 + i the i-th thing."""

    @property
    def inverse_depth(self) -> np.ndarray:
        """(H, W) float32 in 1/m, 0 in the sky: what Depth Anything predicts up to scale and shift."""
        return (1.0 / self.distance).astype(np.float32)

    def image(self) -> Image.Image:
        """Return the pixels as a PIL image."""
        return Image.fromarray(self.rgb)


def make_scene(split: Split, index: int) -> Scene:
    """Return the scene of that number."""
    rng = np.random.Generator(np.random.PCG64([0, _SPLIT_NUMBER[split], index]))
    height, width = CANVASES[int(rng.random() * len(CANVASES))]
    cues = _CUES[split][int(rng.random() * len(_CUES[split]))]
    distances: list[float] = []
    names: set[tuple[str, str]] = set()
    things: list[Thing] = []
    for _ in range(2 + int(rng.random() * 4)):
        thing = _draw_thing(rng, cues, distances, things)
        if thing is not None and (thing.colour, thing.shape) not in names:
            names.add((thing.colour, thing.shape))
            distances.append(thing.distance)
            things.append(thing)
    things.sort(key=lambda thing: -thing.distance)
    return Scene(f"{split}/{index:06d}.png", height, width, cues, tuple(things), int(rng.random() * (1 << 31)))


def _draw_thing(
    rng: np.random.Generator, cues: frozenset[Cue], distances: list[float], things: list[Thing]
) -> Thing | None:
    """Try some places for a thing; None where the picture is too full for it."""
    shape = SHAPES[int(rng.random() * len(SHAPES))]
    colour = tuple(COLOURS)[int(rng.random() * len(COLOURS))]
    for _ in range(20):
        # even in log distance: near things are as frequent as far ones
        distance = NEAR * (FAR / NEAR) ** rng.random()
        true_size = 0.30 + 0.25 * rng.random()
        apparent = true_size / distance**0.75 if "size" in cues else 0.10 + 0.22 * rng.random()
        foot = plain_height(distance) if "contact" in cues else 0.30 + 0.65 * rng.random()
        x = 0.12 + 0.76 * rng.random()
        if any(abs(distance - other) < _MARGIN for other in distances):
            continue
        if all(
            abs(x - other.x) > 0.45 * (apparent + other.size) or abs(foot - other.foot) > 0.6 * (apparent + other.size)
            for other in things
        ):
            return Thing(shape, colour, distance, x, foot, apparent)
    return None


def plain_height(distance: float) -> float:
    """Return where the plain at a distance appears, as a share of the picture's height from above."""
    return _HORIZON + (1.0 - _HORIZON) * NEAR / distance


def render(scene: Scene) -> Picture:
    """Draw a scene."""
    height, width = scene.height, scene.width
    rows = (np.arange(height, dtype=np.float64)[:, None] + 0.5) / height
    below = np.maximum(rows - _HORIZON, 1e-9)
    distance = np.where(rows > _HORIZON, (1.0 - _HORIZON) * NEAR / below, np.inf)
    distance = np.broadcast_to(np.minimum(distance, np.where(np.isinf(distance), np.inf, 40.0)), (height, width)).copy()
    segments = np.where(np.isinf(distance), 0, 1).astype(np.int32)
    sky = HAZE + (rows - _HORIZON) * np.array([120.0, 90.0, 40.0])
    ground = np.array([118.0, 104.0, 82.0])
    fade = _fade(distance)[..., None] if "haze" in scene.cues else np.zeros((height, width, 1))
    rgb = np.where(segments[..., None] == 0, sky[:, :, None].reshape(height, 1, 3), ground * (1 - fade) + HAZE * fade)
    rng = np.random.Generator(np.random.PCG64(scene.noise_seed))
    texture = rng.random((height, width, 1)) - 0.5
    rgb = rgb + texture * np.where(segments[..., None] == 1, 22.0, 4.0)
    columns = np.arange(width, dtype=np.float64)[None, :] + 0.5
    lines = np.arange(height, dtype=np.float64)[:, None] + 0.5
    for number, thing in enumerate(scene.things):
        side = thing.size * min(height, width)
        u = (columns - thing.x * width) / (side / 2)
        v = (lines - (thing.foot * height - side / 2)) / (side / 2)
        inside = _inside(thing.shape, u, v)
        colour = np.array(COLOURS[thing.colour], dtype=np.float64)
        shade = 1.0 - 0.18 * np.clip(v, -1, 1)[..., None] * np.ones_like(u)[..., None]
        painted = colour * shade
        if "haze" in scene.cues:
            veil = float(_fade(np.array(thing.distance)))
            painted = painted * (1 - veil) + HAZE * veil
        rgb = np.where(inside[..., None], painted + texture * 8.0, rgb)
        distance = np.where(inside, thing.distance, distance)
        segments = np.where(inside, 2 + number, segments)
    return Picture(np.clip(np.rint(rgb), 0, 255).astype(np.uint8), distance.astype(np.float32), segments)


def _fade(distance: np.ndarray) -> np.ndarray:
    fade: np.ndarray = 0.85 * (1.0 - np.exp(-(np.minimum(distance, 1e6) - NEAR) / 4.0))
    return fade


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    inside: np.ndarray
    if shape == "disc":
        inside = u**2 + v**2 <= 1.0
    elif shape == "square":
        inside = (np.abs(u) <= 0.9) & (np.abs(v) <= 1.0)
    elif shape == "triangle":
        inside = (np.abs(u) <= (v + 1.0) / 2.0) & (np.abs(v) <= 1.0)
    elif shape == "cross":
        inside = ((np.abs(u) <= 0.34) & (np.abs(v) <= 1.0)) | ((np.abs(v) <= 0.34) & (np.abs(u) <= 1.0))
    else:
        raise ValueError(f"no such shape: {shape}")
    return inside
