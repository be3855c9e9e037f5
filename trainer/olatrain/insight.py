"""A closer look at one step: retrieval, effective rank, and how the text and the embedding losses pull the projector.

It costs a backward pass of the text loss and some matrix products, so it is taken every `look_every` steps only. It
changes nothing: the gradients that train are those of a step without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from olatrain.losses import Targets
from olatrain.parallel import Ranks
from olatrain.predictors import Predictions, PredictorBank


class Insight:
    """Gathers over the micro-batches of a step, then over ranks; `figures` are there after `finish`."""

    def __init__(self, bank: PredictorBank, projector: nn.Module, device: torch.device) -> None:
        self._shapes = {teacher: config.shape for teacher, config in bank.configs.items()}
        self._layers = {teacher: config.layers for teacher, config in bank.configs.items()}
        self._projector = [p for p in projector.parameters() if p.requires_grad]
        self._text = [torch.zeros_like(p) for p in self._projector]
        names = [(teacher, layer) for teacher, layers in self._layers.items() for layer in layers]
        shapes = {name: self._shapes[name[0]] for name in names} | {(t, 0): s for t, s in self._shapes.items()}
        # layer 0 stands for the targets themselves
        self._spread = {name: _Spread(shape, device) for name, shape in sorted(shapes.items())}
        self._sums = {
            name: torch.zeros(2, dtype=torch.float64, device=device) for name in sorted(self._spread)
        }  # layer: retrieved, scored; targets: chance, scored
        self.figures: dict[str, Any] = {}

    def add_text(self, loss: Tensor, *, through: Tensor | None = None) -> None:
        """Take the text loss's gradient at the projector; before the backward pass, whose graph it keeps.

        `through` is a tensor of the graph that the pass is to reach even where no image, and so no projector, is in
        it: ranks that hold a part each of a language model must go back through it together.
        """
        if not self._projector or not loss.requires_grad:
            return
        wanted = self._projector if through is None else [*self._projector, through]
        found = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
        for total, gradient in zip(self._text, found[: len(self._text)], strict=True):
            if gradient is not None:
                total += gradient

    @torch.no_grad()
    def add(self, predictions: Predictions, targets: Mapping[str, Targets]) -> None:
        """Add a micro-batch; predictions (I, *shape) and targets as for the losses."""
        for teacher, target in targets.items():
            valid = target.valid[target.own]
            if not bool(valid.any()):
                continue
            pool = functional.normalize(
                torch.where(target.valid[:, None], target.values.flatten(1).float(), 0.0), dim=-1
            )
            usable = _usable(target)[valid]
            self._sums[teacher, 0] += torch.stack([(1.0 / usable.sum(dim=1).double()).sum(), valid.sum().double()])
            self._spread[teacher, 0].add(target.values[target.own][valid])
            for layer in self._layers[teacher]:
                prediction = predictions[teacher, layer][valid].float()
                self._spread[teacher, layer].add(prediction)
                scores = functional.normalize(prediction.flatten(1), dim=-1) @ pool.t()
                best = scores.masked_fill(~usable, -torch.inf).argmax(dim=1)
                hits = (best == target.own[valid]).sum()
                self._sums[teacher, layer] += torch.stack([hits.double(), valid.sum().double()])

    @torch.no_grad()
    def finish(self, ranks: Ranks) -> None:
        """Add up over ranks, once the step's gradients are summed; every rank must call it."""
        sums = {name: ranks.sum(value).tolist() for name, value in self._sums.items()}
        spread = {name: value.finish(ranks) for name, value in self._spread.items()}
        teachers: dict[str, Any] = {}
        for teacher, layers in self._layers.items():
            chance, scored = sums[teacher, 0]
            if not scored:
                continue
            teachers[teacher] = {
                "retrieval_chance": chance / scored,
                "target_effective_rank": spread[teacher, 0][0],
                "layers": {
                    str(n): {
                        "retrieval": sums[teacher, n][0] / scored,
                        "effective_rank": spread[teacher, n][0],
                        "spread": spread[teacher, n][1] / spread[teacher, 0][1] if spread[teacher, 0][1] else None,
                    }
                    for n in layers
                },
            }
        self.figures = {"teachers": teachers}
        if self._projector:
            self.figures["projector_gradient"] = self._gradients(ranks)

    def _gradients(self, ranks: Ranks) -> dict[str, float | None]:
        text = ranks.sum(torch.cat([gradient.flatten() for gradient in self._text]))
        whole = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros_like(p).flatten()
                           for p in self._projector])  # fmt: skip
        embedding = whole - text
        norms = float(text.norm()), float(embedding.norm())
        cosine = float(text.double() @ embedding.double()) / (norms[0] * norms[1]) if min(norms) > 0 else None
        return {"text": norms[0], "embedding": norms[1], "cosine": cosine}


def _usable(targets: Targets) -> Tensor:
    """Which targets each item is told apart from, its own included: (I, G) bool, as in the contrastive loss."""
    rows = targets.rows
    twin = rows[None] == rows[targets.own][:, None]
    itself = torch.arange(len(rows), device=rows.device)[None] == targets.own[:, None]
    return itself | (targets.valid[None] & ~twin)


class _Spread:
    """Scatter of vectors (I, *, C) around their own mean map, over micro-batches and ranks.

    Deviations from the first map seen are what is summed: they are small where predictions have collapsed, so that
    nothing is lost to rounding. Pieces are joined by the pairwise formula of Chan, Golub and LeVeque (1979).
    """

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        self._count = 0
        self._reference: Tensor | None = None
        channels = shape[-1]
        self._shape = (int(torch.Size(shape[:-1]).numel()), channels)
        self._sum = torch.zeros(self._shape, dtype=torch.float64, device=device)
        self._square = torch.zeros(channels, channels, dtype=torch.float64, device=device)

    def add(self, values: Tensor) -> None:
        maps = values.float().reshape(len(values), *self._shape)
        if self._reference is None:
            self._reference = maps[0].clone()
        deviations = maps - self._reference
        # the root of a rounded square would show as a direction of its own: a layer norm leaves one without any
        flat = deviations.flatten(0, 1).double()
        self._count += len(maps)
        self._sum += deviations.double().sum(dim=0)
        self._square += flat.t() @ flat

    def finish(self, ranks: Ranks) -> tuple[float, float]:
        """Return the effective rank of the deviations from the mean map, 0 where all maps are equal, and their energy.

        The rank is exp of the entropy of the normalised singular values (Roy & Vetterli 2007), from which RankMe
        (Garrido et al., arXiv 2210.02885) reads a collapse. Centred as here, noise around one map has full rank: only
        with the energy, a sum of squares, is it told from variety.
        """
        device = self._sum.device
        count = max(self._count, 1)
        scatter = ranks.sum(self._square - self._sum.t() @ self._sum / count)
        own = torch.zeros(0, *self._shape, dtype=torch.float64, device=device)
        if self._reference is not None:
            own = (self._reference.double() + self._sum / count)[None]
        means = torch.cat(ranks.gather(own))
        counts = [float(c) for c in torch.cat(ranks.gather(torch.tensor([self._count], device=device))) if int(c)]
        if not counts:
            return 0.0, 0.0
        weights = torch.tensor(counts, dtype=torch.float64, device=device)[:, None, None]
        between = means - (means * weights).sum(dim=0) / weights.sum()
        flat = (between * weights.sqrt()).flatten(0, 1)
        scatter = scatter + flat.t() @ flat
        values = torch.linalg.eigvalsh(scatter).clamp(min=0)
        return entropy_rank(values.sqrt()), float(values.sum())


def entropy_rank(singular: Tensor) -> float:
    """Effective rank of a matrix with these singular values (n,): between 1 and n, 0 where all are 0."""
    total = singular.sum()
    if not float(total) > 0:
        return 0.0
    shares = singular / total
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))


def due(every: int, step: int) -> bool:
    """Whether to look closer at `step`, counted from 1: the first, and every `every`-th; never where that is 0."""
    return every > 0 and (step == 1 or step % every == 0)


def merged(record: dict[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Put the figures of `found` among those of `record`, nested as they are; returns a new record."""
    joined = dict(record)
    for name, value in found.items():
        before = joined.get(name)
        nested = isinstance(value, Mapping) and isinstance(before, Mapping)
        joined[name] = merged(dict(before), value) if nested and before is not None else value
    return joined
