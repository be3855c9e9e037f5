"""The teachers reproduce what the public OLA-VLM implementation computed, case by case.

Cases are the sub-folders `depth*`, `seg*` and `gen*` of the directory named by OLA_GOLDEN, their images the
files of its `images` folder. A case says by the names in its `expected.safetensors` what must come out.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden_support import COMMITTED, GOLDEN, require_cases
from safetensors.torch import load_file

import olapipe.teachers.depth as depth_module
import olapipe.teachers.preprocess as preprocess_module
from olapipe.teachers import registry
from olapipe.teachers.base import Teacher, TeacherSettings
from olaschema.images import decode_image
from olaschema.manifest import Scalar

BOUND = 1e-5
TEACHERS = ("depth", "seg", "gen")


def _kind(case: Path) -> str | None:
    return next((name for name in TEACHERS if case.name.startswith(name)), None)


CASES = sorted(path for path in GOLDEN.iterdir() if path.is_dir() and _kind(path)) if GOLDEN.is_dir() else []


def _parse(kind: str, name: str) -> tuple[str, dict[str, Scalar]]:
    """Split the name of an expected tensor into the image's name and the options that produced it."""
    if kind != "depth":
        return name, {}
    stem = name.removesuffix(".last")
    image, order = stem.rsplit(".", 1)
    return image, {"channel_order": order, "pooling": "mean" if stem == name else "last"}


def _pixels(teacher: Teacher, images: Path, image: str) -> torch.Tensor:
    found = [path for path in images.iterdir() if path.stem == image]
    assert len(found) == 1, f"expected one image named {image}, found {found}"
    decoded = decode_image(found[0].read_bytes(), name=found[0].name)
    return torch.from_numpy(teacher.preprocessor(decoded))[None]


def _as_published(kind: str, feature: torch.Tensor) -> torch.Tensor:
    """Bring one image's feature to the layout of the golden data."""
    if kind == "depth":
        return feature.flatten(0, 1)
    return feature.permute(2, 0, 1) if kind == "seg" else feature[None]


def errors(case: Path, **override: Scalar) -> dict[str, float]:
    """Relative L2 error of each expected tensor of a case."""
    kind = _kind(case)
    assert kind is not None
    teachers: dict[tuple[Scalar, ...], Teacher] = {}
    found = {}
    for name, expected in load_file(case / "expected.safetensors").items():
        image, options = _parse(kind, name)
        key = tuple(options.values())
        if key not in teachers:
            settings = TeacherSettings(str(case), preset="ola-vlm", options=options | override)
            teachers[key] = registry.load(kind, settings)
        teacher = teachers[key]
        actual = _as_published(kind, teacher.encode(_pixels(teacher, case.parent / "images", image))[0])
        assert actual.shape == expected.shape
        found[name] = float((actual - expected).norm() / expected.norm())
    return found


def test_there_are_cases() -> None:
    require_cases(*TEACHERS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_features_equal_the_published_ones(case: Path) -> None:
    found = errors(case)
    assert found, "the case expects nothing"
    assert max(found.values()) <= BOUND, found


Mutation = Callable[[pytest.MonkeyPatch], dict[str, Scalar]]


def _swap_channels(patch: pytest.MonkeyPatch) -> dict[str, Scalar]:
    original = preprocess_module.PilPreprocessor.__call__

    def swapped(self: preprocess_module.PilPreprocessor, image):  # type: ignore[no-untyped-def]
        other = "rgb" if self.channel_order == "bgr" else "bgr"
        return original(dataclasses.replace(self, channel_order=other), image)

    patch.setattr(preprocess_module.PilPreprocessor, "__call__", swapped)
    return {}


def _drop_norm(attribute: str) -> Mutation:
    def mutate(patch: pytest.MonkeyPatch) -> dict[str, Scalar]:
        for module in TEACHERS:
            name = f"olapipe.teachers.{module}"
            original = importlib.import_module(name).load_strictly

            def without(*args, original=original, **kwargs):  # type: ignore[no-untyped-def]
                model = original(*args, **kwargs)
                owner, _, last = attribute.rpartition(".")
                setattr(model.get_submodule(owner), last, torch.nn.Identity())
                return model

            patch.setattr(f"{name}.load_strictly", without)
        return {}

    return mutate


def _filter(name: str) -> Mutation:
    def mutate(patch: pytest.MonkeyPatch) -> dict[str, Scalar]:
        original = preprocess_module.processor_arguments
        resample = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}[name]

        def changed(*args, **kwargs):  # type: ignore[no-untyped-def]
            return original(*args, **kwargs) | {"resample": resample}

        for module in ("depth", "seg", "gen"):
            patch.setattr(f"olapipe.teachers.{module}.processor_arguments", changed)
        return {}

    return mutate


def _shift_tap(patch: pytest.MonkeyPatch) -> dict[str, Scalar]:
    original = depth_module.block_taps

    def shifted(*args, **kwargs):  # type: ignore[no-untyped-def]
        taps = original(*args, **kwargs)
        return (*taps[:-1], taps[-1] - 1)

    patch.setattr(depth_module, "block_taps", shifted)
    return {}


def _interpolate_to_size(patch: pytest.MonkeyPatch) -> dict[str, Scalar]:
    return {"position_interpolation": "size"}


MUTATIONS: list[tuple[str, str, Mutation]] = [
    *((kind, "swap channels", _swap_channels) for kind in TEACHERS),
    ("depth", "drop the final norm", _drop_norm("layernorm")),
    ("seg", "drop the norm of the map", _drop_norm("hidden_states_norms.stage4")),
    ("gen", "drop the final norm", _drop_norm("vision_model.post_layernorm")),
    ("depth", "shift a tap", _shift_tap),
    ("depth", "interpolate positions to the size", _interpolate_to_size),
    ("depth", "resize bilinearly", _filter("bilinear")),
    ("seg", "resize bicubically", _filter("bicubic")),
    ("gen", "resize bilinearly", _filter("bilinear")),
]


@pytest.mark.parametrize(("kind", "what", "mutate"), MUTATIONS, ids=[f"{k}: {w}" for k, w, _ in MUTATIONS])
def test_a_wrong_setting_would_be_seen(kind: str, what: str, mutate: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    """The golden data can tell: with one thing wrong, every expected value is missed by far."""
    found = errors(COMMITTED / kind, **mutate(monkeypatch))
    assert min(found.values()) > 10 * BOUND, (what, found)
