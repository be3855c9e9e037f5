"""Target variants common to all teachers: another grid, tokens of unit length. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from olapipe.teachers.base import Option, Teacher
from olaschema.errors import TeacherError
from olaschema.manifest import Scalar

if TYPE_CHECKING:
    import torch

OPTIONS: Mapping[str, Option] = {
    "grid": Option(
        ("own",), "own", "own", "cells of the stored map: the teacher's own, or another number",
        pattern=r"[1-9]\d{0,3}(x[1-9]\d{0,3})?", form="a number of cells such as 12, or 12x16 (height x width)",
    ),
    "grid_resize": Option(
        ("none", "area", "bilinear"), "none", "none",
        "how another grid is made: area (mean of the cells that fall into a new one) or bilinear interpolation",
    ),
    "l2_norm": Option((True, False), False, False, "divide each token by its Euclidean norm, after any resizing"),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """What is done to a teacher's float32 features before they are stored."""

    grid: tuple[int, int] | None = None
    resize: str = "none"
    l2_norm: bool = False

    @classmethod
    def of(cls, teacher: str, options: Mapping[str, Scalar]) -> Variant:
        """Read the resolved options; raises TeacherError for a grid without a way of resizing, or the reverse."""
        text, resize = str(options.get("grid", "own")), str(options.get("grid_resize", "none"))
        if (text == "own") != (resize == "none"):
            raise TeacherError(
                f"{teacher}: grid={text} with grid_resize={resize}",
                "Another grid needs grid_resize=area or grid_resize=bilinear; the teacher's own grid needs neither.",
            )
        height, _, width = text.partition("x")
        grid = None if text == "own" else (int(height), int(width or height))
        return cls(grid, resize, bool(options.get("l2_norm", False)))


def vary(teacher: Teacher, variant: Variant) -> Teacher:
    """Return a teacher with this variant of its features; the same teacher where nothing is to be changed.

    Raises TeacherError where a grid is asked of a teacher that has none.
    """
    own = teacher.fingerprint.grid
    if variant.grid is not None and own is None:
        raise TeacherError(
            f"{teacher.name}: it gives one vector per image, so there is no grid to resize", "Leave grid out."
        )
    if variant.grid in (None, own) and not variant.l2_norm:
        return teacher
    return VariedTeacher(teacher, variant)


class VariedTeacher(Teacher):
    """A teacher whose features are resized to another grid, then divided by their norms."""

    def __init__(self, inner: Teacher, variant: Variant) -> None:
        own = inner.fingerprint.grid
        self._inner = inner
        self._grid = None if variant.grid in (None, own) else variant.grid
        self._resize = variant.resize
        self._l2_norm = variant.l2_norm
        options: dict[str, Scalar] = dict(inner.fingerprint.options)
        if self._grid is not None and own is not None:
            options |= {"grid_resize": self._resize, "grid_before": f"{own[0]}x{own[1]}"}
        if self._l2_norm:
            options["l2_norm"] = True
        super().__init__(
            name=inner.name,
            licence=inner.licence,
            source=inner.source,
            preprocessor=inner.preprocessor,
            fingerprint=inner.fingerprint.model_copy(update={"grid": self._grid or own, "options": options}),
        )

    def encode(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        """Return the varied features: float32 `(B, H, W, C)`, or `(B, C)` without a grid."""
        return self._varied(self._inner.encode(pixels_bchw))

    def encode_images(self, pixels_bchw: torch.Tensor, digests: Sequence[str]) -> torch.Tensor:
        """Return the varied features of a teacher that may draw noise."""
        return self._varied(self._inner.encode_images(pixels_bchw, digests))

    def _varied(self, features: torch.Tensor) -> torch.Tensor:
        import torch

        with torch.inference_mode():
            if self._grid is not None:
                features = resize_grid(features, self._grid, self._resize)
            if self._l2_norm:
                features = torch.nn.functional.normalize(features, dim=-1)
            return features.contiguous()


def resize_grid(features_bhwc: torch.Tensor, grid: tuple[int, int], how: str) -> torch.Tensor:
    """Resize `(B, H, W, C)` to `(B, *grid, C)` by `area` (adaptive mean) or `bilinear` (no aligned corners)."""
    from torch.nn.functional import interpolate

    features_bchw = features_bhwc.permute(0, 3, 1, 2)
    if how == "area":
        resized = interpolate(features_bchw, size=grid, mode="area")
    else:
        resized = interpolate(features_bchw, size=grid, mode="bilinear", align_corners=False)
    return resized.permute(0, 2, 3, 1)
