"""The arms of the experiment: a student pretrained in one way or another, then fine-tuned on questions and scored.

Everything goes through what `olatrain compose`, `run`, `export` and `eval` call, in this process: the libraries are
imported once instead of five times an arm.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from olaschema.config import load_config
from olatrain.compose import compose
from olatrain.config import TrainConfig
from olatrain.evaluate import evaluate_cv_bench
from olatrain.export import export
from olatrain.train import train


@dataclass(frozen=True)
class Arm:
    """What is special about an arm; `settings` are those of `olatrain run` while pretraining."""

    name: str
    about: str
    tokens: int = 8
    """Task tokens of each teacher; 0: none."""
    store: str | None = None
    """Folder of the features, relative to the work folder."""
    teachers: tuple[str, ...] = ("depth",)
    settings: dict[str, Any] = field(default_factory=dict)
    captions: str = "captions.jsonl"
    epochs: float = 1.0
    """Times the epochs of the others."""


LAYERS = [2, 3]
"""Blocks of four that are supervised: the published ones (18 and 20 of 32), scaled."""


def _with_depth(**more: Any) -> dict[str, Any]:
    return {"teachers": {"depth": {"layers": LAYERS, **more}}}


ARMS = {
    arm.name: arm
    for arm in (
        Arm("none", "no task tokens, next tokens only", tokens=0),
        Arm("tokens", "task tokens without a loss", store="depth.zarr", settings=_with_depth(weight=0.0)),
        Arm("embedding", "embedding losses", store="depth.zarr", settings=_with_depth()),
        Arm(
            "shuffled", "embedding losses, features of another image", store="depth.zarr",
            settings={**_with_depth(), "target_control": "shuffle"},
        ),
        Arm("random", "embedding losses, an untrained teacher", store="random.zarr", settings=_with_depth()),
        Arm("oracle", "no task tokens, distances written in the captions", tokens=0, captions="captions-oracle.jsonl"),
        Arm("longer", "no task tokens, as long as the embedding losses take", tokens=0, epochs=2.0),
        Arm(
            "own", "embedding losses, features of the student's own tower", store="own.zarr", teachers=("clip",),
            settings={"teachers": {"clip": {"layers": LAYERS}}},
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How long and how fast; the same for every arm."""

    pretrain_epochs: int
    pretrain_batch: int
    pretrain_lr: float
    tune_epochs: int
    tune_batch: int
    tune_lr: float


class Laboratory:
    """A folder with the world, the stores and the student's parts, in which arms are run."""

    def __init__(self, work: Path, vision: Path, llm: Path, recipe: Recipe) -> None:
        self.work = work
        self.world = work / "world"
        self.recipe = recipe
        self._vision, self._llm = vision, llm
        self._quiet = Console(file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process

    def digest(self, arm: Arm, budget: int) -> str:
        """Return a digest of everything that a result follows from, but for the seed, versions and hardware."""
        parts = [json.dumps([asdict(arm), asdict(self.recipe), budget], sort_keys=True)]
        files = [self.world / arm.captions, self.world / f"questions-{budget}.jsonl",
                 self._vision / "model.safetensors",
                 self._llm / "model.safetensors", *sorted((self.world).glob("bench*/test_*.jsonl"))]  # fmt: skip
        if arm.store is not None:
            files += [self.work / arm.store / "zarr.json", *sorted((self.work / arm.store).glob("*/zarr.json"))]
        parts += [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def pretrained(self, arm: Arm, seed: int) -> tuple[Path, dict[str, float]]:
        """Compose and pretrain; return the exported student and the seconds that training took."""
        folder = self.work / "runs" / f"{arm.name}-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        student = folder / "student"
        compose(
            self._llm, self._vision, student, teachers=arm.teachers, tokens_per_teacher=arm.tokens, view="squash",
            seed=seed,
        )  # fmt: skip
        given: dict[str, Any] = {
            "preset": "pretrain", "student": student, "conversations": self.world / arm.captions,
            "images": self.world / "images", "out": folder / "pretrain", "seed": seed,
            "epochs": round(self.recipe.pretrain_epochs * arm.epochs), "batch": self.recipe.pretrain_batch,
            "lr": self.recipe.pretrain_lr, **arm.settings,
        }  # fmt: skip
        if arm.store is not None:
            given["store"] = str(self.work / arm.store)
        elif arm.tokens == 0:
            given["train"] = ["projector"]
        seconds = self._train(given)
        self._export(folder / "pretrain", folder / "pretrained")
        return folder / "pretrained", {"pretrain_seconds": seconds}

    def tuned(self, student: Path, seed: int, budget: int) -> tuple[Path, float]:
        """Fine-tune a pretrained student on so many questions; return the exported student."""
        out = student.parent / f"tune-{budget}"
        seconds = self._train(
            {
                "preset": "finetune", "student": student, "conversations": self.world / f"questions-{budget}.jsonl",
                "images": self.world / "images", "out": out, "seed": seed, "epochs": self.recipe.tune_epochs,
                "batch": self.recipe.tune_batch, "lr": self.recipe.tune_lr,
            }
        )  # fmt: skip
        self._export(out, student.parent / f"tuned-{budget}")
        return student.parent / f"tuned-{budget}", seconds

    def _train(self, given: dict[str, Any]) -> float:
        began = time.perf_counter()
        # bf16 is for GPUs; the preset's precision would be emulated here
        fixed = {"precision": "float32", "workers": 0, "device": "cpu", "trackers": [], "look_every": 0,
                 "checkpoint_every": 1 << 20, "mean_map_rows": 256, "keep_last": 1}  # fmt: skip
        overrides = [f"{name}={json.dumps(value)}" for name, value in fixed.items() if name not in given]
        settings = load_config(TrainConfig, flags=given, overrides=overrides)
        train(settings, self._quiet)
        return time.perf_counter() - began

    def _export(self, run: Path, out: Path) -> None:
        shutil.rmtree(out, ignore_errors=True)
        export(run, out, dtype="float32")
        shutil.rmtree(run / "checkpoints")

    def scores(self, student: Path) -> Iterator[tuple[str, str, str]]:
        """Ask all questions; yield (split, kind, right): a digit for each question in its order, 1 where right."""
        for split, folder in (("test", "bench"), ("ood", "bench-ood")):
            path = student.parent / f"{student.name}-{split}.json"
            evaluate_cv_bench(student, self.world / folder, method="likelihood", device=torch.device("cpu"), out=path)
            answers = json.loads(path.read_text(encoding="utf-8"))["answers"]
            for task in sorted({answer["task"] for answer in answers}):
                yield split, task.lower(), "".join(str(int(a["right"])) for a in answers if a["task"] == task)

    def asked(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Say of each split and kind which picture each question is about (`scores` has their order), and chance."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for split, folder in (("test", "bench"), ("ood", "bench-ood")):
            for path in sorted((self.world / folder).glob("test*.jsonl")):
                for line in path.read_text(encoding="utf-8").splitlines():
                    row = json.loads(line)
                    kind = found.setdefault(split, {}).setdefault(row["task"].lower(), {"images": [], "chance": 0.0})
                    kind["images"].append(row["filename"])
                    kind["chance"] = 1 / len(row["choices"])
        return found

    def run(self, arm: Arm, seed: int, budgets: list[int]) -> Iterator[dict[str, Any]]:
        """Run an arm with a seed; yield its rows, a kind of question at a time."""
        torch.set_num_threads(1)
        pretrained, seconds = self.pretrained(arm, seed)
        for budget in budgets:
            student, took = self.tuned(pretrained, seed, budget)
            for split, kind, right in self.scores(student):
                yield {
                    "arm": arm.name, "seed": seed, "budget": budget, "split": split, "kind": kind, "right": right,
                    "config": self.digest(arm, budget), **{k: round(v, 1) for k, v in seconds.items()},
                    "tune_seconds": round(took, 1), "versions": versions(),
                    "date": datetime.now(UTC).date().isoformat(),
                }  # fmt: skip
        shutil.rmtree(pretrained.parent)


def versions() -> dict[str, str]:
    """Return the versions that figures may depend on."""
    return {name: importlib.metadata.version(name) for name in ("ola-distill", "torch", "transformers", "numpy")}
