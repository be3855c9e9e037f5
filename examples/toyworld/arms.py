"""The arms of the experiment: a student pretrained in one way or another, then fine-tuned on questions and scored.

Everything goes through what `olatrain compose`, `run`, `export` and `eval` call, in this process: the libraries are
imported once instead of five times an arm.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import trivial
from rich.console import Console

from olaschema.config import load_config
from olatrain.compose import compose
from olatrain.config import TrainConfig
from olatrain.evaluate import evaluate_cv_bench
from olatrain.export import export
from olatrain.probe import count_layers, run_probe
from olatrain.train import train


@dataclass(frozen=True)
class Arm:
    """What is special about an arm; `settings` are those of `olatrain run` while pretraining."""

    name: str
    about: str
    tokens: int = 9
    """Task tokens of each teacher, a number that divides the 36 vectors of a map (published: 8 of 576); 0: none."""
    store: str | None = None
    """Folder of the features, relative to the work folder; `{seed}` in it stands for the run's."""
    teachers: tuple[str, ...] = ("depth",)
    settings: dict[str, Any] = field(default_factory=dict)
    captions: str = "captions.jsonl"
    longer: float = 1
    """Times the pretraining steps of the others."""
    feed: tuple[str, ...] = ()
    """Teachers whose features are inputs, in every stage and when questions are asked."""

    def store_of(self, seed: int) -> str | None:
        """Name the folder of the features that a run has."""
        return None if self.store is None else self.store.format(seed=seed)

    @property
    def supervised(self) -> bool:
        """Whether there is an embedding loss."""
        return any(teacher.get("weight") != 0 for teacher in self.settings.get("teachers", {}).values())


LAYERS = (2, 3)
"""Blocks of four that are supervised: the published ones (18 and 20 of 32), scaled."""
LAYER_CHOICES = ((1,), (4,), (1, 2), (3, 4))
"""Others that are tried."""
PRECISIONS = ("int8", "int4", "klt")
"""Forms of stored features that are tried beside float16."""


def numbers(text: str) -> list[int]:
    """Return the seeds or budgets that `0,2` or `0-4` stand for."""
    first, dash, last = text.partition("-")
    return list(range(int(first), int(last) + 1)) if dash else [int(part) for part in text.split(",")]


def _with(teacher: str, layers: tuple[int, ...] = LAYERS, **more: Any) -> dict[str, Any]:
    """Return settings of embedding losses, of targets by channel and read from the image's states alone.

    So teachers of other scales compare, and a predictor learns nothing from a caption's words. The regression weighs
    eight times what is published, the contrastive term about as much: with the published weights predictions ended
    below the mean map (`results/fourth-trial`; the arm `published` has them).
    """
    weights = {"layers": list(layers), "weight": 4.0, **more}
    return {"teachers": {teacher: weights}, "contrastive": 0.03, "normalise": "channel", "context": "image"}


def layers_arm(layers: tuple[int, ...]) -> str:
    """Name the arm that supervises other layers."""
    return "layers-" + "-".join(map(str, layers))


ARMS = {
    arm.name: arm
    for arm in (
        Arm("none", "no task tokens, next tokens only", tokens=0),
        Arm("tokens", "task tokens without a loss", store="depth.zarr", settings=_with("depth", weight=0.0)),
        Arm("embedding", "embedding losses", store="depth.zarr", settings=_with("depth")),
        Arm(
            "shuffled", "embedding losses, features of another image", store="depth.zarr",
            settings={**_with("depth"), "target_control": "shuffle"},
        ),
        Arm("random", "embedding losses, an untrained teacher", store="random.zarr", settings=_with("depth")),
        Arm("oracle", "no task tokens, distances written in the captions", tokens=0, captions="captions-oracle.jsonl"),
        Arm("longer", "no task tokens, one and a half times the steps of pretraining", tokens=0, longer=1.5),
        Arm(
            "short", "task tokens without a loss, a quarter of the steps of pretraining", store="depth.zarr",
            settings=_with("depth", weight=0.0), longer=0.25,
        ),
        Arm(
            "published", "embedding losses with the published weights, 0.5 and 0.3, targets as they are, all read",
            store="depth.zarr", settings={"teachers": {"depth": {"layers": list(LAYERS)}}},
        ),
        Arm(
            "own", "embedding losses, features of the student's own tower", store="own.zarr", teachers=("clip",),
            settings=_with("clip"),
        ),
        Arm(
            "cells", "embedding losses, the picture's colours, 16 means a cell: nothing learnt, but the cue",
            store="cells.zarr", teachers=("cells",), settings=_with("cells"),
        ),
        Arm(
            "map",
            "embedding losses, the depth that the teacher tells, 16 means a cell: how far, and so where things are",
            store="map.zarr", teachers=("depthmap",), settings=_with("depthmap"),
        ),
        Arm(
            "map-shuffled", "embedding losses, the depth that the teacher tells of another image, in the form of `map`",
            store="map.zarr", teachers=("depthmap",),
            settings={**_with("depthmap"), "target_control": "shuffle"},
        ),
        Arm(
            "map-untrained",
            "embedding losses, what a depth teacher that was never trained tells, in the form of `map`",
            store="map-untrained.zarr", teachers=("depthmap",), settings=_with("depthmap"),
        ),
        Arm(
            "map-untrained-each",
            "embedding losses, what a depth teacher that was never trained tells, another one for each seed",
            store="map-untrained-{seed}.zarr", teachers=("depthmap",), settings=_with("depthmap"),
        ),
        Arm(
            "feed", "no loss, the teacher's features as inputs, all 36 of them, at test time too", tokens=36,
            store="all.zarr", feed=("depth",),
        ),
        *(
            Arm(layers_arm(these), f"embedding losses at {these}", store="depth.zarr", settings=_with("depth", these))
            for these in LAYER_CHOICES
        ),
        *(
            Arm(precision, f"embedding losses, {precision}", store=f"{precision}.zarr", settings=_with("depth"))
            for precision in PRECISIONS
        ),
    )
}  # fmt: skip


def captioned(world: Path, captions: str, told: int) -> str:
    """Return the lines of a file of captions, the first `told` in place of them from those that tell distances."""
    own, telling = (
        (world / name).read_text(encoding="utf-8").splitlines(keepends=True)
        for name in (captions, ARMS["oracle"].captions)
    )
    return "".join(telling[:told] + own[told:])


MAIN = [name for name in ARMS if name not in PRECISIONS and not name.startswith("layers-")]
"""The arms of the first tables; the others have their own."""


@dataclass(frozen=True)
class Recipe:
    """How long and how fast; the same for every arm."""

    pretrain_steps: int
    pretrain_batch: int
    pretrain_lr: float
    tune_epochs: int
    tune_batch: int
    tune_lr: float
    probe_steps: int


class Laboratory:
    """A folder with the world, the stores and the student's parts, in which arms are run."""

    def __init__(self, work: Path, vision: Path, llm: Path, recipe: Recipe) -> None:
        self.work = work
        self.world = work / "world"
        self.recipe = recipe
        self._vision, self._llm = vision, llm
        self._quiet = Console(quiet=True)

    def digest(self, arm: Arm, budget: int, *, tower: bool = True) -> str:
        """Return a digest of everything that a result follows from, but for the seed, versions and hardware.

        Without `tower` that one's weights are left out. A store that follows from the seed is left out too.
        """
        parts = [json.dumps([asdict(arm), asdict(self.recipe), budget], sort_keys=True)]
        files = [self.world / arm.captions, self.world / f"questions-{budget}.jsonl",
                 self._llm / "model.safetensors", *sorted((self.world).glob("bench*/test_*.jsonl"))]  # fmt: skip
        if tower:
            files.append(self._vision / "model.safetensors")
        if arm.store is not None and arm.store == arm.store_of(0):
            files += [self.work / arm.store / "zarr.json", *sorted((self.work / arm.store).glob("*/zarr.json"))]
        parts += [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def pretrained(
        self,
        arm: Arm,
        seed: int,
        *,
        label: str | None = None,
        told: int = 0,
        held_out: Path | None = None,
    ) -> tuple[Path, float]:
        """Compose and pretrain; return the exported student and the seconds that training took.

        `label` names the folder in place of the arm; `told`: so many of the captions tell
        distances, as those of `oracle` all do. `held_out`: conversations whose next-token loss is measured too.
        """
        folder = self.work / "runs" / f"{label or arm.name}-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        student = folder / "student"
        compose(
            self._llm, self._vision, student, teachers=arm.teachers, tokens_per_teacher=arm.tokens, view="squash",
            seed=seed,
        )  # fmt: skip
        captions = captioned(self.world, arm.captions, told)
        (folder / "captions.jsonl").write_text(captions, encoding="utf-8", newline="\n")
        given: dict[str, Any] = {
            "preset": "pretrain", "student": student, "conversations": folder / "captions.jsonl",
            "images": self.world / "images", "out": folder / "pretrain", "seed": seed,
            "steps": round(self.recipe.pretrain_steps * arm.longer), "batch": self.recipe.pretrain_batch,
            "lr": self.recipe.pretrain_lr, **arm.settings,
        }  # fmt: skip
        if (store := arm.store_of(seed)) is not None:
            given["store"] = str(self.work / store)
        elif arm.tokens == 0:
            given["train"] = ["projector"]
        if arm.feed:
            given["feed"] = arm.feed
        if held_out is not None:
            given["evaluation"] = {"conversations": held_out, "every": given["steps"]}
        seconds = self._train(given)
        self._export(folder / "pretrain", folder / "pretrained")
        return folder / "pretrained", seconds

    def tuned(self, arm: Arm, student: Path, seed: int, budget: int) -> tuple[Path, float]:
        """Fine-tune a pretrained student on so many questions; return the exported student."""
        out = student.parent / f"tune-{budget}"
        given: dict[str, Any] = {
            "preset": "finetune", "student": student, "conversations": self.world / f"questions-{budget}.jsonl",
            "images": self.world / "images", "out": out, "seed": seed, "epochs": self.recipe.tune_epochs,
            "batch": self.recipe.tune_batch, "lr": self.recipe.tune_lr,
        }  # fmt: skip
        if arm.feed:
            given |= {"feed": arm.feed, "store": str(self.work / str(arm.store))}
        seconds = self._train(given)
        self._export(out, student.parent / f"tuned-{budget}")
        return student.parent / f"tuned-{budget}", seconds

    def probed(self, student: Path, seed: int, budget: int) -> dict[str, float]:
        """Probe each layer of a student for the depth teacher's features; return centred R² by layer.

        From the image's own states, of the pictures of `budget` questions, which pretraining did not have.
        """
        layers = range(1, count_layers(student) + 1)
        given: dict[str, Any] = {
            "student": student, "store": str(self.work / "all.zarr"),
            "conversations": self.world / f"questions-{budget}.jsonl",
            "images": self.world / "images", "out": student.parent / "probe", "seed": seed,
            "teachers": {"depth": {"layers": list(layers), "weight": 1.0}}, "train": ["predictors"],
            "text": 0.0, "contrastive": 0.0, "context": "image", "probe": {"held_out": 0.2},
            "steps": self.recipe.probe_steps, "batch": self.recipe.pretrain_batch, "lr": self.recipe.pretrain_lr,
        }  # fmt: skip
        result = run_probe(self._settings(given), self._quiet)
        return {
            str(layer): round(float(score.r2 or 0.0), 4) for layer, score in result.teachers["depth"].layers.items()
        }

    def text_loss(self, run: Path) -> float:
        """Return the next-token loss that a run trained on, the mean of its last tenth of steps."""
        return self.ended_at(run)["text"]

    def held_out_loss(self, run: Path) -> float:
        """Return the next-token loss at a run's end on what it did not train on."""
        lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        return round(float([line["text"] for line in lines if line["event"] == "evaluation"][-1]), 4)

    def ended_at(self, run: Path) -> dict[str, float]:
        """Return the next-token loss, and each supervised layer's centred R²: means of a run's last tenth of steps."""
        lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        steps = [line for line in lines if line["event"] == "train"]
        last = steps[-max(1, len(steps) // 10) :]
        found: dict[str, list[float]] = {"text": [line["text"] for line in last]}
        for line in last:
            for teacher, told in line["teachers"].items():
                for layer, figures in told.get("layers", {}).items():
                    if figures["r2"] is not None:
                        found.setdefault(f"{teacher}.{layer}", []).append(figures["r2"])
        return {name: round(sum(values) / len(values), 4) for name, values in found.items()}

    def _settings(self, given: dict[str, Any]) -> TrainConfig:
        # bf16 is for GPUs; the preset's precision would be emulated here
        fixed = {"precision": "float32", "workers": 0, "device": "cpu", "trackers": [], "look_every": 0,
                 "checkpoint_every": 1 << 20, "mean_map_rows": 256, "keep_last": 1,
                 "keep_samples": "2GiB"}  # fmt: skip
        overrides = [f"{name}={json.dumps(value)}" for name, value in fixed.items() if name not in given]
        return load_config(TrainConfig, flags=given, overrides=overrides)

    def _train(self, given: dict[str, Any]) -> float:
        began = time.perf_counter()
        train(self._settings(given), self._quiet)
        return time.perf_counter() - began

    def _export(self, run: Path, out: Path) -> None:
        shutil.rmtree(out, ignore_errors=True)
        export(run, out, dtype="float32")
        shutil.rmtree(run / "checkpoints")

    def scores(self, student: Path, store: Path | None = None) -> Iterator[tuple[str, str, str]]:
        """Ask all questions; yield (split, kind, right): a digit for each question in its order, 1 where right."""
        for split, folder in (("test", "bench"), ("ood", "bench-ood")):
            path = student.parent / f"{student.name}-{split}.json"
            evaluate_cv_bench(
                student, self.world / folder, method="likelihood", device=torch.device("cpu"), out=path, batch=50,
                store=str(store) if store is not None else None,
            )  # fmt: skip
            answers = json.loads(path.read_text(encoding="utf-8"))["answers"]
            for task in sorted({answer["task"] for answer in answers}):
                yield split, task.lower(), "".join(str(int(a["right"])) for a in answers if a["task"] == task)

    def asked(self, budget: int) -> dict[str, dict[str, dict[str, Any]]]:
        """Say of each split and kind which picture each question is about (`scores` has their order), and chance.

        `rules` are shares of right answers without looking; what has to be learnt is, from `budget` questions.
        """
        rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for split, folder in (("test", "bench"), ("ood", "bench-ood")):
            for path in sorted((self.world / folder).glob("test*.jsonl")):
                for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
                    rows.setdefault((split, row["task"].lower()), []).append(row)
        lines = (self.world / f"questions-{budget}.jsonl").read_text(encoding="utf-8").splitlines()
        learnt = [json.loads(line) for line in lines]
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for (split, kind), own in rows.items():
            found.setdefault(split, {})[kind] = {
                "images": [row["filename"] for row in own], "chance": 1 / len(own[0]["choices"]),
                "rules": trivial.rules(learnt, own),
            }  # fmt: skip
        return found

    def bench(self) -> str:
        """Return a digest of the questions that are scored: rows of different ones are not compared."""
        files = sorted(self.world.glob("bench*/test_*.jsonl"))
        return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]

    def run(self, arm: Arm, seed: int, budgets: list[int]) -> Iterator[dict[str, Any]]:
        """Run an arm with a seed; yield its rows, a kind of question at a time."""
        torch.set_num_threads(1)
        # the same arm and seed may run beside this one with other budgets
        pretrained, seconds = self.pretrained(arm, seed, label=f"{arm.name}-{'-'.join(map(str, budgets))}")
        progress = self.ended_at(pretrained.parent / "pretrain")
        if not arm.supervised:  # what predictors that nothing trains tell is nobody's
            progress = {"text": progress["text"]}
        for budget in budgets:
            student, took = self.tuned(arm, pretrained, seed, budget)
            tune_text = self.text_loss(pretrained.parent / f"tune-{budget}")
            store = self.work / str(arm.store) if arm.feed else None
            for split, kind, right in self.scores(student, store):
                yield {
                    "arm": arm.name, "seed": seed, "budget": budget, "split": split, "kind": kind, "right": right,
                    "config": self.digest(arm, budget), "bench": self.bench(), "pretrain_seconds": round(seconds, 1),
                    "tune_seconds": round(took, 1), "machine": machine(), "progress": progress, "tune_text": tune_text,
                    "versions": versions(),
                    "date": datetime.now(UTC).date().isoformat(),
                }  # fmt: skip
        shutil.rmtree(pretrained.parent)


def machine() -> str:
    """Return the kind of processor, by maker and instructions: another's sums differ in their last bits, and answers
    with them.

    Models of one kind give the same answers, as far as tried (`results/repeated.jsonl`: EPYC of families 25 and 26).
    """
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = told.get("model name") or platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def versions() -> dict[str, str]:
    """Return the versions that figures may depend on."""
    return {name: importlib.metadata.version(name) for name in ("ola-distill", "torch", "transformers", "numpy")}
