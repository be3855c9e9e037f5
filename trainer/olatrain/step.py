"""One step over the global batch: targets gathered, losses and gradients summed, however it is split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from olatrain.feed import Fed
from olatrain.insight import Insight
from olatrain.learner import Learner
from olatrain.losses import IGNORED, Counts, LossConfig, Targets, compute_losses, count, supervised_positions
from olatrain.meter import Meter
from olatrain.parallel import Ranks
from olatrain.scaling import decode
from olatrain.sharding import is_sharded
from olatrain.stream import Batch, MicroBatch
from olatrain.tokens import TaskTokens, locate
from olatrain.tower import on_grid


@dataclass(frozen=True)
class Global:
    """One teacher's features for the global batch, decoded, and where this rank's images begin in it."""

    values: Tensor
    valid: Tensor
    rows: Tensor
    first: int


def run_batch(
    learner: Learner,
    batch: Batch,
    ranks: Ranks,
    means: Mapping[str, Tensor],
    *,
    bf16: bool,
    stop: bool = False,
    losses: LossConfig | None = None,
    mean_targets: bool = False,
    insight: Insight | None = None,
) -> dict[str, float]:
    """Run this rank's part of a batch and return the sums over all ranks (`Meter`).

    With gradients enabled, every rank's trainable parameters end with the gradient of the global batch. Losses are
    divided by the counts of the whole global batch, and the contrastive term sees all of its targets, from the first
    micro-batch on. `stop` is added up like the rest, so that all ranks learn that one was told to stop. `losses`
    stand for the learner's own; with `mean_targets` every target is the mean map, a control.
    `insight` looks closer on the way; with one on every rank or on none.
    """
    losses = losses or learner.losses
    device = ranks.device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        maps = _tower_maps(learner, batch, device)
    gathered = _gather(batch, ranks, learner, maps)
    floors = {name: learner.bank.standardise(name, mean) for name, mean in means.items()}
    if mean_targets:
        gathered = {n: replace(g, values=floors[n].expand(len(g.rows), *floors[n].shape)) for n, g in gathered.items()}
    micros = in_step(learner, batch.micro, ranks)
    fed = fed_features(learner, batch, device)
    pieces, fed_pieces = [], []
    first = 0
    for micro in micros:
        fed_pieces.append({teacher: found.part(first, len(micro.items)) for teacher, found in fed.items()})
        pieces.append({teacher: _piece(found, first, len(micro.items)) for teacher, found in gathered.items()})
        first += len(micro.items)
    counts = _global_counts(learner, micros, pieces, ranks)
    meter = Meter(learner.bank, losses, floors, device, fed=tuple(fed))
    scales = dict(learner.bank.logit_scales.items())
    for micro, targets, given in zip(micros, pieces, fed_pieces, strict=True):
        inputs = {name: value.to(device, non_blocking=True) for name, value in micro.inputs.items()}
        labels = micro.labels.to(device, non_blocking=True)
        keep = supervised_positions(labels)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            output = learner.student(inputs, keep=keep, fed=given)
            predictions = learner.bank(output.taps, micro.items.to(device), learner.student.latents)
        report = compute_losses(
            losses,
            counts,
            logits=output.logits,
            labels=labels,
            never_predicted=learner.tokens.never_predicted,
            predictions=predictions,
            targets=targets,
            logit_scales=scales,
            keep=keep,
        )
        if insight is not None:
            insight.add_text(report.text_loss, through=output.entry if is_sharded(learner.student.model) else None)
            insight.add(predictions, targets)
        if report.loss.requires_grad:
            torch.autograd.backward(report.loss)
        meter.add_report(report, predictions, targets, scales)
    for teacher, found in fed.items():
        meter.add(f"{teacher}.fed", found.valid.sum())
        meter.add(f"{teacher}.unfed", (~found.valid).sum())
    meter.add("samples", batch.samples)
    meter.add("skipped", len(batch.skipped))
    meter.add("cut", batch.cut)
    meter.add("requests", batch.requests)
    meter.add("stop", float(stop))
    if torch.is_grad_enabled():
        ranks.sum_gradients(list(learner.trainable().values()))
    if insight is not None:
        insight.finish(ranks)
    return meter.totals(ranks)


def in_step(learner: Learner, micros: Sequence[MicroBatch], ranks: Ranks) -> list[MicroBatch]:
    """Return the micro-batches to run: where ranks hold a part each of the language model, as many on every rank.

    Their passes through it go in step, so a rank that has fewer runs some that count for nothing.
    """
    more = ranks.most(len(micros)) - len(micros) if is_sharded(learner.student.model) else 0
    return [*micros, *[_nothing(learner.tokens)] * more]


def fed_features(learner: Learner, batch: Batch, device: torch.device) -> dict[str, Fed]:
    """Return the features that this rank's images are fed with, decoded on `device`, by fed teacher."""
    found = {}
    for teacher in learner.student.feeds.teachers:
        features = batch.features[teacher]
        scale, offset = (
            None if part is None else part.to(device, non_blocking=True) for part in (features.scale, features.offset)
        )
        channels = learner.student.feeds.projector(teacher).shape[-1]
        values = features.values.to(device, non_blocking=True)
        values = decode(values, scale, channels, _basis(learner, teacher), offset)
        found[teacher] = Fed(values, features.valid.to(device, non_blocking=True))
    return found


def _basis(learner: Learner, teacher: str) -> nn.Module | None:
    return learner.bases[teacher] if teacher in learner.bases else None  # noqa: SIM401 - a ModuleDict has no get


def _tower_maps(learner: Learner, batch: Batch, device: torch.device) -> Tensor | None:
    """What the student's tower gives for this rank's images, where that is the target: (I, h, w, C)."""
    if learner.tower is None:
        return None
    pixels = [micro.inputs["pixel_values"] for micro in batch.micro if len(micro.items)]
    if not pixels:
        return torch.zeros(0, 1, 1, learner.tower.channels, device=device)
    return torch.cat([learner.tower(one.to(device, non_blocking=True)) for one in pixels])


def _gather(batch: Batch, ranks: Ranks, learner: Learner, maps: Tensor | None) -> dict[str, Global]:
    """Each teacher's features from this rank's peers, once, as they carry no gradient; they travel as stored.

    With `maps` of the student's tower, these are the targets of the images that have a feature.
    """
    rows = ranks.gather_targets(batch.rows.to(ranks.device))
    first = sum(len(part) for part in rows[: ranks.place])

    def everyones(own: Tensor) -> Tensor:
        return torch.cat(ranks.gather_targets(own.to(ranks.device, non_blocking=True)))

    found = {}
    for teacher, config in learner.bank.configs.items():
        features = batch.features[teacher]
        if maps is not None:
            own = on_grid(maps, config.shape) if len(maps) else maps.new_zeros(0, *config.shape)
            found[teacher] = Global(everyones(own), everyones(features.valid), torch.cat(rows), first)
            continue
        scale, offset = (None if part is None else everyones(part) for part in (features.scale, features.offset))
        values = decode(everyones(features.values), scale, config.channels, _basis(learner, teacher), offset)
        values = learner.bank.standardise(teacher, values)
        found[teacher] = Global(values, everyones(features.valid), torch.cat(rows), first)
    return found


def _piece(found: Global, first: int, images: int) -> Targets:
    own = torch.arange(images, device=found.rows.device) + found.first + first
    return Targets(found.values, found.valid, found.rows, own)


def _nothing(tokens: TaskTokens) -> MicroBatch:
    ids = torch.zeros(1, 2, dtype=torch.int64)
    mask = torch.ones_like(ids)
    items = locate(tokens, ids, mask, images=[0])
    return MicroBatch({"input_ids": ids, "attention_mask": mask}, torch.full_like(ids, IGNORED), items)


def _global_counts(
    learner: Learner, micros: Sequence[MicroBatch], pieces: list[dict[str, Targets]], ranks: Ranks
) -> Counts:
    teachers = list(learner.bank.configs)
    total = torch.zeros(1 + len(teachers), dtype=torch.int64, device=ranks.device)
    for micro, targets in zip(micros, pieces, strict=True):
        found = _counts(learner, micro, targets, ranks.device)
        total += torch.stack([found.tokens, *(found.items[teacher] for teacher in teachers)])
    total = ranks.sum(total)
    return Counts(total[0], {teacher: total[1 + place] for place, teacher in enumerate(teachers)})


def _counts(learner: Learner, micro: MicroBatch, targets: dict[str, Targets], device: torch.device) -> Counts:
    return count(micro.labels.to(device), targets, learner.tokens.never_predicted)
