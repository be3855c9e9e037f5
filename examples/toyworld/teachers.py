"""Small teachers trained on the toy world, in the on-disk layouts of the published ones.

    python examples/toyworld/teachers.py train OUT [depth seg gen]     trains and scores (an hour of one core)
        with --draw N other ones: from other weights, on other scenes
    python examples/toyworld/teachers.py score FOLDER [depth seg gen]  scores what is there on held-out scenes
    python examples/toyworld/teachers.py random OUT                    writes a depth teacher that was never trained

`depth` is a Depth Anything V2 (inverse depth; accepted at a held-out R² above 0.9), `seg` a OneFormer with a Swin
backbone (panoptic: sky, ground, four shapes), `gen` the image encoder of an unCLIP pipeline, trained to draw a
thumbnail of the picture back from its embedding. `scores.json` holds each score beside a trivial baseline. The trained
ones are kept in `examples/toyworld/teachers/`.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from fitting import HELD_OUT, write_json
from teacher_depth import new_depth, score_depth, train_depth, write_depth
from teacher_gen import score_gen, train_gen
from teacher_seg import score_seg, train_seg
from transformers.utils import logging

TRAINED = Path(__file__).with_name("teachers")
"""Folder of the teachers that come with the repository."""
RANDOM_SEED = 101


@dataclass(frozen=True)
class Recipe:
    """How a teacher is trained and scored."""

    train: Callable[..., None]
    """Of a folder, steps, the scenes of a step, and `draw`."""
    score: Callable[[Path], dict[str, float]]
    steps: int
    batch: int


RECIPES = {
    "depth": Recipe(train_depth, score_depth, 2100, 16),
    "seg": Recipe(train_seg, score_seg, 2700, 8),
    "gen": Recipe(train_gen, score_gen, 4000, 16),
}


def score(folder: Path, name: str) -> None:
    """Score a teacher, print it and write it into `scores.json`, with what it was scored under."""
    found = {key: round(value, 4) for key, value in RECIPES[name].score(folder / name).items()}
    weights = sum(file.stat().st_size for file in (folder / name).rglob("*.safetensors"))
    note(
        folder,
        name,
        {
            "scores": found,
            "held-out scenes": HELD_OUT,
            "bytes of weights": weights,
            "date": datetime.now(UTC).date().isoformat(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "licence": "as this repository: trained from scratch on generated scenes",
        },
    )
    print(name, json.dumps(found, ensure_ascii=False))


def note(folder: Path, name: str, found: dict[str, Any]) -> None:
    """Write what is known of a teacher into `scores.json`, beside what is known already."""
    path = folder / "scores.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, known | {name: known.get(name, {}) | found})


def random_depth(out: Path) -> None:
    """Write a depth teacher of the same layout with random weights: the control of a teacher that learnt nothing."""
    write_depth(new_depth(RANDOM_SEED), out)


def main() -> int:
    """Train, score or write; return the exit status."""
    parser = argparse.ArgumentParser(description="Small teachers of the toy world.")
    parser.add_argument("action", choices=("train", "score", "random"))
    parser.add_argument("folder", type=Path, help="folder that holds depth/, seg/ and gen/; of random: the checkpoint")
    parser.add_argument("names", nargs="*", default=[], metavar="NAME", help="depth, seg, gen; all by default")
    parser.add_argument("--draw", type=int, default=0, help="of train: which scenes and first weights (default 0)")
    options = parser.parse_args()
    if options.draw and options.action != "train":
        parser.error("--draw is of `train`: what was trained is scored on the same scenes, whatever it was trained on")
    if unknown := sorted(set(options.names) - set(RECIPES)):
        parser.error(f"no such teacher: {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    if options.action == "random":
        random_depth(options.folder)
        return 0
    for name in options.names or RECIPES:
        if options.action == "train":
            recipe = RECIPES[name]
            recipe.train(options.folder / name, recipe.steps, recipe.batch, draw=options.draw)
            said = f"{recipe.steps} steps of {recipe.batch} scenes" + (f", draw {options.draw}" if options.draw else "")
            note(options.folder, name, {"training": said})
        score(options.folder, name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
