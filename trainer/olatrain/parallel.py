"""Ranks: who we are among how many, and the few collectives that the training needs.

Gradients are summed in one all-reduce of a flat buffer instead of by DistributedDataParallel: losses are divided by
global counts already, so a sum is all that is wanted, and a rank may have nothing to run in a step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from olaschema.errors import ConfigError

DeviceChoice = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Ranks:
    """One process among `world` processes, and the device it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether it is rank 0, which writes files and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over ranks, in their dtype."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace every gradient by its sum over ranks; a missing one counts as zeros."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.world == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, summed in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def gather(self, values: Tensor) -> list[Tensor]:
        """Return every rank's `values` (n_rank, ...), whose first sizes may differ; dtype and bits are kept."""
        if self.world == 1:
            return [values]
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(values)], dtype=torch.int64, device=self.device))
        counts = [int(size) for size in sizes]
        if not max(counts):
            return [values] * self.world
        # as bytes: every backend carries them, whatever the dtype
        padded = values.new_zeros((max(counts), *values.shape[1:]))
        padded[: len(values)] = values
        raw = padded.reshape(-1).view(torch.uint8)
        received = [torch.empty_like(raw) for _ in range(self.world)]
        dist.all_gather(received, raw)
        return [
            part.view(values.dtype).reshape(padded.shape)[:count] for part, count in zip(received, counts, strict=True)
        ]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            self.sum(torch.zeros(1, device=self.device))


@contextmanager
def open_ranks(choice: DeviceChoice = "auto", *, nproc: int = 1) -> Iterator[Ranks]:
    """Join the ranks that the launcher's environment describes (`RANK`, `WORLD_SIZE`, …), or be the only one.

    gloo on CPU, nccl on GPU. Raises ConfigError where a GPU is missing or `nproc` contradicts the launcher.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", str(rank)))
    if nproc > 1 and nproc != int(os.environ.get("LOCAL_WORLD_SIZE", str(world))):
        raise ConfigError(
            f"nproc = {nproc}, but the launcher started {os.environ.get('LOCAL_WORLD_SIZE', world)} ranks here",
            "Under torchrun leave nproc out: torchrun decides.",
        )
    device = _device(choice, local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world)
    try:
        yield Ranks(rank, world, device)
    finally:
        if world > 1:
            dist.destroy_process_group()


def _device(choice: DeviceChoice, local: int) -> torch.device:
    present = torch.cuda.device_count()
    if choice == "cpu" or (choice == "auto" and not present):
        return torch.device("cpu")
    if local >= present:
        raise ConfigError(
            f"rank {local} of this machine has no GPU: there are {present}",
            "Start as many ranks as there are GPUs (--nproc), or set device to cpu.",
        )
    return torch.device("cuda", local)
