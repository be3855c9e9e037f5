"""`olapipe explain`: the pixels each teacher saw beside those the student sees, step by step.

What a teacher saw is rebuilt from the fingerprint in the store: no checkpoint is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from olapipe.preview.page import Page
from olapipe.preview.panels import Cell
from olapipe.preview.rows import find_sample, read_picture
from olapipe.report import visible
from olapipe.teachers.huggingface import quiet_transformers
from olaschema.errors import ConfigError, ImageError, TeacherError
from olaschema.images import DEFAULT_MAX_PIXELS, DecodedImage
from olaschema.manifest import Preprocessing, Scalar, Step
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore

Values = Mapping[str, Scalar | tuple[Scalar, ...]]


@dataclass
class Replay:
    """An image on its way through the steps of a fingerprint.

    `pixels_hwc` is uint8 until it is rescaled or normalised, then float32. `lines` says for each step what it was
    given and the size it left; `undo` turns final values back to 0–255, last step first.
    """

    pixels_hwc: np.ndarray
    lines: list[str] = field(default_factory=list)
    undo: list[Callable[[np.ndarray], np.ndarray]] = field(default_factory=list)

    @property
    def pixels_chw(self) -> np.ndarray:
        """What the teacher was given: float32 `(3, H, W)`."""
        return np.ascontiguousarray(self.pixels_hwc.transpose(2, 0, 1), dtype=np.float32)

    @property
    def visible(self) -> np.ndarray:
        """The same as uint8 `(H, W, 3)` to look at, its channels in the order the teacher was given them."""
        values = self.pixels_hwc.astype(np.float64)
        for inverse in reversed(self.undo):
            values = inverse(values)
        return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def replay(preprocessing: Preprocessing, image: DecodedImage, *, teacher: str) -> Replay:
    """Do again what the fingerprint's steps say, to the last bit.

    Raises TeacherError for a step this version doesn't know, ImageError for an image the teacher refuses as too
    elongated.
    """
    state = Replay(np.asarray(image.rgb))
    for number, step in enumerate(preprocessing.steps, start=1):
        if step.name == "orient":
            state.pixels_hwc = np.asarray(image.oriented(exif=bool(step.values["exif"])))
        elif step.name in _STEPS:
            _STEPS[step.name](state, step.values)
        else:
            raise TeacherError(
                f"{teacher}: its fingerprint has a preprocessing step {step.name!r} that this version cannot redo",
                "Install the version of ola-distill that extracted the store.",
            )
        height, width = state.pixels_hwc.shape[:2]
        state.lines.append(f"{number}. {describe_step(step)} -> {width} x {height}")
    return state


def describe_step(step: Step) -> str:
    """Return a step with all its values in one line, sorted by name."""
    values = " ".join(f"{name}={_shown(value)}" for name, value in sorted(step.values.items()))
    return f"{step.name} {values}".strip()


def _shown(value: Scalar | tuple[Scalar, ...]) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_shown, value)) + ")"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _number(values: Values, name: str) -> int:
    return int(str(values[name]))


def _channels(state: Replay, values: Values) -> None:
    if values["order"] == "bgr":
        state.pixels_hwc = state.pixels_hwc[..., ::-1]


def _resize(state: Replay, values: Values) -> None:
    height, width = state.pixels_hwc.shape[:2]
    if "height" in values:
        height, width = _number(values, "height"), _number(values, "width")
    else:
        height, width = _by_edges(height, width, _number(values, "shortest_edge"), values.get("longest_edge"))
    if height * width > DEFAULT_MAX_PIXELS:
        raise ImageError("too-large", f"too elongated: resizing it would make {width} x {height} pixels")
    method = Image.Resampling[str(values["filter"]).upper()]
    picture = Image.fromarray(np.ascontiguousarray(state.pixels_hwc))
    state.pixels_hwc = np.asarray(picture.resize((width, height), method))


def _by_edges(height: int, width: int, shortest: int, longest: object) -> tuple[int, int]:
    """Return (height, width) with the shorter side at `shortest`, or less where the longer would exceed `longest`.

    Both are cut off to whole pixels as transformers does it: the shorter side is rounded where `longest` decides,
    the longer one is cut off from the unrounded ratio.
    """
    short, long = min(height, width), max(height, width)
    exact: float = shortest
    if isinstance(longest, int) and long / short * shortest > longest:
        exact = longest * float(short) / float(long)
    new_short, new_long = round(exact), int(exact * long / short)
    if new_short == short:
        return height, width
    return (new_short, new_long) if height <= width else (new_long, new_short)


def _centre_crop(state: Replay, values: Values) -> None:
    height, width = _number(values, "height"), _number(values, "width")
    top, left = (state.pixels_hwc.shape[0] - height) // 2, (state.pixels_hwc.shape[1] - width) // 2
    state.pixels_hwc = state.pixels_hwc[top : top + height, left : left + width]


def _rescale(state: Replay, values: Values) -> None:
    factor = float(str(values["factor"]))
    state.pixels_hwc = (state.pixels_hwc.astype(np.float64) * factor).astype(np.float32)
    state.undo.append(lambda pixels: pixels / factor)


def _normalise(state: Replay, values: Values) -> None:
    mean, std = np.array(values["mean"], dtype=np.float32), np.array(values["std"], dtype=np.float32)
    state.pixels_hwc = (state.pixels_hwc.astype(np.float32) - mean) / std
    state.undo.append(lambda pixels: pixels * std + mean)


_STEPS: dict[str, Callable[[Replay, Values], None]] = {
    "channels": _channels,
    "resize": _resize,
    "centre_crop": _centre_crop,
    "rescale": _rescale,
    "normalise": _normalise,
}


def explain(
    store: FeatureStore,
    key: str,
    images: Path,
    *,
    student: Path | None = None,
    teachers: Sequence[str] | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Page:
    """Show what each teacher of a store saw of one image, and what the student in the folder `student` sees.

    Raises StoreError where key or teacher are unknown, ImageError where the image is not the one extracted,
    ConfigError where the student's image processor cannot be used.
    """
    readers = {name: FeatureReader(store, name) for name in teachers or store.teachers()}
    sample = find_sample(store, key)
    statuses = {name: reader.status(sample.row) for name, reader in readers.items()}
    image = read_picture(images, sample, [status for status in statuses.values() if status], max_pixels)
    page = Page(f"{visible(key)}  ·  what is seen of it")
    orientation = "" if image.orientation == 1 else f"\nEXIF orientation {image.orientation}, shown as stored"
    size = f"{image.rgb.width} x {image.rgb.height}"
    cells = [Cell("image", np.asarray(image.rgb), size + orientation)]
    page.lines.append(f"image: {size}{orientation.replace(chr(10), ', ')}")
    for name, reader in readers.items():
        preprocessing = reader.fingerprint.preprocessing
        head = [
            f"{preprocessing.processor} ({preprocessing.backend}), preset {reader.fingerprint.preset}",
            f"sees {preprocessing.view.describe()}",
        ]
        picture = None
        try:
            seen = replay(preprocessing, image, teacher=name)
            picture = seen.visible
            head += seen.lines
        except ImageError as error:
            head.append(error.problem)
        status = statuses[name]
        if status is None or status.status != "ok":
            head.append("not extracted yet" if status is None else f"no feature: {status.reason or status.status}")
        cells.append(Cell(f"{name} saw", picture, "\n".join(head)))
        page.lines += [f"{name}:", *(f"  {line}" for line in head)]
    if student is not None:
        exif = any(reader.fingerprint.preprocessing.exif for reader in readers.values())
        shown, lines = _student(student, image, exif=exif)
        cells.append(Cell("the student sees", shown, "\n".join(lines)))
        page.lines += ["student:", *(f"  {line}" for line in lines)]
    page.rows.append(list(cells))
    return page


def _student(folder: Path, image: DecodedImage, *, exif: bool) -> tuple[np.ndarray, list[str]]:
    """Return what a student's processor makes of the image, to look at, and its settings.

    `exif`: the trainer turns images upright where any teacher did.
    """
    processor = _load_processor(folder)
    try:
        made = processor(images=image.oriented(exif=exif), return_tensors="np")
        pixels = np.asarray(made["pixel_values"], dtype=np.float64)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{folder}: {type(processor).__name__} does not process the image: {error}", "Check its settings."
        ) from error
    if pixels.ndim not in (4, 5) or pixels.shape[-3] != 3:
        raise ConfigError(
            f"{folder}: {type(processor).__name__} returns pixels of shape {pixels.shape}, which is no picture",
            "Give a student whose processor makes pictures, (tiles, 3, H, W).",
        )
    tiles_nchw = pixels.reshape(-1, *pixels.shape[-3:])
    tiles_nhwc = tiles_nchw.transpose(0, 2, 3, 1)
    if processor.do_normalize:
        tiles_nhwc = tiles_nhwc * np.array(processor.image_std) + np.array(processor.image_mean)
    if processor.do_rescale:
        tiles_nhwc = tiles_nhwc / processor.rescale_factor
    picture = np.concatenate(list(np.clip(np.rint(tiles_nhwc), 0, 255).astype(np.uint8)), axis=1)
    count, _, height, width = tiles_nchw.shape
    lines = [
        f"{type(processor).__name__} of {folder.name}",
        f"orient exif={str(exif).lower()} (as any teacher)",
        *(f"{name}={_setting(name, value)}" for name, value in _settings(processor)),
        f"-> {count} x {width} x {height}" if count > 1 else f"-> {width} x {height}",
    ]
    return picture, lines


def _load_processor(folder: Path) -> Any:
    """Load an image processor with its PIL backend, whatever else is installed."""
    from transformers import AutoImageProcessor
    from transformers.image_processing_backends import PilBackend

    if not folder.is_dir():
        raise ConfigError(f"--student {folder}: no such folder", "Give the folder that `olatrain compose` wrote.")
    try:
        with quiet_transformers():
            processor = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                folder, local_files_only=True, backend="pil"
            )
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()
        raise ConfigError(
            f"--student {folder}: its image processor cannot be loaded: {reason[0] if reason else error!r}",
            "Give a student's folder, with preprocessor_config.json or processor_config.json in it.",
        ) from error
    if not isinstance(processor, PilBackend):
        raise ConfigError(
            f"--student {folder}: the image processor is a {type(processor).__name__}, not computed with Pillow",
            "Choose a student whose image processor has a PIL version in transformers.",
        )
    return processor


_SHOWN_SETTINGS = (
    "do_pad", "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std",
)  # fmt: skip


def _settings(processor: Any) -> list[tuple[str, Any]]:
    """Return the settings that change pixels, without those of steps that are switched off."""
    off = {
        "do_resize": ("size", "resample"),
        "do_center_crop": ("crop_size",),
        "do_rescale": ("rescale_factor",),
        "do_normalize": ("image_mean", "image_std"),
    }
    hidden = {name for switch, names in off.items() if not getattr(processor, switch, None) for name in names}
    found = [(name, getattr(processor, name, None)) for name in _SHOWN_SETTINGS if name not in hidden]
    return [(name, value) for name, value in found if value is not None]


def _setting(name: str, value: Any) -> str:
    if name in ("size", "crop_size"):
        return " ".join(f"{side}:{length}" for side, length in dict(value).items() if length is not None)
    if name == "resample":
        return Image.Resampling(value).name.lower()
    if isinstance(value, Sequence):
        return "(" + ", ".join(f"{part:.6g}" for part in value) + ")"
    return _shown(value)
