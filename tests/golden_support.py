"""Golden cases of the public OLA-VLM implementation: reading one, and running a student on its batch."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pytest import approx
from safetensors.torch import load_file
from torch import Tensor

from olatrain.losses import LossConfig, LossReport, Targets, compute_losses, count
from olatrain.predictors import PredictorBank
from olatrain.student import Student
from olatrain.tokens import Items, TaskTokens, locate

COMMITTED = Path(__file__).parent / "golden"
GOLDEN = Path(os.environ.get("OLA_GOLDEN") or COMMITTED)
KINDS = ("depth", "seg", "gen", "e2e")
CASES = sorted(path for path in GOLDEN.glob("e2e*") if path.is_dir())
PUBLIC_IMAGE = -200
PATCHES = 576


def require_cases(*kinds: str) -> None:
    """The committed directory has cases of all these kinds; one named by OLA_GOLDEN may have some of any kind."""
    there = {kind for kind in KINDS for path in GOLDEN.glob(f"{kind}*") if path.is_dir()}
    if GOLDEN == COMMITTED:
        assert there >= set(kinds), f"no folder {', '.join(set(kinds) - there)}* under {GOLDEN}"
    assert there, f"no folder {'*, '.join(KINDS)}* under {GOLDEN}"


@dataclass
class Case:
    expected: dict[str, Any]
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    batch: dict[str, Tensor]


def read(folder: Path) -> Case:
    return Case(
        json.loads((folder / "expected.json").read_text()),
        load_file(folder / "outputs.safetensors"),
        load_file(folder / "grads.safetensors"),
        load_file(folder / "batch.safetensors"),
    )


def expand(case: Case, tokens: TaskTokens, pad_id: int) -> tuple[dict[str, Tensor], Tensor]:
    """The public batch, whose image is one id, as a sequence of ids: 576 placeholders, then the task tokens."""
    block = torch.tensor([tokens.image_id] * PATCHES + list(tokens.flat))
    ids, labels, mask = [], [], []
    for row, label, real in zip(
        case.batch["input_ids"], case.batch["labels"], case.batch["attention_mask"], strict=True
    ):
        (at,) = (row == PUBLIC_IMAGE).nonzero().flatten().tolist()
        row = torch.where(real == 1, row, pad_id)
        ids.append(torch.cat((row[:at], block, row[at + 1 :])))
        labels.append(torch.cat((label[:at], torch.full_like(block, -100), label[at + 1 :])))
        mask.append(torch.cat((real[:at], torch.ones_like(block), real[at + 1 :])))
    inputs = {
        "input_ids": torch.stack(ids),
        "attention_mask": torch.stack(mask).long(),
        "pixel_values": case.batch["images_u8"].float() / 127.5 - 1,
    }
    return inputs, torch.stack(labels)


def target(case: Case, teacher: str, shape: tuple[int, ...]) -> Targets:
    values = case.batch[teacher]
    if teacher == "seg":  # published as (C, H, W); ours, and the store's, are (H, W, C)
        values = values.permute(0, 2, 3, 1)
    values = values.reshape(len(values), *shape)
    rows = torch.arange(len(values))
    return Targets.local(values, torch.ones(len(values), dtype=torch.bool), rows)


def run_case(
    case: Case, student: Student, bank: PredictorBank, losses: LossConfig, pad_id: int
) -> tuple[LossReport, dict[tuple[str, int], Tensor], Tensor]:
    tokens = student.tokens
    inputs, labels = expand(case, tokens, pad_id)
    items: Items = locate(tokens, inputs["input_ids"], inputs["attention_mask"])
    targets = {t: target(case, t, c.shape) for t, c in bank.configs.items()}
    output = student(inputs)
    predictions = bank(output.taps, items, student.latents)
    report = compute_losses(
        losses,
        count(labels, targets, tokens.never_predicted),
        logits=output.logits,
        labels=labels,
        never_predicted=tokens.never_predicted,
        predictions=predictions,
        targets=targets,
        logit_scales=bank.logit_scales,
    )
    return report, predictions, output.logits


def error(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2 error; the floor is for gradients that are 0, as the logit scale's in a batch of one."""
    return ((ours.detach() - theirs).norm() / theirs.norm().clamp(min=1e-5)).item()


def require_losses(case: Case, report: LossReport, bank: PredictorBank, losses: LossConfig) -> None:
    """Total, text, and each layer's parts, as published, within 1e-4."""
    assert report.loss.item() == approx(case.expected["loss"], rel=1e-4)
    assert report.text.mean.item() == approx(case.expected["text_loss"], rel=1e-4)
    assert (report.loss - report.text.mean).item() == approx(case.expected["emb_loss"], rel=1e-4)
    for teacher, config in bank.configs.items():
        rows = case.expected["per_layer"][f"_forward_{teacher}"]
        assert len(rows) == len(config.layers)
        for layer, (total, *parts) in zip(config.layers, rows, strict=True):
            smooth, contrastive = reversed(parts) if teacher == "gen" else parts
            measured = report.smooth_l1[teacher, layer].mean.item()
            weighted = losses.contrastive * report.contrastive[teacher, layer].mean.item()
            assert measured == approx(smooth, rel=1e-4), (teacher, layer)
            assert weighted == approx(contrastive, rel=1e-4), (teacher, layer)
            assert measured + weighted == approx(total, rel=1e-4), (teacher, layer)
