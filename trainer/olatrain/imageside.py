"""The image side of a composed or imported student's processor: a square, and the tower's own mean and filter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.image_processing_backends import PilBackend
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from olaschema.errors import ConfigError
from olatrain.convnext import image_settings
from olatrain.weights import read_json


def square(config: Any, folder: Path) -> tuple[int, int]:
    """Return the side of a tower's input and of what one of its vectors stands for, in pixels."""
    size, patch = config.image_size, config.patch_size
    if not isinstance(size, int) or not isinstance(patch, int):
        raise ConfigError(
            f"{folder}: image size {size} and patch size {patch} are not squares", "Choose another tower."
        )
    if config.model_type == "convnext":
        patch *= 2 ** (config.num_stages - 1)
    return size, patch


def make_image_processor(vision: Path, size: int, view: str) -> PilBackend:
    """Make CLIP's preprocessing with the tower's mean, standard deviation and filter where its folder names them."""
    kept: dict[str, Any] = image_settings(vision)
    path = vision / "preprocessor_config.json"
    if path.is_file():
        found = read_json(path)
        kept = {k: found[k] for k in ("image_mean", "image_std", "resample", "rescale_factor") if k in found}
    sides = {"height": size, "width": size}
    if view == "crop":
        return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=sides, do_center_crop=True, **kept)
    if view == "squash":
        return CLIPImageProcessorPil(size=sides, crop_size=sides, do_center_crop=False, **kept)
    if view == "pad":
        return LlavaImageProcessorPil(size=sides, crop_size=sides, do_center_crop=False, do_pad=True, **kept)
    raise ConfigError(f"view {view!r} is unknown", "Choose squash, crop or pad.")
