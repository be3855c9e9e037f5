"""Strict loading of a checkpoint's decoder, part by part, into the modules of transformers."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from olapipe.teachers.checkpoint import Checkpoint


def load_parts(
    parts: Mapping[str, torch.nn.Module], tensors: Mapping[str, torch.Tensor], checkpoint: Checkpoint
) -> None:
    """Fill each part from the tensors whose names start with its prefix, and make it ready for evaluation.

    transformers offers no class for a decoder without its encoder, and none that takes the two apart in loading.
    Raises TeacherError naming what is missing, unexpected or of another shape.
    """
    for prefix, part in parts.items():
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        try:
            part.load_state_dict(own)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise checkpoint.error(
                f"its tensors {prefix}… are not those of the {type(part).__name__} that config.json describes: "
                f"{reason[:300]}",
                "Use the weights and the config.json of one published checkpoint.",
            ) from error
        part.eval().requires_grad_(False)
