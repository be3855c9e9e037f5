"""Preprocessing through the PIL image processors of transformers, with a record of every value."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from olapipe.teachers.base import Preprocessor
from olapipe.teachers.checkpoint import Checkpoint
from olaschema.errors import ImageError
from olaschema.images import DEFAULT_MAX_PIXELS, DecodedImage
from olaschema.manifest import Preprocessing, Scalar, Step, View

# The keys of preprocessor_config.json that change pixels; every other key is about labels or versions.
_PIXEL_KEYS = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std",
)  # fmt: skip
_PUBLISHED = "Use the preprocessor_config.json that was published with the checkpoint."


@dataclass(frozen=True)
class PilPreprocessor(Preprocessor):
    """Orientation, an optional squash to a square by Pillow, then one PIL image processor of transformers.

    `module` and `processor` name the processor's class: naming it (instead of asking an Auto class) fixes
    the backend, whatever else is installed. `arguments` are all its settings, resolved to plain values.
    """

    module: str
    processor: str
    arguments: Mapping[str, Any]
    squash: int | None
    channel_order: str
    exif: bool
    patch_multiple: int | None = None
    """The multiple that DPT's processor rounds sizes to; None for the other processors."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave the built processor behind: it is made again where the copy is used."""
        return {name: value for name, value in self.__dict__.items() if name != "_built"}

    @cached_property
    def _built(self) -> Any:
        keyword: dict[str, Any] = dict(self.arguments)
        if self.patch_multiple is not None:
            keyword |= {"keep_aspect_ratio": False, "ensure_multiple_of": self.patch_multiple}
        return processor_class(self.module, self.processor)(**keyword)

    @property
    def output_size(self) -> tuple[int, int]:
        """(H, W) of the pixels, the same for every image."""
        if self.arguments["do_center_crop"]:
            crop = self.arguments["crop_size"]
            return crop["height"], crop["width"]
        size = self.arguments["size"]
        if "height" in size:
            return size["height"], size["width"]
        side = min(size["shortest_edge"], size.get("longest_edge") or size["shortest_edge"])
        return side, side

    @property
    def view(self) -> View:
        """Which part of the image is seen."""
        size = self.arguments["size"]
        if self.squash is not None or "height" in size:
            return View(kind="squash")
        return View(kind="crop", fraction=self.output_size[0] / size["shortest_edge"])

    @property
    def record(self) -> Preprocessing:
        """Every step with every value that changes pixels, in the order applied."""
        given = self.arguments
        steps = [Step(name="orient", values={"exif": self.exif})]
        if self.squash is not None:
            values: dict[str, Scalar | tuple[Scalar, ...]] = {"height": self.squash, "width": self.squash}
            steps.append(Step(name="resize", values=values | {"filter": "bicubic", "library": "pillow"}))
        steps.append(Step(name="channels", values={"order": self.channel_order}))
        if given["do_resize"]:
            name = Image.Resampling(given["resample"]).name.lower()
            steps.append(Step(name="resize", values={**given["size"], "filter": name, "library": "pillow"}))
        if given["do_center_crop"]:
            steps.append(Step(name="centre_crop", values=given["crop_size"]))
        if given["do_rescale"]:
            steps.append(Step(name="rescale", values={"factor": given["rescale_factor"]}))
        if given["do_normalize"]:
            values = {"mean": tuple(given["image_mean"]), "std": tuple(given["image_std"])}
            steps.append(Step(name="normalise", values=values))
        return Preprocessing(
            processor=self.processor,
            backend="pil",
            channel_order="bgr" if self.channel_order == "bgr" else "rgb",
            exif=self.exif,
            view=self.view,
            steps=tuple(steps),
        )

    def __call__(self, image: DecodedImage) -> np.ndarray:
        """Return float32 pixels `(3, H, W)`; raises ImageError for an image too elongated to be resized."""
        picture = image.oriented(exif=self.exif)
        if self.squash is not None:
            picture = picture.resize((self.squash, self.squash), Image.Resampling.BICUBIC)
        self._refuse_elongated(picture)
        pixels_hwc = np.asarray(picture)
        if self.channel_order == "bgr":
            pixels_hwc = pixels_hwc[..., ::-1]
        # The layout is named because a picture 3 pixels high would be taken for channels first.
        batch = self._built.preprocess(images=[pixels_hwc], input_data_format="channels_last", return_tensors="np")
        return np.ascontiguousarray(batch["pixel_values"][0], dtype=np.float32)

    def _refuse_elongated(self, picture: Image.Image) -> None:
        shortest = self.arguments["size"].get("shortest_edge")
        if not self.arguments["do_resize"] or shortest is None:
            return
        scale = shortest / min(picture.size)
        if picture.width * picture.height * scale * scale > DEFAULT_MAX_PIXELS:
            raise ImageError(
                "too-large",
                f"an image of {picture.width} × {picture.height} becomes larger than "
                f"{DEFAULT_MAX_PIXELS / 1e6:g} megapixels when its shorter side is resized to {shortest}",
                "Leave images this elongated out of the corpus.",
            )


def processor_class(module: str, name: str) -> Any:
    """Return an image processor class of transformers by its module and name."""
    return getattr(importlib.import_module(module), name)


def read_processor_config(checkpoint: Checkpoint, name: str, *, expected: tuple[str, ...]) -> dict[str, Any]:
    """Read a checkpoint's `preprocessor_config.json` and check that it is for one of the `expected` processors.

    An empty `expected` accepts every one. Raises TeacherError where it is missing, no JSON, or for another processor.
    """
    try:
        config = json.loads((checkpoint.path / name).read_text(encoding="utf-8"))
        found = config.get("image_processor_type") or config.get("feature_extractor_type")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise checkpoint.error(
            f"has no {name}",
            "Copy it from the published checkpoint: it holds the resize filter and the normalisation.",
        ) from error
    except (OSError, ValueError, AttributeError) as error:
        raise checkpoint.error(f"{name} is not a JSON object: {error}", "Download it again.") from error
    if expected and found not in expected:
        raise checkpoint.error(f"{name} is for {found}, expected {' or '.join(expected)}", _PUBLISHED)
    return dict(config)


def processor_arguments(
    checkpoint: Checkpoint, module: str, name: str, config: Mapping[str, Any], *, square_input: bool = False
) -> dict[str, Any]:
    """Resolve a processor's settings to plain values: the config's, else the defaults of its class.

    Older configs give sizes as one number; the class itself says what it means by that.
    `square_input` says that the processor is given squares. Raises TeacherError for values that are not
    usable, or by which images would not all come out in one size.
    """
    given = {key: config[key] for key in _PIXEL_KEYS if config.get(key) is not None}
    try:
        built = processor_class(module, name)(**given)
        arguments: dict[str, Any] = {
            "do_resize": bool(built.do_resize),
            "size": {key: int(value) for key, value in dict(built.size).items()},
            "resample": int(built.resample),
            "do_center_crop": bool(built.do_center_crop),
            "do_rescale": bool(built.do_rescale),
            "rescale_factor": float(built.rescale_factor),
            "do_normalize": bool(built.do_normalize),
            "image_mean": [float(value) for value in built.image_mean],
            "image_std": [float(value) for value in built.image_std],
        }
        if arguments["do_center_crop"]:
            arguments["crop_size"] = {key: int(value) for key, value in dict(built.crop_size).items()}
        Image.Resampling(arguments["resample"])
    except (TypeError, ValueError) as error:
        raise checkpoint.error(f"the image processor's settings are not usable: {error}", _PUBLISHED) from error
    if problem := _problem(arguments, square_input=square_input):
        raise checkpoint.error(f"the image processor's settings are not usable: {problem}", _PUBLISHED)
    return arguments


def _problem(arguments: Mapping[str, Any], *, square_input: bool) -> str | None:
    size, crop = arguments["size"], arguments.get("crop_size")
    if len(arguments["image_mean"]) != 3 or len(arguments["image_std"]) != 3 or 0 in arguments["image_std"]:
        return "image_mean and image_std need three values each, and no deviation of 0"
    if not arguments["do_resize"]:
        return "do_resize is off, so images would differ in size"
    if min(size.values()) < 1 or not (set(size) == {"height", "width"} or "shortest_edge" in size):
        return f"size {size} is neither height and width nor shortest_edge"
    if crop is None:
        varying = "shortest_edge" in size and not square_input
        return "neither a fixed size nor a centre crop is set, so images would differ in size" if varying else None
    if set(crop) != {"height", "width"} or crop["height"] != crop["width"] or "shortest_edge" not in size:
        return f"crop_size {crop} after size {size}: only a centred square after shortest_edge is supported"
    if crop["height"] > size["shortest_edge"]:
        return f"crop_size {crop} is larger than size {size}"
    return None
