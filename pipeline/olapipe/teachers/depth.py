"""Depth Anything V2: final-normed patch tokens of the tapped blocks, on a 24 × 24 grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from olapipe.teachers.base import Teacher, TeacherSettings, resolve_options
from olapipe.teachers.checkpoint import Checkpoint, locate, read_config, read_weights, weights_digest
from olapipe.teachers.depth_original import MEAN, STD, original_file, published_config, to_hub_names
from olapipe.teachers.huggingface import TorchTeacher, load_strictly, make_config, whole_number
from olapipe.teachers.preprocess import PilPreprocessor, processor_arguments, read_processor_config
from olaschema.manifest import Fingerprint, Scalar

if TYPE_CHECKING:
    from transformers import Dinov2Backbone, Dinov2Config

    from olapipe.teachers.registry import TeacherInfo

GRID = 24
# The grid of the public code's patches plus this, over the trained grid, is its scale factor
# (`interpolate_offset` of DINOv2, facebookresearch/dinov2).
_ORIGINAL_OFFSET = 0.1
AS_TOKENS = {"apply_layernorm": True, "reshape_hidden_states": False, "use_mask_token": False}
"""Settings of the encoder by which its taps come out as final-normed tokens, whatever the checkpoint's config has."""
_PREFIX = "backbone."
_MODULE = "transformers.models.dpt.image_processing_pil_dpt"
_PROCESSOR = "DPTImageProcessorPil"


def load(info: TeacherInfo, settings: TeacherSettings) -> Teacher:
    """Load Depth Anything V2 from the Hugging Face layout or an original `.pth`; raises TeacherError."""
    options = resolve_options(info.name, info.options, settings)
    checkpoint = locate(info.name, settings.checkpoint or info.published, extra=("preprocessor_config.json",))
    values, tensors = _read(checkpoint)
    config = _backbone_config(values, checkpoint)
    patch = whole_number(config.patch_size, "patch_size", checkpoint)
    taps = block_taps(config, pooling=options["pooling"], checkpoint=checkpoint)
    config.set_output_features_output_indices([f"stage{tap + 1}" for tap in taps], None)
    stripped = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}

    from transformers import Dinov2Backbone

    backbone = load_strictly(Dinov2Backbone, config, stripped, checkpoint)
    interpolation = str(options["position_interpolation"])
    fix_positions(backbone, grid=GRID, interpolation=interpolation)
    preprocessor = read_preprocessor(checkpoint, patch, options)
    fingerprint = Fingerprint(
        teacher=info.name,
        model_class="Dinov2Backbone",
        weights=weights_digest(tensors),
        preset=settings.preset,
        preprocessing=preprocessor.record,
        taps=taps,
        pooling="last" if options["pooling"] == "last" else "mean",
        options={"position_interpolation": interpolation, "patch_size": patch, **architecture(config)},
        grid=(GRID, GRID),
        channels=config.hidden_size,
        compute_dtype=settings.compute_dtype,
    )
    return TorchTeacher(
        PatchTokens(backbone),
        settings,
        name=info.name,
        licence=licence_of(config.hidden_size, info),
        source=checkpoint.source,
        preprocessor=preprocessor,
        fingerprint=fingerprint,
    )


class PatchTokens(torch.nn.Module):
    """Mean over the backbone's tapped blocks of their final-normed patch tokens, `(B, 24, 24, C)`."""

    def __init__(self, backbone: Dinov2Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        """Run the backbone; its class token is dropped."""
        taps_bnd = self.backbone(pixels_bchw).feature_maps
        tokens_bnd = torch.stack([tap[:, 1:].float() for tap in taps_bnd]).mean(dim=0)
        return tokens_bnd.reshape(len(tokens_bnd), GRID, GRID, -1)


def read_preprocessor(checkpoint: Checkpoint, patch: int, options: Mapping[str, Scalar]) -> PilPreprocessor:
    """Read the checkpoint's normalisation, with a squash to 24 × 24 patches; raises TeacherError.

    The published target is resized by bicubic interpolation to the size of the grid, whatever size the checkpoint's own
    processor makes for depth maps.
    """
    if original_file(checkpoint):
        config: dict[str, Any] = {"image_mean": MEAN, "image_std": STD, "resample": 3}
    else:
        config = read_processor_config(
            checkpoint,
            "preprocessor_config.json",
            expected=("DPTImageProcessor", "DPTImageProcessorPil", "DPTImageProcessorFast"),
        )
        config = config | {"resample": 3, "do_resize": True, "do_center_crop": False}
        config.pop("size", None)
    side = {"height": GRID * patch, "width": GRID * patch}
    return PilPreprocessor(
        module=_MODULE,
        processor=_PROCESSOR,
        arguments=processor_arguments(checkpoint, _MODULE, _PROCESSOR, config) | {"size": side},
        squash=None,
        channel_order=str(options["channel_order"]),
        exif=bool(options["exif"]),
        patch_multiple=patch,
    )


def fix_positions(backbone: Dinov2Backbone, *, grid: int, interpolation: str) -> None:
    """Replace the trained position embedding by the one interpolated to `grid` × `grid`, once and in float32.

    `size` interpolates to the wanted size, as transformers does in each forward pass. `scale` uses the
    original code's factor (grid + 0.1) / trained grid. Both are bicubic without antialiasing, and both leave
    a trained grid of that very size as it is.
    """
    embeddings = backbone.embeddings
    trained: torch.Tensor = embeddings.position_embeddings.detach()
    side = round((trained.shape[1] - 1) ** 0.5)
    if side == grid:
        return
    patches = trained[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if interpolation == "scale":
        factor = (grid + _ORIGINAL_OFFSET) / side
        resized = torch.nn.functional.interpolate(
            patches, scale_factor=(factor, factor), mode="bicubic", align_corners=False, antialias=False
        )
    else:
        resized = torch.nn.functional.interpolate(
            patches, size=(grid, grid), mode="bicubic", align_corners=False, antialias=False
        )
    tokens = resized.permute(0, 2, 3, 1).reshape(1, grid * grid, -1)
    embeddings.position_embeddings = torch.nn.Parameter(torch.cat((trained[:, :1], tokens), dim=1))


def _read(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return config values of the backbone and its tensors by their Hugging Face names."""
    if original := original_file(checkpoint):
        tensors = {
            name: tensor for name, tensor in to_hub_names(checkpoint, original).items() if _computes_feature(name)
        }
        if not (checkpoint.path.is_dir() and (checkpoint.path / "config.json").is_file()):
            return published_config(checkpoint, tensors), tensors
        return dict(read_described(checkpoint)["backbone_config"]), tensors
    values = dict(read_described(checkpoint)["backbone_config"])
    return values, read_weights(checkpoint, checkpoint.path, keep=_computes_feature)


def _computes_feature(name: str) -> bool:
    return name.startswith(_PREFIX) and not name.endswith(".mask_token")


def read_described(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the values of config.json; raises TeacherError unless its backbone is a DINOv2."""
    config = read_config(checkpoint, checkpoint.path, model_type="depth_anything", what="Depth Anything V2 checkpoint")
    values = config.get("backbone_config")
    found = values.get("model_type") if isinstance(values, Mapping) else None
    if not isinstance(values, Mapping) or found != "dinov2":
        raise checkpoint.error(
            f"its backbone_config is of type {found!r}, expected 'dinov2'", "Pass a Depth Anything V2 checkpoint."
        )
    return config


def _backbone_config(values: dict[str, Any], checkpoint: Checkpoint) -> Dinov2Config:
    from transformers import Dinov2Config

    config: Dinov2Config = make_config(Dinov2Config, values | AS_TOKENS, checkpoint)
    return config


def block_taps(config: Dinov2Config, *, pooling: Scalar, checkpoint: Checkpoint) -> tuple[int, ...]:
    """Return the tapped blocks, 0-based; raises TeacherError where the config names the embedding."""
    stages = [int(index) for index in config.out_indices]
    if not stages or min(stages) < 1:  # stage 0 is the embedding, stage i the output of block i - 1
        raise checkpoint.error(
            f"backbone_config.out_indices is {stages}: stage 0 is no block", "Use the published config.json."
        )
    taps = tuple(stage - 1 for stage in stages)
    return taps[-1:] if pooling == "last" else taps


def licence_of(width: int, info: TeacherInfo) -> str:
    """Return the licence of a model of that width: ViT-S was published under Apache-2.0, larger ones are not."""
    return "Apache-2.0" if width == 384 else info.licence


def architecture(config: Dinov2Config) -> dict[str, Scalar]:
    """Return what changes the feature but is not visible in the weights."""
    return {
        "attention_heads": int(config.num_attention_heads),
        "activation": str(config.hidden_act),
        "layer_norm_eps": float(config.layer_norm_eps),
    }
