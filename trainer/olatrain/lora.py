"""Low-rank adapters (LoRA, arXiv 2106.09685) inside the decoder's linear layers, made by peft, merged on export."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from olaschema.errors import ConfigError
from olatrain.config import Lora
from olatrain.student import Student

_MARK = "lora_"


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return any(part.startswith(_MARK) for part in name.split("."))


def add_adapters(student: Student, settings: Lora, *, seed: int) -> None:
    """Put adapters into the decoder's layers, the same on every rank; they change nothing until they are trained.

    Raises ConfigError where peft is not installed, or a layer that the settings name does not exist.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            "lora needs peft, which is not installed", "Install it: pip install 'ola-distill[lora]'."
        ) from error
    linear = {
        name: module
        for name, module in student.model.named_modules()
        if isinstance(module, nn.Linear) and any(module is inner for inner in _inside(student))
    }
    own = {name.rpartition(".")[2] for name in linear}
    unknown = sorted(set(settings.targets) - own)
    if unknown:
        raise ConfigError(
            f"lora.targets names {', '.join(unknown)}, which no decoder block has",
            f"Choose from {', '.join(sorted(own))}, or name none for all of them.",
        )
    chosen = [name for name in linear if not settings.targets or name.rpartition(".")[2] in settings.targets]
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=chosen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, student.model)
    # every rank's gradient must reach the first block, or sharded ranks would talk in different orders
    student.model.enable_input_require_grads()  # type: ignore[operator]


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Add each adapter's product to the weight beneath it and put the plain layers back."""
    from peft.tuners.lora import LoraLayer

    model.disable_input_require_grads()  # type: ignore[operator]
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            layer: Any = module
            layer.merge()
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], layer.get_base_layer())


def _inside(student: Student) -> list[nn.Module]:
    return [module for layer in student.layers for module in layer.modules()]
