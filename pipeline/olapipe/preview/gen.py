"""The image that Stable unCLIP draws from a stored embedding. diffusers is an optional extra."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np
import torch

from olapipe.preview.base import Decoder, Drawing, Unavailable
from olapipe.teachers.checkpoint import locate
from olapipe.teachers.huggingface import quiet_transformers
from olaschema.manifest import Fingerprint

SEED = 0
STEPS = 20
_PARTS = (
    "image_normalizer", "image_noising_scheduler", "tokenizer", "text_encoder", "unet", "scheduler", "vae",
)  # fmt: skip


class GenDecoder(Decoder[np.ndarray]):
    """The unCLIP pipeline with an empty prompt, one seed and no noise on the embedding: uint8 `(H, W, 3)`."""

    def __init__(self, pipeline: Any, device: torch.device) -> None:
        self._pipeline = pipeline.to(device)
        self._pipeline.set_progress_bar_config(disable=True)
        self._device = device

    def full(self, pixels_chw: np.ndarray) -> np.ndarray:
        """Return the image drawn from the embedding of preprocessed pixels."""
        with torch.inference_mode():
            pixels_bchw = torch.from_numpy(pixels_chw)[None].to(self._device)
            embedding_bd: torch.Tensor = self._pipeline.image_encoder(pixels_bchw).image_embeds
        return self.decode(embedding_bd[0].cpu().numpy())

    def decode(self, feature: np.ndarray, pixels_chw: np.ndarray | None = None) -> np.ndarray:
        """Return the image drawn from an embedding `(C,)`, the same for the same embedding."""
        drawn = self._pipeline(
            image_embeds=torch.from_numpy(feature)[None].to(self._device),
            prompt="",
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(SEED),
        )
        return np.asarray(drawn.images[0].convert("RGB"))

    def draw(self, output: np.ndarray) -> Drawing:
        """Return the image itself."""
        return Drawing(output, f"drawn by unCLIP, {STEPS} steps, seed {SEED}")

    def agreement(self, full: np.ndarray, decoded: np.ndarray) -> str:
        """Mean absolute difference of the two drawings."""
        difference = np.abs(full.astype(np.int16) - decoded).mean()
        return f"differs from the drawing of the image's own embedding by {difference:.2f} of 255 on average"


def load(checkpoint: str, fingerprint: Fingerprint, device: torch.device) -> GenDecoder:
    """Load a whole Stable unCLIP pipeline in float32 from local files.

    Raises Unavailable without diffusers or without the parts beside the image encoder.
    """
    name = fingerprint.teacher
    if importlib.util.find_spec("diffusers") is None:
        raise Unavailable(
            f"{name}: diffusers is not installed, so no image can be drawn from the embedding",
            "Install the extra: pip install 'ola-distill[diffusion]'",
        )
    found = locate(name, checkpoint, subfolder="image_encoder")
    missing = [part for part in _PARTS if not (found.path / part).is_dir()]
    if missing:
        raise Unavailable(
            f"{name}: {found.path} has no {', '.join(part + '/' for part in missing)}: "
            "with the image encoder alone no image can be drawn",
            "Pass the folder of the whole Stable unCLIP pipeline.",
        )
    with quiet_transformers():
        pipelines: Any = importlib.import_module("diffusers")
        pipelines.utils.logging.disable_progress_bar()
        try:
            # by default diffusers looks for accelerate, and advises to install it where it is missing
            pipeline = pipelines.StableUnCLIPImg2ImgPipeline.from_pretrained(
                found.path, local_files_only=True, low_cpu_mem_usage=False
            )
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise found.error(
                f"does not load as a Stable unCLIP pipeline: {error}", "Download it again, in full."
            ) from error
    return GenDecoder(pipeline, device)
