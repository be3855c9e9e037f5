"""Depth Anything V2's answer as a target: the depth map itself, several means to each cell of a 24 × 24 grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from olapipe.teachers.base import Teacher, TeacherSettings, resolve_options
from olapipe.teachers.checkpoint import Checkpoint, locate, read_weights, weights_digest
from olapipe.teachers.depth import (
    AS_TOKENS,
    GRID,
    architecture,
    block_taps,
    fix_positions,
    licence_of,
    read_described,
    read_preprocessor,
)
from olapipe.teachers.depth_original import (
    head_config,
    head_to_hub_names,
    original_file,
    published_config,
    to_hub_names,
)
from olapipe.teachers.huggingface import TorchTeacher, load_strictly, make_config, whole_number
from olaschema.manifest import Fingerprint

if TYPE_CHECKING:
    from transformers import DepthAnythingForDepthEstimation

    from olapipe.teachers.info import TeacherInfo


def load(info: TeacherInfo, settings: TeacherSettings) -> Teacher:
    """Load encoder, neck and head, from the Hugging Face layout or an original `.pth`; raises TeacherError."""
    options = resolve_options(info.name, info.options, settings)
    checkpoint = locate(info.name, settings.checkpoint or info.published, extra=("preprocessor_config.json",))
    interpolation, parts = str(options["position_interpolation"]), int(options["parts"])
    model, tensors = whole_model(checkpoint, interpolation=interpolation)
    config: Any = model.config
    backbone = config.backbone_config
    patch = whole_number(backbone.patch_size, "patch_size", checkpoint)
    preprocessor = read_preprocessor(checkpoint, patch, options)
    fingerprint = Fingerprint(
        teacher=info.name,
        model_class="DepthAnythingForDepthEstimation",
        weights=weights_digest(tensors),
        preset=settings.preset,
        preprocessing=preprocessor.record,
        taps=block_taps(backbone, pooling="mean", checkpoint=checkpoint),
        pooling="none",
        options={
            "parts": parts,
            "scale": options["scale"],
            "position_interpolation": interpolation,
            "patch_size": patch,
            **architecture(backbone),
            "reassemble_factors": ",".join(f"{factor:g}" for factor in config.reassemble_factors),
            "head_in_index": int(config.head_in_index),
            "depth_estimation_type": str(config.depth_estimation_type),
            "max_depth": float(config.max_depth),
        },
        grid=(GRID, GRID),
        channels=parts**2,
        compute_dtype=settings.compute_dtype,
    )
    return TorchTeacher(
        DepthMap(model, parts, per_image=options["scale"] == "image"),
        settings,
        name=info.name,
        licence=licence_of(backbone.hidden_size, info),
        source=checkpoint.source,
        preprocessor=preprocessor,
        fingerprint=fingerprint,
    )


class DepthMap(torch.nn.Module):
    """Means of the model's answer over `parts` × `parts` areas of each cell, by rows, `(B, 24, 24, parts²)`."""

    def __init__(self, model: DepthAnythingForDepthEstimation, parts: int, *, per_image: bool) -> None:
        super().__init__()
        self.model = model
        self.parts = parts
        self.per_image = per_image

    def forward(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        """Run encoder, neck and head."""
        depth_bhw = self.model(pixels_bchw).predicted_depth.float()
        if self.per_image:
            depth_bhw = centred(depth_bhw)
        means_bhw = functional.adaptive_avg_pool2d(depth_bhw[:, None], GRID * self.parts)[:, 0]
        cells = means_bhw.reshape(-1, GRID, self.parts, GRID, self.parts).transpose(2, 3)
        return cells.reshape(-1, GRID, GRID, self.parts**2)


def centred(depth_bhw: torch.Tensor) -> torch.Tensor:
    """Take each map's median off and divide by its mean absolute deviation from it; a constant map gives zeros.

    A relative depth is known up to a scale and a shift for each image, and this is how MiDaS aligns two of them
    (arXiv 1907.01341, section 5).
    """
    off_bhw = depth_bhw - depth_bhw.flatten(1).median(dim=1).values[:, None, None]
    deviation_b = off_bhw.abs().mean(dim=(1, 2))
    return off_bhw / deviation_b.clamp_min(torch.finfo(torch.float32).tiny)[:, None, None]


def whole_model(
    checkpoint: Checkpoint, *, interpolation: str
) -> tuple[DepthAnythingForDepthEstimation, dict[str, torch.Tensor]]:
    """Return encoder, neck and head, and the tensors they were loaded from; raises TeacherError.

    The position embedding is interpolated once to 24 × 24 patches, as `depth` does.
    """
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation

    values, tensors = _read(checkpoint)
    values = {**values, "backbone_config": {**values["backbone_config"], **AS_TOKENS}}
    if values.get("max_depth") is None:  # as files of relative depth may have it
        values.pop("max_depth", None)
    config: Any = make_config(DepthAnythingConfig, values, checkpoint)
    model = load_strictly(DepthAnythingForDepthEstimation, config, tensors, checkpoint)
    fix_positions(model.backbone, grid=GRID, interpolation=interpolation)
    return model, tensors


def _read(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the config's values and all tensors that compute depth, by their Hugging Face names."""
    original = original_file(checkpoint)
    if original is None:
        return read_described(checkpoint), read_weights(checkpoint, checkpoint.path, keep=_computes_depth)
    encoder = {name: tensor for name, tensor in to_hub_names(checkpoint, original).items() if _computes_depth(name)}
    head = head_to_hub_names(checkpoint, original)
    if checkpoint.path.is_dir() and (checkpoint.path / "config.json").is_file():
        return read_described(checkpoint), encoder | head
    if "metric" in original.name:
        raise checkpoint.error(
            f"{original.name} tells metric depth, and up to which distance does not stand in it",
            "Pass its Hugging Face folder, or put that one's config.json beside the file.",
        )
    backbone = published_config(checkpoint, encoder)
    return {"backbone_config": {"model_type": "dinov2", **backbone}, **head_config(backbone, head)}, encoder | head


def _computes_depth(name: str) -> bool:
    return not name.endswith(".mask_token")
