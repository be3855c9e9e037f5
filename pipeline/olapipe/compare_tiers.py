"""The command `fidelity`: features of a corpus or a store, every precision, and the yardstick of bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from olapipe.config import ExtractConfig
from olapipe.corpus import list_corpus
from olapipe.fidelity import Figures, all_tiers, yardstick
from olapipe.load import cpu_threads, load_one
from olapipe.sample import Sampled, from_corpus, from_store, split
from olaschema.config import load_config
from olaschema.errors import ConfigError
from olaschema.place import open_place
from olaschema.store import FeatureStore

YARDSTICK = "bfloat16 teacher"


@dataclass(frozen=True)
class Request:
    """What to measure: a corpus or a store, and the settings that `extract` would get."""

    source: str
    teacher: str
    checkpoint: str | None = None
    images: Path | None = None
    preset: str | None = None
    samples: int = 64
    max_gradient_error: float = 0.01
    device: str = "auto"
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Figures of every precision, and in words what they are of."""

    title: str
    figures: list[Figures]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return everything by name."""
        figures = [tier.to_json() for tier in self.figures]
        return {"title": self.title, "notes": self.notes, "figures": figures}


def compare_tiers(request: Request) -> Comparison:
    """Measure every precision on half of the sample; mean map and basis are fitted on the other half.

    Raises ConfigError for a store of integers, which has no exact features, CorpusError for fewer than 8 images.
    """
    if not 0 < request.max_gradient_error < 0.5:
        raise ConfigError(
            f"--max-gradient-error {request.max_gradient_error} is not between 0 and 0.5", "0.01 is a cosine of 0.99."
        )
    if open_place(request.source).exists("zarr.json"):
        return _of_store(request)
    return _of_corpus(request)


def _of_store(request: Request) -> Comparison:
    stray = {
        "--checkpoint": request.checkpoint,
        "--images": request.images,
        "--preset": request.preset,
        "--device": None if request.device == "auto" else request.device,
        "--set": request.overrides,
    }
    if given := [name for name, value in stray.items() if value]:
        raise ConfigError(
            f"{', '.join(given)}: {request.source} is a store, whose features are there already",
            "Leave them out, or give the corpus.",
        )
    store = FeatureStore.open(request.source)
    precision = store.teacher(request.teacher).precision
    if precision not in ("float32", "float16"):
        raise ConfigError(
            f"{request.source} holds {request.teacher} as {precision}: there are no exact features to compare with",
            "Give the corpus, or a store of float32 or float16 features.",
        )
    sampled = from_store(store, request.teacher, request.samples)
    notes = [
        f"reference: the features as stored, {precision}",
        "no yardstick: the teacher's own bfloat16 error needs the teacher; give the corpus for it",
    ]
    with cpu_threads(1):
        return _compared(request, sampled, None, notes)


def _of_corpus(request: Request) -> Comparison:
    flags: dict[str, Any] = {
        "corpus": request.source,
        "images": request.images,
        "out": "unused",
        "teachers": [request.teacher],
        "preset": request.preset,
        "device": request.device,
    }
    if request.checkpoint is not None:
        flags[f"checkpoints.{request.teacher}"] = request.checkpoint
    config = load_config(ExtractConfig, flags=flags, overrides=request.overrides)
    listing = list_corpus(config.corpus, config.images)
    with cpu_threads(config.threads):
        sampled, rough = (
            from_corpus(listing, load_one(one, request.teacher), request.samples, config.max_pixels, config.batch_size)
            for one in (config, config.model_copy(update={"compute_dtype": "bfloat16"}))
        )
        notes = [f"reference: the features in {config.compute_dtype}, as the teacher returns them"]
        if rough.keys != sampled.keys:
            notes.append("no yardstick: in bfloat16 the teacher returns NaN or infinity for some of the images")
            return _compared(request, sampled, None, notes)
        return _compared(request, sampled, rough.features, notes)


def _compared(request: Request, sampled: Sampled, rough: np.ndarray | None, notes: Sequence[str]) -> Comparison:
    fitting, scored = split(sampled, request.samples // 2)
    figures, basis = all_tiers(fitting, scored, request.max_gradient_error)
    if rough is not None:
        _, scored_rough = split(Sampled(sampled.keys, rough), request.samples // 2)
        figures.append(yardstick(scored, scored_rough, fitting.mean(axis=0, dtype=np.float64), YARDSTICK))
    counts = f"{len(scored)} images scored, mean map and basis from {len(fitting)} others"
    size = f"the basis of klt takes {len(basis.to_bytes())} bytes, once for all images"
    return Comparison(f"{request.teacher}, {request.source}", figures, [counts, size, *notes])
