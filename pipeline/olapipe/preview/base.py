"""What turns a stored feature back into something to look at. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from olaschema.errors import OlaError

Output = TypeVar("Output")


class Unavailable(OlaError):
    """Something that decoding needs is not at hand. A preview says so and shows the PCA colours alone."""


@dataclass(frozen=True)
class Drawing:
    """`rgb` is uint8 `(H, W, 3)`; `caption` says what the colours cannot."""

    rgb: np.ndarray
    caption: str = ""


class Decoder(ABC, Generic[Output]):
    """The part of a published checkpoint that reads its encoder's features.

    `needs_pixels` says that `decode` uses more of the image than the feature.
    """

    needs_pixels: bool = False

    @abstractmethod
    def full(self, pixels_chw: np.ndarray) -> Output:
        """Return what the whole checkpoint says of preprocessed pixels, float32 `(3, H, W)`."""

    @abstractmethod
    def decode(self, feature: np.ndarray, pixels_chw: np.ndarray | None) -> Output:
        """Return what the checkpoint's own decoder says of one feature, float32 `(H, W, C)` or `(C,)`."""

    @abstractmethod
    def draw(self, output: Output) -> Drawing:
        """Draw what `full` or `decode` returned."""

    @abstractmethod
    def agreement(self, full: Output, decoded: Output) -> str:
        """Say in numbers how near the decoded feature comes to the whole checkpoint."""
