"""Sums behind the figures of a step or an evaluation: added over micro-batches, ranks and batches, then divided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from olatrain.losses import LossConfig, LossReport, Targets, info_nce_loss, regression_loss
from olatrain.parallel import Ranks
from olatrain.predictors import Predictions, PredictorBank

_MEASURES = ("smooth_l1", "regression", "contrastive", "cosine")


class Meter:
    """Named float64 sums; the names are the same on every rank, so that the sums can be added in one go."""

    def __init__(
        self,
        bank: PredictorBank,
        losses: LossConfig,
        means: Mapping[str, Tensor],
        device: torch.device,
        *,
        fed: Sequence[str] = (),
    ) -> None:
        self._means = means
        self._losses = losses
        self._layers = {teacher: config.layers for teacher, config in bank.configs.items()}
        self.sums: dict[str, Tensor] = {}
        names = ["loss", "text", "tokens", "samples", "skipped", "cut", "requests", "stop"]
        names += [f"{teacher}.{name}" for teacher in fed for name in ("fed", "unfed")]
        for teacher, layers in self._layers.items():
            names += [f"{teacher}.{name}" for name in ("valid", "energy", *_MEASURES)]
            for layer in layers:
                names += [f"{teacher}.{layer}.{name}" for name in ("error", *_MEASURES)]
        self.sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}

    def add(self, name: str, value: Tensor | float) -> None:
        """Add to one sum."""
        self.sums[name] += value.detach().double() if isinstance(value, Tensor) else value

    def add_report(
        self,
        report: LossReport,
        predictions: Predictions,
        targets: Mapping[str, Targets],
        logit_scales: Mapping[str, Tensor],
    ) -> None:
        """Add a micro-batch: its losses, how near its predictions are, and how near the mean map would be."""
        self.add("loss", report.loss)
        self.add("text", report.text.total)
        self.add("tokens", report.text.count)
        with torch.no_grad():
            for teacher, target in targets.items():
                self._add_teacher(teacher, report, predictions, target, logit_scales[teacher])

    def _add_teacher(
        self, teacher: str, report: LossReport, predictions: Predictions, target: Targets, logit_scale: Tensor
    ) -> None:
        valid = target.valid[target.own]
        self.add(f"{teacher}.valid", valid.sum())
        values = target.values[target.own][valid].float()
        mean = self._means[teacher].expand(len(valid), *self._means[teacher].shape)
        self.add(f"{teacher}.smooth_l1", regression_loss("smooth_l1", mean, target).total)
        self.add(f"{teacher}.regression", regression_loss(self._losses.regression(teacher), mean, target).total)
        self.add(f"{teacher}.contrastive", info_nce_loss(mean, target, logit_scale).total)
        self.add(f"{teacher}.cosine", _cosine(mean[valid], values))
        self.add(f"{teacher}.energy", (values - mean[valid]).double().square().sum())
        for layer in self._layers[teacher]:
            prediction = predictions[teacher, layer][valid].float()
            name = f"{teacher}.{layer}"
            self.add(f"{name}.smooth_l1", report.smooth_l1[teacher, layer].total)
            self.add(f"{name}.regression", report.regression[teacher, layer].total)
            self.add(f"{name}.contrastive", report.contrastive[teacher, layer].total)
            self.add(f"{name}.cosine", _cosine(prediction, values))
            self.add(f"{name}.error", (values - prediction).double().square().sum())

    def totals(self, ranks: Ranks) -> dict[str, float]:
        """Return the sums over all ranks."""
        summed = ranks.sum(torch.stack(list(self.sums.values()))).tolist()
        return dict(zip(self.sums, summed, strict=True))


def add_totals(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """Add the sums of two batches."""
    return {name: one[name] + other[name] for name in one}


def figures(totals: Mapping[str, float], bank: PredictorBank, losses: LossConfig) -> dict[str, Any]:
    """Divide sums into the figures that are reported, by teacher and layer, each beside that of the mean map.

    `cosine` is that of the flattened maps, averaged over images. `r2` is 1 − Σ‖p − t‖² / Σ‖m − t‖² with m the mean
    training target: 0 for the mean map, 1 for a perfect prediction. `loss` is the teacher's regression + its
    weight of the contrastive term · contrastive, before the teacher's weight.
    """
    teachers = {}
    for teacher, config in bank.configs.items():
        valid = totals[f"{teacher}.valid"]
        found: dict[str, Any] = {"valid": int(valid)}
        if valid:
            weight = losses.contrastive_weight(teacher)
            found["mean_map"] = _measures(totals, teacher, valid, weight)
            found["layers"] = {
                str(layer): _layer_figures(totals, teacher, layer, valid, weight) for layer in config.layers
            }
        teachers[teacher] = found
    return {"text": totals["text"] / max(totals["tokens"], 1.0), "tokens": int(totals["tokens"]), "teachers": teachers}


def _layer_figures(
    totals: Mapping[str, float], teacher: str, layer: int, valid: float, contrastive_weight: float
) -> dict[str, float | None]:
    energy = totals[f"{teacher}.energy"]
    return {
        **_measures(totals, f"{teacher}.{layer}", valid, contrastive_weight),
        # a single image equals its mean map: there is nothing to explain
        "r2": 1.0 - totals[f"{teacher}.{layer}.error"] / energy if energy > 0 else None,
    }


def _measures(totals: Mapping[str, float], name: str, valid: float, contrastive_weight: float) -> dict[str, float]:
    found = {measure: totals[f"{name}.{measure}"] / valid for measure in _MEASURES}
    regression = found.pop("regression")
    return {"loss": regression + contrastive_weight * found["contrastive"], **found}


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    return functional.cosine_similarity(one.flatten(1), other.flatten(1), dim=1).sum()
