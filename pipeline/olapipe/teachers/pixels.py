"""Preprocessing by a checkpoint's own processor class, or by ours where it has no PIL one; other views and sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from olapipe.teachers.checkpoint import Checkpoint
from olapipe.teachers.preprocess import PilPreprocessor, processor_arguments, read_processor_config
from olaschema.images import DecodedImage
from olaschema.manifest import Scalar

CONFIG = "preprocessor_config.json"
OURS = "olapipe"
# A PIL class with a preprocessing of its own, which for a whole image (no tiles) is the usual one.
_USUAL_FOR_WHOLE_IMAGES = ("GotOcr2ImageProcessorPil",)
_NAME = re.compile(r"(?P<stem>\w+?)(ImageProcessor(Fast|Pil)?|FeatureExtractor)")
_USUAL_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
_NEEDED = ("size", "resample", "rescale_factor", "image_mean", "image_std")


@dataclass(frozen=True)
class OwnPreprocessor(PilPreprocessor):
    """The same steps without a class of transformers: Pillow resizes and crops, numpy rescales and normalises."""

    def __call__(self, image: DecodedImage) -> np.ndarray:
        """Return float32 pixels `(3, H, W)`; raises ImageError for an image too elongated to be resized."""
        given = self.arguments
        picture = image.oriented(exif=self.exif)
        self._refuse_elongated(picture)
        picture = picture.resize(self._resized(picture.size), Image.Resampling(given["resample"]))
        if given["do_center_crop"]:
            height, width = self.output_size
            left, top = (picture.width - width) // 2, (picture.height - height) // 2
            picture = picture.crop((left, top, left + width, top + height))
        pixels_hwc = np.asarray(picture, dtype=np.float64)
        if self.channel_order == "bgr":
            pixels_hwc = pixels_hwc[..., ::-1]
        if given["do_rescale"]:
            pixels_hwc = pixels_hwc * given["rescale_factor"]
        if given["do_normalize"]:
            pixels_hwc = (pixels_hwc - given["image_mean"]) / given["image_std"]
        return np.ascontiguousarray(pixels_hwc.transpose(2, 0, 1), dtype=np.float32)

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        wanted = self.arguments["size"]
        if "height" in wanted:
            return wanted["width"], wanted["height"]
        shortest, short = wanted["shortest_edge"], min(size)
        width, height = (int(shortest * side / short) for side in size)
        return width, height


def own_arguments(side: int, *, resample: Image.Resampling, mean: float, std: float) -> dict[str, Any]:
    """Return the settings of a preprocessing that squashes to `side` × `side` and normalises all channels alike."""
    return {
        "do_resize": True, "size": {"height": side, "width": side}, "resample": int(resample),
        "do_center_crop": False, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [mean] * 3, "image_std": [std] * 3,
    }  # fmt: skip


def read_preprocessor(
    checkpoint: Checkpoint, options: Mapping[str, Scalar], *, expected: tuple[str, ...] = ()
) -> PilPreprocessor:
    """Read a checkpoint's preprocessing, with the view and size that the options ask for.

    The PIL class of transformers is used where there is one, else ours with the values of the file. `expected`
    are the processor types accepted; none: all. Raises TeacherError where the file is missing or asks for a step
    that cannot be done and recorded exactly.
    """
    config = read_processor_config(checkpoint, CONFIG, expected=expected)
    further = sorted(k for k, v in config.items() if k.startswith("do_") and v and k not in _USUAL_STEPS)
    if further:
        steps = ", ".join(further)
        raise checkpoint.error(f"{CONFIG} asks for {steps}, which is not supported", _elsewhere(checkpoint))
    found = config.get("image_processor_type") or config.get("feature_extractor_type")
    module, processor = _pil_class(checkpoint, str(found))
    if processor == OURS:
        arguments = _explicit_arguments(checkpoint, config)
    else:
        arguments = processor_arguments(checkpoint, module, processor, config, square_input=options["view"] != "own")
    cls = OwnPreprocessor if processor == OURS else PilPreprocessor
    return cls(
        module=module,
        processor=processor,
        arguments=see(arguments, view=str(options["view"]), side=_side(options["image_size"])),
        squash=None,
        channel_order=str(options["channel_order"]),
        exif=bool(options["exif"]),
    )


def see(arguments: Mapping[str, Any], *, view: str, side: int | None) -> dict[str, Any]:
    """Change the settings to another view and side; `own` keeps the checkpoint's geometry, in proportion."""
    size, crop = arguments["size"], arguments.get("crop_size")
    own = crop["height"] if crop else size.get("height") or size["shortest_edge"]
    wanted = side or own
    square = {"height": wanted, "width": wanted}
    if view == "own":
        scaled = {name: round(value * wanted / own) for name, value in size.items()}
        return {**arguments, "size": scaled} | ({"crop_size": square} if crop else {})
    without = {name: value for name, value in arguments.items() if name != "crop_size"}
    if view == "squash":
        return without | {"size": square, "do_center_crop": False}
    return without | {"size": {"shortest_edge": wanted}, "do_center_crop": True, "crop_size": square}


def _side(value: Scalar) -> int | None:
    return None if value == "own" else int(value)


def _pil_class(checkpoint: Checkpoint, found: str) -> tuple[str, str]:
    """Return module and name of the PIL class for a processor type, or ours where transformers has none."""
    import transformers

    match = _NAME.fullmatch(found)
    if match is None:
        raise checkpoint.error(f"{CONFIG} is for {found}, which is no image processor", _elsewhere(checkpoint))
    name = f"{match['stem']}ImageProcessorPil"
    cls = getattr(transformers, name, None)
    if cls is None:
        return "", OURS
    from transformers.image_processing_backends import PilBackend

    steps = ("preprocess", "_preprocess", "resize", "center_crop", "rescale", "normalize")
    usual = all(getattr(cls, step) is getattr(PilBackend, step) for step in steps)
    if not usual and name not in _USUAL_FOR_WHOLE_IMAGES:
        raise checkpoint.error(f"{name} has steps of its own, which cannot be recorded exactly", _elsewhere(checkpoint))
    return str(cls.__module__), name


def _explicit_arguments(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the file states; a class that cannot be imported has no defaults to ask for."""
    needed = (*_NEEDED, "crop_size") if config.get("do_center_crop") else _NEEDED
    missing = [name for name in needed if config.get(name) is None]
    if missing:
        raise checkpoint.error(
            f"{CONFIG} leaves {', '.join(missing)} to the defaults of a class that cannot be used here",
            "Write the values into the file.",
        )
    steps = {name: bool(config.get(name)) for name in _USUAL_STEPS if name != "do_convert_rgb"}
    # CLIP's class has these very steps; it serves to check the values and to spell them out.
    return processor_arguments(
        checkpoint, "transformers.models.clip.image_processing_pil_clip", "CLIPImageProcessorPil", {**config, **steps}
    )


def _elsewhere(checkpoint: Checkpoint) -> str:
    return f"Register a teacher of your own as a plug-in; {checkpoint.teacher} takes the usual steps only."
