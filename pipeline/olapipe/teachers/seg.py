"""OneFormer with a Swin backbone: its last backbone map, resized to 24 × 24."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from olapipe.teachers.base import Teacher, TeacherSettings, resolve_options
from olapipe.teachers.checkpoint import Checkpoint, locate, read_config, read_weights, weights_digest
from olapipe.teachers.huggingface import TorchTeacher, load_strictly, make_config
from olapipe.teachers.preprocess import PilPreprocessor, processor_arguments, read_processor_config
from olaschema.manifest import Fingerprint

if TYPE_CHECKING:
    from transformers import SwinBackbone, SwinConfig

    from olapipe.teachers.registry import TeacherInfo

GRID = 24
SQUASH = 768
_PREFIX = "model.pixel_level_module.encoder."
_STAGE_NORM = re.compile(r"^hidden_states_norms\.stage(\d+)\.")
_FINAL_NORM = re.compile(r"^(swin\.)?layernorm\.")  # of Swin as a classifier; no backbone map passes it
_MODULE = "transformers.models.oneformer.image_processing_pil_oneformer"
_PROCESSOR = "OneFormerImageProcessorPil"


def load(info: TeacherInfo, settings: TeacherSettings) -> Teacher:
    """Load the Swin backbone of a OneFormer checkpoint; raises TeacherError."""
    options = resolve_options(info.name, info.options, settings)
    checkpoint = locate(info.name, settings.checkpoint or info.published, extra=("preprocessor_config.json",))
    config = _backbone_config(checkpoint)
    stages = len(config.depths)
    config.set_output_features_output_indices([f"stage{stages}"], None)
    tensors = read_weights(checkpoint, checkpoint.path, keep=lambda name: _computes_feature(name, last_stage=stages))
    stripped = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}

    from transformers import SwinBackbone

    backbone = load_strictly(SwinBackbone, config, stripped, checkpoint)
    preprocessor = _preprocessor(checkpoint, channel_order=str(options["channel_order"]), exif=bool(options["exif"]))
    fingerprint = Fingerprint(
        teacher=info.name,
        model_class="SwinBackbone",
        weights=weights_digest(tensors),
        preset=settings.preset,
        preprocessing=preprocessor.record,
        taps=(stages - 1,),
        pooling="none",
        options={
            "grid_interpolation": "bilinear",
            # What changes the feature but is not visible in the weights:
            "attention_heads": ",".join(str(heads) for heads in config.num_heads),
            "window_size": int(config.window_size),
            "activation": str(config.hidden_act),
            "layer_norm_eps": float(config.layer_norm_eps),
        },
        grid=(GRID, GRID),
        channels=int(config.embed_dim * 2 ** (stages - 1)),
        compute_dtype=settings.compute_dtype,
    )
    return TorchTeacher(
        LastMap(backbone),
        settings,
        name=info.name,
        licence=info.licence,
        source=checkpoint.source,
        preprocessor=preprocessor,
        fingerprint=fingerprint,
    )


class LastMap(torch.nn.Module):
    """The backbone's last map, resized bilinearly (no aligned corners) to the grid, `(B, 24, 24, C)`."""

    def __init__(self, backbone: SwinBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        """Run the backbone alone: neither pixel decoder nor queries are needed."""
        map_bchw = self.backbone(pixels_bchw).feature_maps[-1].float()
        resized = torch.nn.functional.interpolate(map_bchw, size=(GRID, GRID), mode="bilinear", align_corners=False)
        return resized.permute(0, 2, 3, 1)


def _backbone_config(checkpoint: Checkpoint) -> SwinConfig:
    from transformers import SwinConfig

    config = read_config(checkpoint, checkpoint.path, model_type="oneformer", what="OneFormer checkpoint")
    values = config.get("backbone_config")
    found = values.get("model_type") if isinstance(values, Mapping) else None
    if not isinstance(values, Mapping) or found != "swin":
        raise checkpoint.error(
            f"its backbone_config is of type {found!r}, expected 'swin'",
            "Pass a OneFormer checkpoint with a Swin backbone.",
        )
    swin: SwinConfig = make_config(SwinConfig, values, checkpoint)
    return swin


def _computes_feature(name: str, *, last_stage: int) -> bool:
    if not name.startswith(_PREFIX):
        return False
    inner = name.removeprefix(_PREFIX)
    norm = _STAGE_NORM.match(inner)
    if norm is not None:
        return int(norm.group(1)) == last_stage
    return not inner.endswith(".mask_token") and _FINAL_NORM.match(inner) is None


def _preprocessor(checkpoint: Checkpoint, *, channel_order: str, exif: bool) -> PilPreprocessor:
    """Squash to 768 × 768, then the checkpoint's own processor.

    Its class list is left out on purpose: the processor would fetch it from a hub, and it only names labels.
    """
    config: dict[str, Any] = read_processor_config(
        checkpoint,
        "preprocessor_config.json",
        expected=("OneFormerImageProcessor", "OneFormerImageProcessorPil", "OneFormerImageProcessorFast"),
    )
    return PilPreprocessor(
        module=_MODULE,
        processor=_PROCESSOR,
        arguments=processor_arguments(checkpoint, _MODULE, _PROCESSOR, config, square_input=True),
        squash=SQUASH,
        channel_order=channel_order,
        exif=exif,
    )
