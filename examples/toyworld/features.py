"""Features of the toy world's pictures: one store for each kind of target, by `olapipe extract`."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from arms import PRECISIONS

if TYPE_CHECKING:
    from transformers import DepthAnythingForDepthEstimation

HERE = Path(__file__).parent
GRID = 6
"""Cells of the stored maps, averaged from 24: one for each patch of the student."""
READ_FROM = {
    "the teacher's features": "depth.zarr",
    "the untrained teacher's features": "random.zarr",
    "what the teacher answers": "map.zarr",
    "what an untrained teacher answers": "map-untrained.zarr",
    "the colours of `cells`": "cells.zarr",
}
"""Targets from which depth is read linearly, by the stores that arms learn from."""
UNTRAINED_SEED = 77
_EACH_UNTRAINED = re.compile(r"map-untrained-(\d+)\.zarr")
"""Stores of what an untrained network tells, another one for each seed of a run."""


@dataclass(frozen=True)
class Extraction:
    """A teacher as `olapipe extract` is told of it."""

    teacher: str
    checkpoint: Path | None
    resize: str | None
    """How its maps come to `GRID` cells; None where they have as many."""
    workers: int
    """Processes; how many changes no byte."""
    plugins: Path | None = None
    """Folder that the teacher is installed in, where it comes from a package of its own."""


def of_all(store: str) -> str:
    """Name the store of what `store` has of the captions' pictures, of all pictures: those that are asked about too."""
    return "all.zarr" if store == "depth.zarr" else store.replace(".zarr", "-all.zarr")


@dataclass(frozen=True)
class Stores:
    """The stores of a work folder; `jobs` processes extract, which changes no byte."""

    work: Path
    teachers: Path
    student: Path
    jobs: int
    draw: int = 0
    """Of the world."""

    def make(self, store: str, *, pictures: str = "captions.jsonl") -> None:
        """Extract the features of pictures that an arm's store has, unless that is done; it resumes by itself."""
        out = store if pictures == "captions.jsonl" else of_all(store)
        name = store.removesuffix(".zarr")
        precision = name if name in PRECISIONS else "float16"
        extract(self.work / "world", self.work / out, self._how(store), pictures=pictures, precision=precision)

    def _how(self, store: str) -> Extraction:
        if store == "own.zarr":
            return Extraction("clip", self.student / "vision", "bilinear", workers=self.jobs)
        if store == "random.zarr":
            folder = self.work / "random-teacher"
            if not folder.is_dir():
                _write_untrained_depth(folder, self.teachers / "depth", UNTRAINED_SEED)
            return Extraction("depth", folder, "area", workers=self.jobs)
        if (each := _EACH_UNTRAINED.fullmatch(store)) is not None:
            seed = partial(_telling_seed, int(each[1]), self.draw)
            return self._plug_in("depthmap", self._untrained(f"untrained-teacher-{each[1]}", seed))
        if store == "map-untrained.zarr":
            return self._plug_in("depthmap", self._untrained("untrained-teacher", lambda: UNTRAINED_SEED))
        if store == "map.zarr":
            return self._plug_in("depthmap", self.teachers / "depth")
        if store == "cells.zarr":
            return self._plug_in("cells", None)
        return Extraction("depth", self.teachers / "depth", "area", workers=self.jobs)

    def _plug_in(self, teacher: str, checkpoint: Path | None) -> Extraction:
        plugins = install(HERE / "targets", self.work / "targets")
        return Extraction(teacher, checkpoint, None, workers=self.jobs, plugins=plugins)

    def _untrained(self, name: str, seed: Callable[[], int]) -> Path:
        folder = self.work / name
        if not folder.is_dir():
            write_untrained_answer(folder, seed())
        return folder


def _write_untrained_depth(out: Path, trained: Path, seed: int) -> None:
    import torch
    from teacher_depth import depth_config
    from transformers import DepthAnythingForDepthEstimation

    torch.manual_seed(seed)
    DepthAnythingForDepthEstimation(depth_config()).save_pretrained(out)
    shutil.copy(trained / "preprocessor_config.json", out)


def write_untrained_answer(out: Path, seed: int) -> None:
    """Write a depth teacher that was never trained."""
    from teacher_depth import write_depth

    write_depth(_untrained(seed), out)


def _untrained(seed: int) -> DepthAnythingForDepthEstimation:
    """Return a depth teacher that was never trained.

    Neck and head begin as torch begins convolutions: from transformers' small weights the answer is one number for all
    pictures, as far as float16 tells.
    """
    from teacher_depth import new_depth
    from torch import nn

    model = new_depth(seed)
    for part in (model.neck, model.head):
        for module in part.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                module.reset_parameters()
    return model


def _telling_seed(number: int, draw: int) -> int:
    """Return the first of a run's seeds whose untrained network tells anything: the head ends in a ReLU, and may be 0.

    Fewer than 1 % of what it tells of 64 pictures are 0, and it varies by a hundredth of its mean: float16 has twenty
    steps of that. What can be read from it is not looked at.
    """
    import torch
    from fitting import IMAGENET_MEAN, IMAGENET_STD, batch_of, pixels_of
    from teacher_depth import SIDE

    pixels = pixels_of(batch_of("haze", 0, 64, SIDE, draw=draw)[0], False, IMAGENET_MEAN, IMAGENET_STD)
    for seed in range(100 * number, 100 * number + 100):
        with torch.no_grad():
            told = _untrained(seed).train(False)(pixels).predicted_depth
        if float((told == 0).float().mean()) < 0.01 and float(told.std() / told.mean()) > 0.01:
            return seed
    raise RuntimeError(f"none of 100 untrained networks of seed {number} tells anything")


def extract(
    world: Path, store: Path, what: Extraction, *, pictures: str = "captions.jsonl", precision: str = "float16"
) -> None:
    """Run `olapipe extract`; does nothing where the store is whole."""
    done = store.with_suffix(".done")
    if done.is_file():
        return
    name = what.teacher
    command = ["extract", str(world / pictures), "--images", str(world / "images"), "--out", str(store)]
    command += ["--teacher", name, "--precision", precision, "--workers", str(what.workers)]
    if what.checkpoint is not None:
        command += ["--checkpoint", f"{name}={what.checkpoint}"]
    options = (f"grid={GRID}", f"grid_resize={what.resize}") if what.resize is not None else ()
    for option in options:
        command += ["--set", f"options.{name}.{option}"]
    print("$ olapipe", *command, flush=True)
    paths = [str(what.plugins), os.environ.get("PYTHONPATH")] if what.plugins is not None else []
    path = {"PYTHONPATH": os.pathsep.join(filter(None, paths))} if paths else {}
    follow([sys.executable, "-m", "olapipe", *command], os.environ | path)
    done.touch()


def install(package: Path, into: Path) -> Path:
    """Install a package of teachers into a folder of its own, without a network."""
    if not into.is_dir():
        with tempfile.TemporaryDirectory(dir=into.parent) as built:  # pip builds in the source folder
            source = shutil.copytree(package, Path(built) / "source", ignore=shutil.ignore_patterns("__pycache__"))
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
            subprocess.run([*pip, "--target", str(Path(built) / "target"), str(source)], check=True)
            (Path(built) / "target").rename(into)
    return into


def follow(command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """Run a command to its end, which SIGTERM for this process hastens: it would go on alone, on all cores."""
    with subprocess.Popen(command, env=environment) as process:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            status = process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
    if status:
        sys.exit(f"error: `{' '.join(command)}` ended with {status}; the same command goes on")
