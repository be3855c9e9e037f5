"""Part (a) of the experiment: do students that tell more of depth answer more questions of depth?

Students of next tokens alone, that differ in how wide their tower is, how long it was trained and in what their
captions tell: all for the same number of steps, on the same pictures. Of each: how well depth can be read from its
layers (`olatrain probe`, on the student before fine-tuning), and what it answers after it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import student as parts
from arms import ARMS, Laboratory, versions

METHOD = "probes start at the mean map; text is the loss of columns held out"
"""What is not settings, and makes another row when it changes."""


@dataclass(frozen=True)
class Variant:
    """What one student is made of."""

    width: int
    """Channels of the tower."""
    tower_steps: int
    told: int
    """How many of the captions tell distances; the others tell what the same pictures show, and no distance."""


def variant(name: str) -> Variant:
    """Return the variant of a name such as `64-250-1000`: width, steps of the tower, captions that tell distances."""
    return Variant(*map(int, name.split("-")))


def make_tower(folder: Path, made_of: Variant) -> Path:
    """Train a tower, unless it is there; towers of one width and length are one, made by one process at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w", encoding="utf-8") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        return _made(folder, made_of)


def _made(folder: Path, made_of: Variant) -> Path:
    out = folder / f"{made_of.width}-{made_of.tower_steps}"
    if not (out / "scores.json").is_file():
        world, held_out = parts.drawn_worlds(folder / "worlds.pt")
        parts.train_vision(out, world, made_of.tower_steps, width=made_of.width)
        scores = parts.score_vision(out, world, held_out)
        (out / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    return out


def measure(
    laboratory: Callable[[Path], Laboratory], towers: Path, made_of: Variant, seed: int, budget: int
) -> dict[str, Any]:
    """Make, probe, fine-tune and ask one student; return its row. `laboratory` makes one for a tower."""
    tower = make_tower(towers, made_of)
    lab = laboratory(tower)
    arm = ARMS["none"]
    label = f"student-{made_of.width}-{made_of.tower_steps}-{made_of.told}"
    pretrained, _ = lab.pretrained(arm, seed, label=label, told=made_of.told, held_out=lab.world / "held-out.jsonl")
    probed = lab.probed(pretrained, seed)
    student, _ = lab.tuned(arm, pretrained, seed, budget)
    right = {f"{split} {kind}": digits for split, kind, digits in lab.scores(student)}
    text = lab.held_out_loss(pretrained.parent / "pretrain")
    tower_scores = json.loads((tower / "scores.json").read_text(encoding="utf-8"))
    shutil.rmtree(pretrained.parent)
    return {
        **asdict(made_of), "seed": seed, "budget": budget, "config": digest(lab, made_of, budget), "bench": lab.bench(),
        "tower": tower_scores, "probe": probed, "text": text, "right": right, "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip


def digest(lab: Laboratory, made_of: Variant, budget: int) -> str:
    """Return a digest of everything that a row follows from, but for seed, versions and the tower's weights."""
    parts_ = METHOD + json.dumps(asdict(made_of), sort_keys=True) + lab.digest(ARMS["none"], budget, tower=False)
    return hashlib.sha256(parts_.encode()).hexdigest()[:16]
