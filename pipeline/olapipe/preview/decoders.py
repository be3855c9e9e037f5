"""The teacher and the decoder that belong to a store's features, checked against its fingerprint."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch

from olapipe.preview.base import Decoder, Unavailable
from olapipe.teachers import registry
from olapipe.teachers.base import Teacher, TeacherSettings
from olapipe.teachers.variants import resize_grid
from olaschema.errors import FingerprintError
from olaschema.manifest import Fingerprint

GRID_BEFORE = "grid_before"
"""The option by which a fingerprint tells the teacher's own grid, where features were resized to another one."""

# Further teachers are seen in PCA colours.
_MODULES = {
    "depth": "olapipe.preview.depth", "depth-map": "olapipe.preview.depth_map", "seg": "olapipe.preview.seg",
    "gen": "olapipe.preview.gen",
}  # fmt: skip


def load_teacher(fingerprint: Fingerprint, checkpoint: str, device: str) -> Teacher:
    """Load the teacher with the settings of a fingerprint.

    Raises FingerprintError naming both digests where the checkpoint has other weights, or naming the field where
    something else differs; TeacherError where it does not load as this teacher.
    """
    info = registry.available().get(fingerprint.teacher)
    settings = TeacherSettings(
        checkpoint,
        preset="ola-vlm" if fingerprint.preset == "ola-vlm" else "default",
        device=device,
        compute_dtype=fingerprint.compute_dtype,
        options=info.options_of(fingerprint) if info is not None else {},
    )
    teacher = registry.load(fingerprint.teacher, settings)
    found = teacher.fingerprint.weights
    if found != fingerprint.weights:
        raise FingerprintError(
            f"{fingerprint.teacher}: the checkpoint {checkpoint} has the weights {found}, "
            f"the stored features were made with {fingerprint.weights}",
            f"Pass the checkpoint that they were extracted with: --checkpoint {fingerprint.teacher}=FOLDER",
        )
    fingerprint.require_equal(
        teacher.fingerprint, mine="in the store", theirs=f"by {checkpoint}",
        remedy="Pass the checkpoint folder that they were extracted with, unchanged.",
    )  # fmt: skip
    return teacher


def load_decoder(fingerprint: Fingerprint, checkpoint: str, device: str) -> Decoder[Any]:
    """Load what decodes a teacher's features.

    Raises Unavailable where there is no such thing, it lacks a part, or the features have lost what it reads.
    """
    module = _MODULES.get(fingerprint.teacher)
    if module is None:
        raise Unavailable(f"{fingerprint.teacher}: its checkpoint has no decoder for this feature")
    if fingerprint.options.get("l2_norm"):
        raise Unavailable(
            f"{fingerprint.teacher}: not decoded: its features were divided by their norms, which are not stored",
            "Extract without l2_norm to see them decoded.",
        )
    decoder: Decoder[Any] = importlib.import_module(module).load(checkpoint, fingerprint, torch.device(device))
    return decoder


def on_own_grid(feature: np.ndarray, fingerprint: Fingerprint) -> np.ndarray:
    """Return a feature stored on another grid, `(H, W, C)`, resized bilinearly to the grid its decoder reads."""
    before = fingerprint.options.get(GRID_BEFORE)
    if before is None:
        return feature
    height, _, width = str(before).partition("x")
    resized = resize_grid(torch.from_numpy(feature)[None], (int(height), int(width)), "bilinear")
    return resized[0].contiguous().numpy()
