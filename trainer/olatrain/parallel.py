"""Ranks: who we are among how many, and the few collectives that the training needs.

Gradients are summed in one all-reduce of a flat buffer instead of by DistributedDataParallel: losses are divided by
global counts already, so a sum is all that is wanted, and a rank may have nothing to run in a step.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from olaschema.errors import ConfigError
from olatrain.sharding import local, replicated

Negatives = Literal["world", "node", "rank"]
DeviceChoice = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Ranks:
    """One process among `world` processes, and the device it computes on."""

    rank: int
    world: int
    device: torch.device
    peers: tuple[int, ...] | None = None
    """Ranks whose targets are this one's negatives, itself among them; None: all."""
    peer_group: Any = None
    """Process group of the peers, where they are some of the ranks and more than one."""
    saving: Any = None
    """Process group of its own for checkpoints, which are written while the training goes on."""

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
        """Replace every gradient by its sum over ranks; a missing one counts as zeros.

        Those of parameters that are split over ranks are sums already.
        """
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in replicated(parameters) if parameter.grad is not None]
        if self.world == 1 or not gradients:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, summed in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def clip_gradients(self, parameters: Sequence[torch.nn.Parameter], limit: float) -> float:
        """Scale the gradients to a norm of `limit` where theirs is larger, and return theirs; for all ranks to call."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        split = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
        whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
        square = _square([local(gradient) for gradient in split], self.device)
        if split:
            square = self.sum(square)
        norm = (square + _square(whole, self.device)).sqrt()
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            local(gradient).mul_(factor)
        return float(norm)

    def most(self, value: int) -> int:
        """Return the largest `value` of any rank."""
        return max(int(found) for found in self.gather(torch.tensor([value], device=self.device)))

    def gather_targets(self, values: Tensor) -> list[Tensor]:
        """Return the `values` of each of this rank's peers, in their order, as `gather` does."""
        if self.peers is None:
            return self.gather(values)
        if len(self.peers) == 1:
            return [values]
        return self._gather(values, len(self.peers), self.peer_group)

    @property
    def place(self) -> int:
        """Which of its peers this rank is."""
        return self.rank if self.peers is None else self.peers.index(self.rank)

    def gather(self, values: Tensor) -> list[Tensor]:
        """Return every rank's `values` (n_rank, ...), whose first sizes may differ; dtype and bits are kept."""
        return [values] if self.world == 1 else self._gather(values, self.world, None)

    def _gather(self, values: Tensor, count: int, group: Any) -> list[Tensor]:
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(count)]
        dist.all_gather(sizes, torch.tensor([len(values)], dtype=torch.int64, device=self.device), group=group)
        counts = [int(size) for size in sizes]
        if not max(counts):
            return [values] * count
        # as bytes: every backend carries them, whatever the dtype
        padded = values.new_zeros((max(counts), *values.shape[1:]))
        padded[: len(values)] = values
        raw = padded.reshape(-1).view(torch.uint8)
        received = [torch.empty_like(raw) for _ in range(count)]
        dist.all_gather(received, raw, group=group)
        return [
            part.view(values.dtype).reshape(padded.shape)[:count] for part, count in zip(received, counts, strict=True)
        ]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            self.sum(torch.zeros(1, device=self.device))


@contextmanager
def open_ranks(choice: DeviceChoice = "auto", *, nproc: int = 1, negatives: Negatives = "world") -> Iterator[Ranks]:
    """Join the ranks that the launcher's environment describes (`RANK`, `WORLD_SIZE`, …), or be the only one.

    gloo on CPU, nccl on GPU. `negatives` says whose targets a rank sees: those of all, of its machine, its own.
    Raises ConfigError where a GPU is missing or `nproc` contradicts the launcher.
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
    else:  # a group of one needs no network; checkpoints are written through it like those of many
        store = dist.HashStore()  # type: ignore[attr-defined]
        hook = sys.excepthook
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        sys.excepthook = hook  # torch's puts "[rank0]:" before every line of every later traceback of this process
    try:
        peers, peer_group = _peers(negatives, rank, world)
        yield Ranks(rank, world, device, peers, peer_group, dist.new_group(backend="gloo"))
    finally:
        dist.destroy_process_group()


def _peers(negatives: Negatives, rank: int, world: int) -> tuple[tuple[int, ...] | None, Any]:
    size = {"world": world, "node": int(os.environ.get("LOCAL_WORLD_SIZE", str(world))), "rank": 1}[negatives]
    if size == world:
        return None, None
    if size == 1:
        return (rank,), None
    # every rank must take part in making every group
    groups = [range(first, min(first + size, world)) for first in range(0, world, size)]
    made = [(tuple(group), dist.new_group(list(group))) for group in groups]
    return next(found for found in made if rank in found[0])


def _square(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """The squared norm of all gradients together, () float32."""
    if not gradients:
        return torch.zeros((), device=device)
    norms = torch.stack([torch.linalg.vector_norm(gradient.float()) for gradient in gradients])
    return norms.square().sum()


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
