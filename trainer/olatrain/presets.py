"""The published stages as plain settings: what a preset does not name keeps its default, what is given wins.

As OLA-VLM (arXiv 2412.09585) was trained: pretraining, visual pretraining, instruction tuning.
"""

from __future__ import annotations

from typing import Any, Literal

Preset = Literal["pretrain", "vpt", "finetune"]

_PUBLISHED: dict[str, Any] = {"epochs": 1, "warmup": 0.03, "weight_decay": 0.0, "precision": "bf16", "max_length": 4096}
_TUNING: dict[str, Any] = {**_PUBLISHED, "train": ["projector", "llm"], "lr": 2e-5, "batch": 128}

PRESETS: dict[Preset, dict[str, Any]] = {
    "pretrain": {**_PUBLISHED, "train": ["projector", "predictors", "task_tokens"], "lr": 1e-3, "batch": 256},
    "vpt": _TUNING,
    "finetune": {**_TUNING, "order": "grouped"},
}
"""Both losses in `pretrain`; next tokens alone in the others unless teachers are named, the task tokens frozen."""


def with_preset(given: dict[str, Any]) -> dict[str, Any]:
    """Return settings with those of the preset they name under them; an unknown preset is left to validation."""
    chosen = {str(name): settings for name, settings in PRESETS.items()}.get(str(given.get("preset")))
    if chosen is None:
        return given
    settings = {**chosen, **given}
    if given.get("steps") is not None and "epochs" not in given:
        del settings["epochs"]
    return settings
