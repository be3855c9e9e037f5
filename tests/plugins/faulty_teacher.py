"""A fake teacher, installed as a package is, that does harm when it is told to.

Its checkpoint is a folder with `control.json`: `wait` (seconds per batch), `fits` (images at a time that fit the
device), `segv` and `raises` (digests of images), `segv_width` (of an image, met while decoding ahead),
`batch_sensitive`, `plan`: a list of `[shard, point, victim]`, each of which happens once, in whichever worker comes
there first, and `moments`: a list of `[seconds, victim]`, that long after a worker has loaded. `fired/` in the folder
counts them, a moment with `m` in front. With `orderly` nothing else is killed between two points of one file, so that
every entry of a plan is met: without it a kill may come between a file and its `after`, and the rerun puts no file.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from olapipe.teachers.base import Preprocessor, Teacher, TeacherSettings
from olapipe.teachers.info import TeacherInfo
from olaschema.images import DecodedImage
from olaschema.manifest import Fingerprint, Preprocessing, View
from olaschema.place import LocalPlace

INFO = TeacherInfo(
    name="faulty", published="faulty-1", licence="CC0-1.0", about="Breaks on demand", grid=(2, 2), channels=4,
    module="faulty_teacher",
)  # fmt: skip
POINTS = ("before-values", "during-values", "after-values", "before-receipt", "during-receipt", "after-receipt")
# Longer than Ray takes to see that a raylet or a driver is gone, and to end the workers.
_UNTIL_ENDED = 600


def load(info: TeacherInfo, settings: TeacherSettings) -> Teacher:
    folder = Path(str(settings.checkpoint))
    control = json.loads((folder / "control.json").read_text())
    if control.get("plan"):
        _install(folder, control["plan"], orderly=control.get("orderly", False))
    if os.getpid() != _driver(folder):
        for number, (seconds, victim) in enumerate(control.get("moments", ())):
            threading.Thread(target=_strike, args=(folder, f"m{number}", seconds, victim), daemon=True).start()
    preprocessor = Shrink(control)
    meaning = Fingerprint(
        teacher=info.name, model_class="Faulty", weights="0" * 64, preset=settings.preset,
        preprocessing=preprocessor.record, taps=(), pooling="none", grid=info.grid, channels=info.channels,
    )  # fmt: skip
    return Faulty(control, preprocessor, meaning)


class Shrink(Preprocessor):
    def __init__(self, control: dict[str, Any]) -> None:
        self.control = control

    @property
    def record(self) -> Preprocessing:
        return Preprocessing(
            processor="Fake", backend="pil", channel_order="rgb", exif=False, view=View(kind="squash"), steps=()
        )

    @property
    def output_size(self) -> tuple[int, int]:
        return 2, 2

    def __call__(self, image: DecodedImage) -> np.ndarray:
        if image.rgb.width == self.control.get("segv_width"):
            ctypes.string_at(0)
        small = image.rgb.resize((2, 2), Image.Resampling.BOX)
        return np.asarray(small, dtype=np.float32).transpose(2, 0, 1) / 255


class Faulty(Teacher):
    def __init__(self, control: dict[str, Any], preprocessor: Preprocessor, fingerprint: Fingerprint) -> None:
        super().__init__(
            name="faulty", licence="CC0-1.0", source="tests", preprocessor=preprocessor, fingerprint=fingerprint
        )
        self.control = control

    def encode(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        colours = pixels_bchw.permute(0, 2, 3, 1)
        return torch.cat((colours, colours.sum(-1, keepdim=True)), dim=-1)

    def encode_images(self, pixels_bchw: torch.Tensor, digests: Sequence[str]) -> torch.Tensor:
        time.sleep(self.control.get("wait", 0))
        if len(digests) > self.control.get("fits", len(digests)):
            raise torch.OutOfMemoryError("CUDA out of memory (a fake one)")
        if set(digests) & set(self.control.get("segv", ())):
            ctypes.string_at(0)
        if set(digests) & set(self.control.get("raises", ())):
            raise RuntimeError("this image is too much for the teacher")
        features = self.encode(pixels_bchw)
        if self.control.get("batch_sensitive"):
            features[..., 3] = len(digests)
        return features


def _install(folder: Path, plan: list[tuple[int, str, str]], *, orderly: bool) -> None:
    """Let every file that is put come past each point of the plan. The package has no hooks: its method is replaced."""
    if getattr(LocalPlace, "faulty", False):
        return
    LocalPlace.faulty = True  # type: ignore[attr-defined]
    put, sync = LocalPlace._put, os.fsync
    present = threading.local()
    driver = _driver(folder)

    def reach(point: str, shard: int) -> None:
        for number, (where, what, victim) in enumerate(plan):
            if (where, what) == (shard, point) and _first(folder, str(number)):
                _kill(folder, victim)
                if orderly:
                    time.sleep(_UNTIL_ENDED)

    def putting(self: LocalPlace, name: str, data: bytes, move: Any) -> None:
        parts = name.split("/")
        kind = "receipt" if parts[0] == "receipts" else "values" if parts[1:3] == ["values", "c"] else None
        if kind is None:
            put(self, name, data, move)
            return
        shard = int(parts[-1].removesuffix(".json") if kind == "receipt" else parts[3])
        with _turn(folder, driver) if orderly else nullcontext():
            reach(f"before-{kind}", shard)
            with _during(present, lambda: reach(f"during-{kind}", shard)):
                put(self, name, data, move)
            reach(f"after-{kind}", shard)

    def synced(handle: int) -> None:
        during = getattr(present, "during", None)
        if during is not None:
            present.during = None
            during()  # the temporary file is there, not synced and not renamed
        sync(handle)

    LocalPlace._put = putting  # type: ignore[method-assign]
    os.fsync = synced


@contextmanager
def _during(present: threading.local, action: Any) -> Iterator[None]:
    present.during = action
    try:
        yield
    finally:
        present.during = None


@contextmanager
def _turn(folder: Path, driver: int) -> Iterator[None]:
    """One file at a time over all workers, and none after the driver was killed: Ray then ends them at any moment."""
    with (folder / "turn.lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not _alive(driver):
            time.sleep(_UNTIL_ENDED)
        yield


def _driver(folder: Path) -> int:
    return int((folder / "driver.pid").read_text())


def _alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _strike(folder: Path, name: str, seconds: float, victim: str) -> None:
    time.sleep(seconds)
    if _first(folder, name):
        _kill(folder, victim)


def _first(folder: Path, name: str) -> bool:
    try:
        os.close(os.open(folder / "fired" / name, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _kill(folder: Path, victim: str) -> None:
    if victim == "worker":
        os.kill(os.getpid(), signal.SIGKILL)
    elif victim == "raylet":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(_UNTIL_ENDED)
    else:
        os.kill(_driver(folder), signal.SIGKILL)
