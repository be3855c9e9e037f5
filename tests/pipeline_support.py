"""What tests of the offline half share: corpora, checkpoints, a fake teacher, the command, one Ray session."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from olapipe.teachers.base import Preprocessor, Teacher
from olaschema.errors import ImageError
from olaschema.images import DecodedImage
from olaschema.manifest import Fingerprint, Preprocessing, View

GOLDEN = Path(__file__).parent / "golden"
DEPTH = GOLDEN / "depth"


def pixels(seed: int, size: tuple[int, int] = (32, 24)) -> np.ndarray:
    """A smooth random RGB picture `(H, W, 3)` of `size` (width, height)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return np.asarray(coarse.resize(size, Image.Resampling.BICUBIC))


def image_bytes(seed: int, size: tuple[int, int] = (32, 24), form: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels(seed, size)).save(out, format=form)
    return out.getvalue()


def write_images(folder: Path, *names: str, size: tuple[int, int] = (32, 24)) -> None:
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(seed, size, "JPEG" if name.lower().endswith(("jpg", "jpeg")) else "PNG"))


def digests(root: Path) -> dict[str, str]:
    """SHA-256 of every file of a store but those under `_log`."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.relative_to(root).parts[0] != "_log"
    }


def olapipe(*arguments: object) -> Result:
    """Run the command in this process, where the session's Ray is used."""
    from olapipe.cli import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def depth_arguments(corpus: Path, out: Path, *more: object) -> list[str]:
    """The arguments that extract depth features with the golden checkpoint."""
    fixed = ["extract", corpus, "--out", out, "--teacher", "depth", "--checkpoint", f"depth={DEPTH}"]
    return [str(argument) for argument in (*fixed, *more)]


def start_olapipe(*arguments: object) -> subprocess.Popen[str]:
    """Start the command as a user would, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "olapipe", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray for all tests that run the command in this process, and workers that the next test's job takes over."""
    from worker_support import kept_workers

    from olapipe.cluster import ray_running

    with ray_running(None, 2), kept_workers():
        yield


@dataclass
class FakePreprocessor(Preprocessor):
    """Shrinks to 2 × 2; refuses images whose names it cannot know by their width."""

    refused_width: int = -1
    seen: list[tuple[int, int]] = field(default_factory=list)

    @property
    def record(self) -> Preprocessing:
        return Preprocessing(
            processor="Fake", backend="pil", channel_order="rgb", exif=False, view=View(kind="squash"), steps=()
        )

    @property
    def output_size(self) -> tuple[int, int]:
        return 2, 2

    def __call__(self, image: DecodedImage) -> np.ndarray:
        self.seen.append(image.rgb.size)
        if image.rgb.width == self.refused_width:
            raise ImageError("too-large", "too elongated")
        small = image.rgb.resize((2, 2), Image.Resampling.BOX)
        return np.asarray(small, dtype=np.float32).transpose(2, 0, 1) / 255


class FakeTeacher(Teacher):
    """Features `(2, 2, 4)`: the colours and their sum. Remembers the batches it saw."""

    def __init__(self, name: str = "fake", *, refused_width: int = -1) -> None:
        preprocessor = FakePreprocessor(refused_width)
        super().__init__(
            name=name,
            licence="MIT",
            source="tests",
            preprocessor=preprocessor,
            fingerprint=Fingerprint(
                teacher=name,
                model_class="FakeTeacher",
                weights="0" * 64,
                preset="default",
                preprocessing=preprocessor.record,
                taps=(),
                pooling="none",
                grid=(2, 2),
                channels=4,
            ),
        )
        self.fake_preprocessor = preprocessor
        self.batches: list[int] = []
        self.poison: dict[float, float] = {}
        """Where the first value of an image is (nearly) the key, it is replaced by the value."""

    def encode(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(pixels_bchw))
        colours = pixels_bchw.permute(0, 2, 3, 1)
        features = torch.cat((colours, colours.sum(-1, keepdim=True)), dim=-1)
        for found, wanted in self.poison.items():
            hit = (features[:, 0, 0, 0] - found).abs() < 1e-6
            features[hit, 0, 0, 0] = wanted
        return features
