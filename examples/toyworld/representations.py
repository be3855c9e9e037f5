"""Part (a) of the experiment: do students that tell more of depth answer more questions of depth?

Students of next tokens alone, that differ in how wide their tower is, how long it was trained and in what their
captions tell: all for the same number of steps, on the same pictures. Of each, before fine-tuning: how well depth is
read from its layers, by a ridge to the depth that a picture has (`depth`) and by `olatrain probe` to the depth
teacher's features (`probe`), both of pictures that pretraining did not have; and what it answers after fine-tuning.
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

import language
import student as parts
import torch
from arms import ARMS, Laboratory, versions

from olatrain.compose import load_processor
from olatrain.learner import load_student
from olatrain.tokens import TaskTokens

METHOD = (
    "probes of the questions' pictures start at the mean map; depth by a ridge; text is the loss of columns held out"
)
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
    probed = lab.probed(pretrained, seed, budget)
    depth = depth_read(pretrained, *parts.drawn_worlds(towers / "worlds.pt"))
    student, _ = lab.tuned(arm, pretrained, seed, budget)
    right = {f"{split} {kind}": digits for split, kind, digits in lab.scores(student)}
    text = lab.held_out_loss(pretrained.parent / "pretrain")
    tower_scores = json.loads((tower / "scores.json").read_text(encoding="utf-8"))
    shutil.rmtree(pretrained.parent)
    return {
        **asdict(made_of), "seed": seed, "budget": budget, "config": digest(lab, made_of, budget), "bench": lab.bench(),
        "tower": tower_scores, "probe": probed, "depth": depth, "text": text, "right": right, "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip


_READ = 1000
"""Scenes that a ridge is fitted on; half of them have the cue of the questions alone, and those are taken."""
_AT_ONCE = 100


def depth_read(student: Path, world: parts.World, held_out: parts.World) -> dict[str, float]:
    """Return, by layer, how well the inverse depth of each patch is read linearly from the states of its token.

    Layer 0 is what the projector gives. Centred R² on scenes held out, of one cue: 0 is the mean map.
    """
    seen, unseen = (image_states(student, pixels) for pixels in (world.pixels[:_READ:2], held_out.pixels[::2]))
    depths = world.inverse_depth[:_READ:2], held_out.inverse_depth[::2]
    return {
        str(layer): round(parts.depth_r2(one, depths[0], other, depths[1]), 4)
        for layer, (one, other) in enumerate(zip(seen, unseen, strict=True))
    }


@torch.no_grad()
def image_states(student: Path, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Return a student's states at its image's tokens, (N, 36, C) by layer, the projector's first.

    `pixels` (N, 3, H, W) are preprocessed; the image is the first of the prompt, and sees no later word of it.
    """
    model = load_student(student, dtype=torch.float32).eval()
    tokens = TaskTokens.load(student)
    turn = [{"role": "user", "content": f"<image>\n{language.DESCRIBE}"}]
    tokenizer = load_processor(student).tokenizer
    text = tokenizer.apply_chat_template(turn, tokenize=False)
    ids = [
        token
        for one in tokenizer(text, add_special_tokens=False)["input_ids"]
        for token in [one] * (int(tokens.image_length or 1) if one == tokens.image_id else 1)
    ]
    prompt = torch.tensor([ids])
    places = prompt[0] == tokens.image_id
    found = [
        model(input_ids=prompt.expand(len(part), -1), pixel_values=part, output_hidden_states=True).hidden_states
        for part in torch.split(pixels, _AT_ONCE)
    ]
    return [torch.cat([one[layer][:, places] for one in found]) for layer in range(len(found[0]))]


def digest(lab: Laboratory, made_of: Variant, budget: int) -> str:
    """Return a digest of everything that a row follows from, but for seed, versions and the tower's weights."""
    files = [lab.world / ARMS["oracle"].captions, lab.world / "held-out.jsonl", lab.work / "all.zarr" / "zarr.json"]
    told = [METHOD, json.dumps(asdict(made_of), sort_keys=True), lab.digest(ARMS["none"], budget, tower=False)]
    told += [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]
