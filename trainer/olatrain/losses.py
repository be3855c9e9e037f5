"""Losses as sums and counts, so that a batch split over ranks and micro-steps gives what it gives in one piece.

A loss is a sum over valid tokens or valid items divided by their number in the whole global batch. Each rank divides
its own sum by that global number; the sum over ranks and micro-steps is then the loss of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from olaschema.manifest import Frozen

MAX_TEMPERATURE = 100.0
IGNORED = -100

Regression = Literal["smooth_l1", "mse", "cosine", "none"]


class LossConfig(Frozen):
    """Weights of the parts of the loss; the defaults are the published ones."""

    text: float = Field(default=1.0, ge=0.0)
    embedding: float = Field(default=0.5, ge=0.0)
    """Weight of each (teacher, layer), unless `teachers` names another for the teacher."""
    teachers: dict[str, float] = Field(default_factory=dict)
    contrastive: float = Field(default=0.3, ge=0.0)
    """Weight of the contrastive term relative to the regression."""
    layers: dict[str, dict[int, float]] = Field(default_factory=dict)
    """Factors on a teacher's weight by layer; 1 for those not named."""
    regressions: dict[str, Regression] = Field(default_factory=dict)
    """By teacher; smooth-L1 for those not named."""
    contrastives: dict[str, float] = Field(default_factory=dict)
    """Weights of the contrastive term by teacher; `contrastive` for those not named."""

    def weight(self, teacher: str, layer: int | None = None) -> float:
        """Weight of a supervised layer of `teacher`, before that layer's own factor where none is named."""
        weight = self.teachers.get(teacher, self.embedding)
        return weight if layer is None else weight * self.layers.get(teacher, {}).get(layer, 1.0)

    def regression(self, teacher: str) -> Regression:
        """Distance that a teacher's predictions are regressed with."""
        return self.regressions.get(teacher, "smooth_l1")

    def contrastive_weight(self, teacher: str) -> float:
        """Weight of a teacher's contrastive term relative to its regression."""
        return self.contrastives.get(teacher, self.contrastive)

    def scaled(self, factor: float) -> LossConfig:
        """Return the same losses with every embedding loss times `factor`."""
        teachers = {teacher: weight * factor for teacher, weight in self.teachers.items()}
        return self.model_copy(update={"embedding": self.embedding * factor, "teachers": teachers})


@dataclass(frozen=True)
class Sum:
    """A sum and what it is divided by; both are added over ranks and steps before dividing."""

    total: Tensor
    count: Tensor

    @property
    def mean(self) -> Tensor:
        """The quotient; 0 where nothing was counted."""
        return self.total / self.count.clamp(min=1)


@dataclass(frozen=True)
class Targets:
    """One teacher's features for the images of the global batch, without gradient.

    G images over all ranks and micro-steps, of which this rank's I items of this micro-step are `own`. A single
    process has G = I and `own` = 0, 1, 2 … (`Targets.local`).
    """

    values: Tensor
    """(G, *shape), any float dtype. Whatever stands in rows that are not valid, NaN included, has no effect."""
    valid: Tensor
    """(G,) bool: whether there is a feature."""
    rows: Tensor
    """(G,) int64: identity of the image; equal rows are the same image."""
    own: Tensor
    """(I,) int64: place of each item in `values`."""

    @classmethod
    def local(cls, values: Tensor, valid: Tensor, rows: Tensor) -> Targets:
        """Targets of a single process: every image is an item of this batch."""
        return cls(values, valid, rows, torch.arange(len(values), device=values.device))


@dataclass(frozen=True)
class Counts:
    """What the losses are divided by. `count` gives a rank's own; add them over ranks and micro-steps."""

    tokens: Tensor
    """() int64: next tokens to predict."""
    items: dict[str, Tensor]
    """() int64 by teacher: images with a feature."""


@dataclass(frozen=True)
class LossReport:
    """The loss of a rank's micro-batch and its parts."""

    loss: Tensor
    """() float32 with gradient: this rank's share; the sum over ranks and micro-steps is the global loss."""
    text_loss: Tensor
    """() float32 with gradient: the text's part of `loss`."""
    text: Sum
    """Cross-entropy in nats per token, detached."""
    smooth_l1: dict[tuple[str, int], Sum]
    """By (teacher, layer), per item, unweighted, detached; measured whatever the regression is."""
    contrastive: dict[tuple[str, int], Sum]
    """By (teacher, layer), per item, before the factor 0.3, in nats, detached."""
    regression: dict[tuple[str, int], Sum]
    """By (teacher, layer), per item, unweighted, detached: the distance that is in the loss."""


def count(labels: Tensor, targets: Mapping[str, Targets], never_predicted: Sequence[int]) -> Counts:
    """Count this rank's tokens and items; `labels` (B, L). Needs no forward pass."""
    valid = _predicted(labels[:, 1:], never_predicted)
    return Counts(valid.sum(), {teacher: t.valid[t.own].sum() for teacher, t in targets.items()})


def compute_losses(
    config: LossConfig,
    counts: Counts,
    *,
    logits: Tensor,
    labels: Tensor,
    never_predicted: Sequence[int],
    predictions: Mapping[tuple[str, int], Tensor],
    targets: Mapping[str, Targets],
    logit_scales: Mapping[str, Tensor],
    keep: Tensor | None = None,
) -> LossReport:
    """Next-token cross-entropy plus, for each (teacher, layer), regression + 0.3 · InfoNCE, divided by `counts`.

    `logits` (B, L, V), or (B, P, V) at the positions `keep` (P,); `labels` (B, L) with -100 where nothing is to be
    predicted; `predictions` (I, *shape). All arithmetic is float32. Nothing valid gives a loss of exactly 0 whose
    gradient is 0. The form of the loss is that of OLA-VLM (arXiv 2412.09585).
    """
    text = next_token_loss(logits, labels, never_predicted, keep=keep)
    text_loss = loss = config.text * text.total / counts.tokens.clamp(min=1)
    smooth: dict[tuple[str, int], Sum] = {}
    contrastive: dict[tuple[str, int], Sum] = {}
    regression: dict[tuple[str, int], Sum] = {}
    pools = {teacher: _pool(target) for teacher, target in targets.items()}
    for (teacher, layer), prediction in predictions.items():
        kind = config.regression(teacher)
        distance = regression_loss(kind, prediction, targets[teacher])
        info_nce = _info_nce(prediction, targets[teacher], pools[teacher], logit_scales[teacher])
        total = distance.total + config.contrastive_weight(teacher) * info_nce.total
        loss = loss + config.weight(teacher, layer) * total / counts.items[teacher].clamp(min=1)
        regression[teacher, layer] = _detached(distance)
        contrastive[teacher, layer] = _detached(info_nce)
        smooth[teacher, layer] = regression[teacher, layer]
        if kind != "smooth_l1":
            smooth[teacher, layer] = smooth_l1_loss(prediction.detach(), targets[teacher])
    return LossReport(loss, text_loss, _detached(text), smooth, contrastive, regression)


def supervised_positions(labels: Tensor) -> Tensor:
    """Sequence positions (P,) int64 whose logits the next-token loss needs in any sample; at least one."""
    needed = (labels[:, 1:] != IGNORED).any(dim=0).nonzero().flatten()
    return needed if len(needed) else needed.new_zeros(1)


def next_token_loss(
    logits: Tensor, labels: Tensor, never_predicted: Sequence[int], *, keep: Tensor | None = None
) -> Sum:
    """Sum of the cross-entropy (nats) over the tokens to predict; ids `never_predicted` are left out of the softmax.

    Labels of -100, and labels that are such ids, count as nothing to predict. Shapes as in `compute_losses`.
    """
    if keep is None:
        logits, labels = logits[:, :-1], labels[:, 1:]
    else:
        labels = functional.pad(labels, (0, 1), value=IGNORED)[:, keep + 1]
    valid = _predicted(labels, never_predicted)
    with torch.autocast(logits.device.type, enabled=False):
        chosen = logits[valid].float()
        if len(never_predicted):
            chosen = chosen.index_fill(1, torch.tensor(never_predicted, device=chosen.device), -torch.inf)
        total = functional.cross_entropy(chosen, labels[valid], reduction="sum")
    return Sum(total, valid.sum())


def smooth_l1_loss(prediction: Tensor, targets: Targets) -> Sum:
    """Sum over valid items of the smooth-L1 distance (β = 1), the mean of its elements; `prediction` (I, *shape)."""
    return regression_loss("smooth_l1", prediction, targets)


def regression_loss(kind: Regression, prediction: Tensor, targets: Targets) -> Sum:
    """Sum over valid items of a distance of prediction (I, *shape) and target, in float32.

    `smooth_l1` (β = 1) and `mse` are means over an item's elements; `cosine` is 1 − cosine of each vector of the map,
    averaged over the map; `none` is 0.
    """
    valid = targets.valid[targets.own]
    with torch.autocast(prediction.device.type, enabled=False):
        chosen, target = _masked(prediction, valid), _masked(targets.values[targets.own], valid)
        per_item = _DISTANCES[kind](chosen, target).flatten(1).mean(dim=1)
    return Sum(torch.where(valid, per_item, 0.0).sum(), valid.sum())


def info_nce_loss(prediction: Tensor, targets: Targets, logit_scale: Tensor) -> Sum:
    """Sum over valid items of InfoNCE from a prediction (I, *shape) to the targets of the global batch, in nats.

    Cosines of flattened maps, times exp(`logit_scale`) clamped at 100. Targets that are not valid, and other uses of
    the same image, are no negatives; items that are not valid are not scored.
    """
    return _info_nce(prediction, targets, _pool(targets), logit_scale)


def _info_nce(prediction: Tensor, targets: Targets, pool: Tensor, logit_scale: Tensor) -> Sum:
    valid = targets.valid[targets.own]
    with torch.autocast(prediction.device.type, enabled=False):
        query = functional.normalize(_masked(prediction, valid).flatten(1), dim=-1)
        logits = query @ pool.t() * logit_scale.float().exp().clamp(max=MAX_TEMPERATURE)
        places = torch.arange(len(targets.rows), device=logits.device)
        itself = places[None] == targets.own[:, None]
        twin = targets.rows[None] == targets.rows[targets.own][:, None]
        usable = itself | (targets.valid[None] & ~twin)
        # an item that is not valid keeps its own column, so that its row stays finite and its gradient is 0
        logits = logits.masked_fill(~usable, -torch.inf)
        per_item = functional.cross_entropy(logits, targets.own, reduction="none")
        return Sum(torch.where(valid, per_item, 0.0).sum(), valid.sum())


def _cosine_distance(one: Tensor, other: Tensor) -> Tensor:
    return 1.0 - functional.cosine_similarity(one, other, dim=-1)


_DISTANCES: dict[Regression, Callable[[Tensor, Tensor], Tensor]] = {
    "smooth_l1": lambda one, other: functional.smooth_l1_loss(one, other, reduction="none"),
    "mse": lambda one, other: functional.mse_loss(one, other, reduction="none"),
    "cosine": lambda one, other: _cosine_distance(one, other).unsqueeze(-1),
    "none": lambda one, other: torch.zeros_like(one),
}


def _pool(targets: Targets) -> Tensor:
    """All targets flattened and normalised (G, E), float32; once per teacher, for all its layers."""
    with torch.no_grad():
        return functional.normalize(_masked(targets.values, targets.valid).flatten(1), dim=-1)


def _masked(values: Tensor, valid: Tensor) -> Tensor:
    # `where` and not a product: NaN times 0 is NaN, in the value and in the gradient
    return torch.where(valid.reshape(-1, *[1] * (values.ndim - 1)), values.float(), 0.0)


def _predicted(labels: Tensor, never_predicted: Sequence[int]) -> Tensor:
    hidden = torch.tensor((IGNORED, *never_predicted), dtype=labels.dtype, device=labels.device)
    return ~torch.isin(labels, hidden)


def _detached(part: Sum) -> Sum:
    return Sum(part.total.detach(), part.count)
