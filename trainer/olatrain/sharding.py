"""The language model split over ranks while it trains: FSDP2 on each decoder block and on what stands around them.

Only the language model is split. Projector, predictors, task tokens and vision tower are small beside it: every rank
holds them, and their gradients are summed in one flat all-reduce, as they are while the language model is frozen.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from olatrain.groups import model_groups
from olatrain.student import Student


def shard_language_model(student: Student, device: torch.device, world: int) -> None:
    """Split the language model over `world` ranks, which all hold the same weights; sums gradients, not means."""
    mesh = init_device_mesh(device.type, (world,))
    groups = model_groups(student)
    whole = {parameter for group in ("projector", "vision") for parameter in groups[group].values()}
    for block in (*student.layers, student.model):
        fully_shard(block, mesh=mesh, ignored_params=whole)
        sharded: Any = block
        # losses are divided by the counts of the global batch already
        sharded.set_gradient_divide_factor(1.0)
        # gloo has neither the mean nor the product that FSDP would take instead
        sharded.set_force_sum_reduction_for_comms(True)


def is_sharded(module: nn.Module) -> bool:
    """Whether a module is split over ranks."""
    return isinstance(module, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def replicated(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return the parameters that every rank holds as a whole."""
    return [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
