"""What a teacher is: its settings, its preprocessing step and its forward pass. Imports no torch."""

from __future__ import annotations

import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from olaschema.errors import TeacherError
from olaschema.images import DecodedImage
from olaschema.manifest import Fingerprint, Preprocessing, Scalar

if TYPE_CHECKING:
    import torch

Preset = Literal["default", "ola-vlm"]
ComputeDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class TeacherSettings:
    """How one teacher is to be loaded and run.

    `checkpoint` is a local folder (or the original `.pth` file) or a hub id; None means the published id.
    `preset` chooses the defaults of the options: what the teacher's authors intend, or what the public
    OLA-VLM code did. `options` overrides single ones by name; which exist is in the registry.
    """

    checkpoint: str | None = None
    preset: Preset = "default"
    device: str | torch.device = "cpu"
    compute_dtype: ComputeDtype = "float32"
    compile: bool = False
    options: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True)
class Option:
    """One option of a teacher: the values it may take, and its default under each preset.

    `pattern` is a regular expression for further values, which are kept as text; `form` describes them in words.
    """

    allowed: tuple[Scalar, ...]
    default: Scalar
    ola_vlm: Scalar
    about: str
    pattern: str | None = None
    form: str = ""


COMMON_OPTIONS: Mapping[str, Option] = {
    "channel_order": Option(("rgb", "bgr"), "rgb", "rgb", "order of the colour channels the teacher is fed"),
    "exif": Option(
        (True, False), True, False, "turn the image upright by its EXIF orientation first (a TIFF always is)"
    ),
}


def resolve_options(teacher: str, known: Mapping[str, Option], settings: TeacherSettings) -> dict[str, Scalar]:
    """Return every known option with its value: the one given, else the preset's default.

    Values may be given as text (`exif=false`). Raises TeacherError for an unknown preset, an unknown option
    or a value that is not allowed.
    """
    if settings.preset not in ("default", "ola-vlm"):
        raise TeacherError(f"{teacher}: there is no preset {settings.preset!r}", "The presets are default and ola-vlm.")
    for name in settings.options:
        if name not in known:
            raise TeacherError(f"{teacher}: there is no option {name!r}", suggest(name, known, "options"))
    resolved: dict[str, Scalar] = {}
    for name, option in known.items():
        default = option.ola_vlm if settings.preset == "ola-vlm" else option.default
        given = settings.options.get(name, default)
        matches = [value for value in option.allowed if str(value).lower() == str(given).lower()]
        if matches:
            resolved[name] = matches[0]
        elif option.pattern is not None and re.fullmatch(option.pattern, str(given)):
            resolved[name] = str(given)
        else:
            allowed = ", ".join([*(str(value).lower() for value in option.allowed), *filter(None, [option.form])])
            raise TeacherError(f"{teacher}: {name}={given} is not possible", f"{name} is one of: {allowed}.")
    return resolved


def suggest(name: str, known: Iterable[str], what: str) -> str:
    """Say which names exist, and which of them was probably meant."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    meant = f"Did you mean {close[0]!r}? " if close else ""
    return f"{meant}Known {what}: {', '.join(names)}."


class Preprocessor(ABC):
    """The CPU half of a teacher: pixels from a decoded image. Holds no model, is picklable, runs anywhere."""

    @property
    @abstractmethod
    def record(self) -> Preprocessing:
        """Every step with every value that changes pixels."""

    @property
    @abstractmethod
    def output_size(self) -> tuple[int, int]:
        """(H, W) of the pixels, the same for every image."""

    @abstractmethod
    def __call__(self, image: DecodedImage) -> np.ndarray:
        """Return float32 pixels `(3, H, W)`; raises ImageError for an image that cannot be brought to them."""


class Teacher(ABC):
    """A frozen encoder with the record of what its features mean.

    `source` is the published id or the base name of the local folder, never an absolute path.
    """

    def __init__(
        self, *, name: str, licence: str, source: str, preprocessor: Preprocessor, fingerprint: Fingerprint
    ) -> None:
        self.name = name
        self.licence = licence
        self.source = source
        self.preprocessor = preprocessor
        self.fingerprint = fingerprint

    @abstractmethod
    def encode(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        """Return the features of preprocessed images.

        `pixels_bchw` is float32 `(B, 3, H, W)` on any device. The result is float32 on the teacher's device,
        `(B, H, W, C)` for a teacher with a grid, else `(B, C)`.
        """

    def encode_images(self, pixels_bchw: torch.Tensor, digests: Sequence[str]) -> torch.Tensor:
        """Return the features as `encode` does, for a teacher that draws noise: seeded by each image's digest.

        `digests` are the SHA-256 of the B image files, in hexadecimal, as receipts hold them. The draw depends
        on the image alone, not on its batch, so that a repeated run gives the same feature. Most teachers draw
        nothing.
        """
        return self.encode(pixels_bchw)
