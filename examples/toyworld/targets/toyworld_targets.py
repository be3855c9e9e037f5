"""Targets that tell what a teacher knows from what a picture shows: its map of depth alone, and colours alone.

A cell holds 4 × 4 means, each over what is a patch of the depth teacher.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch.nn import functional
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation

from olapipe.teachers.base import COMMON_OPTIONS, Teacher, TeacherSettings, resolve_options
from olapipe.teachers.checkpoint import locate, read_config, read_weights, weights_digest
from olapipe.teachers.huggingface import TorchTeacher, load_strictly, make_config
from olapipe.teachers.info import TeacherInfo
from olapipe.teachers.pixels import CONFIG, OURS, OwnPreprocessor, own_arguments
from olapipe.teachers.preprocess import read_processor_config
from olaschema.manifest import Fingerprint

SIDE, GRID, PARTS = 96, 6, 4
"""Pixels of the squashed picture's side, cells (one for each patch of the student), and means along a cell's side."""

CELLS = TeacherInfo(
    name="cells", published="cells-1", licence="CC0-1.0", about="Mean colours of each cell's parts, nothing learnt",
    grid=(GRID, GRID), channels=3 * PARTS**2, module="toyworld_targets", options=COMMON_OPTIONS,
)  # fmt: skip
DEPTH_MAP = TeacherInfo(
    name="depthmap", published="", licence="Apache-2.0", about="What a Depth Anything V2 answers: inverse depth",
    grid=(GRID, GRID), channels=PARTS**2, module="toyworld_targets", options=COMMON_OPTIONS,
)  # fmt: skip


def load(info: TeacherInfo, settings: TeacherSettings) -> Teacher:
    """Return one of the two; raises TeacherError where the checkpoint of `depthmap` cannot be used."""
    return _cells(info, settings) if info.name == CELLS.name else _depth_map(info, settings)


def _cells(info: TeacherInfo, settings: TeacherSettings) -> Teacher:
    pixels = _pixels(info, settings, own_arguments(SIDE, resample=Image.Resampling.BICUBIC, mean=0.0, std=1.0))
    meaning = Fingerprint(
        teacher=info.name, model_class="Cells", weights="", preset=settings.preset, preprocessing=pixels.record,
        taps=(), pooling="none", grid=info.grid, channels=info.channels,
    )  # fmt: skip
    return Cells(name=info.name, licence=info.licence, source=info.published, preprocessor=pixels, fingerprint=meaning)


class Cells(Teacher):
    """Colours, `(B, 6, 6, 48)`."""

    def encode(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        """Average the pixels of each part of a cell."""
        return _averaged(pixels_bchw.float())


def _depth_map(info: TeacherInfo, settings: TeacherSettings) -> Teacher:
    checkpoint = locate(info.name, settings.checkpoint or "", extra=(CONFIG,))
    values = read_config(checkpoint, checkpoint.path, model_type="depth_anything", what="Depth Anything V2 checkpoint")
    processor = read_processor_config(checkpoint, CONFIG, expected=("DPTImageProcessor",))
    tensors = read_weights(checkpoint, checkpoint.path, keep=lambda _: True)
    model = load_strictly(
        DepthAnythingForDepthEstimation, make_config(DepthAnythingConfig, values, checkpoint), tensors, checkpoint
    )
    arguments = own_arguments(SIDE, resample=Image.Resampling.BICUBIC, mean=0.0, std=1.0)
    pixels = _pixels(info, settings, arguments | {name: processor[name] for name in ("image_mean", "image_std")})
    meaning = Fingerprint(
        teacher=info.name, model_class="DepthAnythingForDepthEstimation", weights=weights_digest(tensors),
        preset=settings.preset, preprocessing=pixels.record, taps=(), pooling="none", grid=info.grid,
        channels=info.channels, compute_dtype=settings.compute_dtype,
    )  # fmt: skip
    return TorchTeacher(
        DepthMap(model), settings, name=info.name, licence=info.licence, source=checkpoint.source, preprocessor=pixels,
        fingerprint=meaning,
    )  # fmt: skip


class DepthMap(torch.nn.Module):
    """Means of the model's answer, `(B, 6, 6, 16)`."""

    def __init__(self, model: DepthAnythingForDepthEstimation) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        """Run backbone, neck and head."""
        return _averaged(self.model(pixels_bchw).predicted_depth[:, None].float())


def _pixels(info: TeacherInfo, settings: TeacherSettings, arguments: dict[str, object]) -> OwnPreprocessor:
    options = resolve_options(info.name, info.options, settings)
    return OwnPreprocessor("", OURS, arguments, None, str(options["channel_order"]), bool(options["exif"]))


def _averaged(values_bchw: torch.Tensor) -> torch.Tensor:
    """(B, C, 96, 96) to (B, 6, 6, 16 · C): the parts of a cell by rows, each with its channels."""
    means = functional.avg_pool2d(values_bchw, SIDE // GRID // PARTS)
    parts = means.reshape(len(means), -1, GRID, PARTS, GRID, PARTS)
    return parts.permute(0, 2, 4, 3, 5, 1).flatten(3).contiguous()
