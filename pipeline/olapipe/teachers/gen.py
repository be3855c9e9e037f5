"""The image encoder of Stable unCLIP: one projected CLIP embedding per image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from olapipe.teachers.base import Teacher, TeacherSettings, resolve_options
from olapipe.teachers.checkpoint import Checkpoint, locate, read_config, read_weights, weights_digest
from olapipe.teachers.huggingface import TorchTeacher, load_strictly, make_config, whole_number
from olapipe.teachers.preprocess import PilPreprocessor, processor_arguments, read_processor_config
from olaschema.manifest import Fingerprint

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from olapipe.teachers.registry import TeacherInfo

_ENCODER = "image_encoder"
_PROCESSOR_CONFIG = "feature_extractor/preprocessor_config.json"
_MODULE = "transformers.models.clip.image_processing_pil_clip"
_PROCESSOR = "CLIPImageProcessorPil"


def load(info: TeacherInfo, settings: TeacherSettings) -> Teacher:
    """Load `image_encoder/` and `feature_extractor/` of an unCLIP pipeline; raises TeacherError."""
    options = resolve_options(info.name, info.options, settings)
    checkpoint = locate(
        info.name, settings.checkpoint or info.published, subfolder=_ENCODER, extra=(_PROCESSOR_CONFIG,)
    )
    folder = checkpoint.path / _ENCODER
    values = read_config(
        checkpoint, folder, model_type="clip_vision_model",
        what="Stable unCLIP pipeline, with image_encoder/ and feature_extractor/ in it",
    )  # fmt: skip
    tensors = read_weights(checkpoint, folder, keep=lambda name: True)

    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config: CLIPVisionConfig = make_config(CLIPVisionConfig, values, checkpoint)
    model = load_strictly(CLIPVisionModelWithProjection, config, tensors, checkpoint)
    preprocessor = _preprocessor(
        checkpoint, image_size=whole_number(config.image_size, "image_size", checkpoint),
        channel_order=str(options["channel_order"]), exif=bool(options["exif"]),
    )  # fmt: skip
    fingerprint = Fingerprint(
        teacher=info.name,
        model_class="CLIPVisionModelWithProjection",
        weights=weights_digest(tensors),
        preset=settings.preset,
        preprocessing=preprocessor.record,
        taps=(),
        pooling="none",
        options={
            # What changes the feature but is not visible in the weights:
            "attention_heads": int(config.num_attention_heads),
            "activation": str(config.hidden_act),
            "layer_norm_eps": float(config.layer_norm_eps),
            "patch_size": whole_number(config.patch_size, "patch_size", checkpoint),
        },
        grid=None,
        channels=int(config.projection_dim),
        compute_dtype=settings.compute_dtype,
    )
    return TorchTeacher(
        ImageEmbedding(model),
        settings,
        name=info.name,
        licence=info.licence,
        source=checkpoint.source,
        preprocessor=preprocessor,
        fingerprint=fingerprint,
    )


class ImageEmbedding(torch.nn.Module):
    """The projected embedding of the whole image, `(B, C)`."""

    def __init__(self, model: CLIPVisionModelWithProjection) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        """Run the vision tower and its projection."""
        embedding_bd: torch.Tensor = self.model(pixel_values=pixels_bchw).image_embeds
        return embedding_bd


def _preprocessor(checkpoint: Checkpoint, *, image_size: int, channel_order: str, exif: bool) -> PilPreprocessor:
    config = read_processor_config(
        checkpoint,
        _PROCESSOR_CONFIG,
        expected=("CLIPImageProcessor", "CLIPImageProcessorPil", "CLIPImageProcessorFast", "CLIPFeatureExtractor"),
    )
    preprocessor = PilPreprocessor(
        module=_MODULE,
        processor=_PROCESSOR,
        arguments=processor_arguments(checkpoint, _MODULE, _PROCESSOR, config),
        squash=None,
        channel_order=channel_order,
        exif=exif,
    )
    if preprocessor.output_size != (image_size, image_size):
        raise checkpoint.error(
            f"{_PROCESSOR_CONFIG} makes images of {preprocessor.output_size}, the encoder takes {image_size}",
            "Use the feature_extractor/ that was published with the image_encoder/.",
        )
    return preprocessor
