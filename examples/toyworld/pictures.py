"""Pictures of the toy world with captions, as a corpus for `olapipe extract` and `olatrain run`.

    python examples/toyworld/pictures.py OUT --train 40 --heldout 8

writes `OUT/images/scenes/*.png` and, in LLaVA's form, `OUT/scenes-train.json` and `OUT/scenes-heldout.json`. The
held-out ones are of the test split: no teacher has seen them either.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from scenes import Scene, Split, make_scene, render

PROMPT = "Describe the image."


def caption(scene: Scene) -> str:
    """Return what is in a scene, from near to far."""
    named = [f"a {thing.name}" for thing in reversed(scene.things)]
    listed = named[0] if len(named) == 1 else ", ".join(named[:-1]) + f" and {named[-1]}"
    return f"From near to far: {listed}."


def write(out: Path, split: Split, count: int, conversations: str) -> None:
    """Write the first pictures of a split and one conversation about each."""
    samples: list[dict[str, Any]] = []
    for index in range(count):
        scene = make_scene(split, index)
        name = f"scenes/{split}-{index:03d}"
        path = out / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        render(scene).image().save(path)
        turns = [{"from": "human", "value": f"<image>\n{PROMPT}"}, {"from": "gpt", "value": caption(scene)}]
        samples.append({"id": name, "image": f"{name}.png", "conversations": turns})
    text = json.dumps(samples, indent=1) + "\n"
    (out / conversations).write_text(text, encoding="utf-8", newline="\n")


def main() -> int:
    """Write both splits; return the exit status."""
    parser = argparse.ArgumentParser(description="Write pictures of the toy world, with captions.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to, made if missing")
    parser.add_argument("--train", type=int, default=40, help="pictures to train on")
    parser.add_argument("--heldout", type=int, default=8, help="pictures held out")
    options = parser.parse_args()
    write(options.out, "train", options.train, "scenes-train.json")
    write(options.out, "test", options.heldout, "scenes-heldout.json")
    print(f"{options.train} pictures of the toy world to train on, {options.heldout} held out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
