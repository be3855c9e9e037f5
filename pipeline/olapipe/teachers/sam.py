"""Segment Anything's image encoder: the output of its neck, `(B, 64, 64, 256)` for the published models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from olapipe.teachers.base import Teacher, TeacherSettings, resolve_options
from olapipe.teachers.checkpoint import locate, read_config, read_weights, weights_digest
from olapipe.teachers.huggingface import TorchTeacher, load_strictly, make_config, whole_number
from olapipe.teachers.pixels import CONFIG, OURS, OwnPreprocessor
from olapipe.teachers.preprocess import processor_arguments, read_processor_config
from olaschema.manifest import Fingerprint

if TYPE_CHECKING:
    from transformers import SamVisionConfig, SamVisionModel

    from olapipe.teachers.info import TeacherInfo

_TENSOR = re.compile(r"vision_encoder\.")


def load(info: TeacherInfo, settings: TeacherSettings) -> Teacher:
    """Load the image encoder of a SAM checkpoint; raises TeacherError.

    The authors scale the longer side to the input's and fill the rest below or to the right. Here the image is
    squashed to the square, so that every cell of the map sees the image.
    """
    from transformers import SamVisionConfig, SamVisionModel

    options = resolve_options(info.name, info.options, settings)
    checkpoint = locate(info.name, settings.checkpoint or info.published, extra=(CONFIG,))
    values = read_config(checkpoint, checkpoint.path, model_type=("sam", "sam_vision_model"), what="SAM checkpoint")
    inner = values.get("vision_config")
    config: SamVisionConfig = make_config(SamVisionConfig, inner if isinstance(inner, Mapping) else values, checkpoint)
    side = whole_number(config.image_size, "image_size", checkpoint)
    patch = whole_number(config.patch_size, "patch_size", checkpoint)
    tensors = read_weights(checkpoint, checkpoint.path, keep=lambda name: _TENSOR.match(name) is not None)
    model = load_strictly(SamVisionModel, config, tensors, checkpoint)
    preprocessor = OwnPreprocessor(
        module="", processor=OURS, arguments=_arguments(checkpoint, side), squash=None,
        channel_order=str(options["channel_order"]), exif=bool(options["exif"]),
    )  # fmt: skip
    fingerprint = Fingerprint(
        teacher=info.name,
        model_class="SamVisionModel",
        weights=weights_digest(tensors),
        preset=settings.preset,
        preprocessing=preprocessor.record,
        taps=(),
        pooling="none",
        options={
            "attention_heads": int(config.num_attention_heads),
            "activation": str(config.hidden_act),
            "layer_norm_eps": float(config.layer_norm_eps),
            "window_size": int(config.window_size),
            "global_attention": ",".join(str(block) for block in config.global_attn_indexes),
        },
        grid=(side // patch, side // patch),
        channels=int(config.output_channels),
        compute_dtype=settings.compute_dtype,
    )
    return TorchTeacher(
        Neck(model),
        settings,
        name=info.name,
        licence=info.licence,
        source=checkpoint.source,
        preprocessor=preprocessor,
        fingerprint=fingerprint,
    )


class Neck(torch.nn.Module):
    """The encoder's output after its neck, channels last, `(B, h, w, C)`."""

    def __init__(self, model: SamVisionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        """Run the image encoder; prompts and masks play no part in it."""
        map_bchw: torch.Tensor = self.model(pixel_values=pixels_bchw).last_hidden_state
        return map_bchw.permute(0, 2, 3, 1)


def _arguments(checkpoint: Any, side: int) -> dict[str, Any]:
    """Return filter and normalisation of the checkpoint's processor, with a squash to the encoder's input."""
    config = read_processor_config(
        checkpoint, CONFIG, expected=("SamImageProcessor", "SamImageProcessorPil", "SamImageProcessorFast")
    )
    return processor_arguments(
        checkpoint, "transformers.models.sam.image_processing_pil_sam", "SamImageProcessorPil",
        config | {"size": {"height": side, "width": side}},
    )  # fmt: skip
