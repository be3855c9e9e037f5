"""The toy world's segmenter: a small OneFormer with a Swin backbone, trained for the panoptic task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from fitting import (
    CLASSES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    batch_of,
    fit,
    held_out,
    pixels_of,
    write_half,
    write_json,
)
from scenes import SHAPES, STUFF, Split
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTokenizer, OneFormerConfig, OneFormerForUniversalSegmentation, SwinConfig

SIDE = 192
"""Pixels of a side of what it sees."""
COARSE = 96
"""Side in the first part of training, which is less than half of the work."""
COARSE_SHARE = 0.8


def seg_config(vocabulary: int) -> OneFormerConfig:
    """Return a OneFormer of 32 channels whose Swin backbone ends in a 6 × 6 map of 128 channels."""
    features: dict[str, Any] = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    backbone = SwinConfig(
        image_size=SIDE,
        embed_dim=16,
        depths=[1, 1, 2, 1],
        num_heads=[2, 2, 4, 4],
        window_size=6,
        drop_path_rate=0.0,
        **features,
    )
    return OneFormerConfig(
        backbone_config=backbone,
        conv_dim=32,
        mask_dim=32,
        hidden_dim=32,
        encoder_feedforward_dim=96,
        encoder_layers=2,
        decoder_layers=4,
        dim_feedforward=96,
        num_attention_heads=4,
        num_queries=14,
        query_dec_layers=1,
        text_encoder_vocab_size=vocabulary,
        dropout=0.0,
        train_num_points=512,
        is_training=False,  # without the text branch, which serves the contrastive loss alone
        id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
    )


def seg_batch(split: Split, start: int, count: int, *, draw: int = 0) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return pixels (B, 3, 192, 192), and for each picture its masks (M, 192, 192) and classes (M,)."""
    batch, mirror = batch_of(split, start, count, SIDE, draw=draw)
    masks, classes = [], []
    for one in batch:
        segments = torch.from_numpy(one.segments)
        present = np.unique(one.segments)  # a thing can be hidden behind others
        shown = torch.stack([segments == number for number in present.tolist()]).float()
        masks.append(shown.flip(-1) if mirror else shown)
        classes.append(torch.tensor([one.classes[number] for number in present]))
    return pixels_of(batch, mirror, IMAGENET_MEAN, IMAGENET_STD), masks, classes


def train_seg(out: Path, steps: int, batch: int, *, draw: int = 0) -> None:
    """Train it with OneFormer's own loss, first on small pictures."""
    torch.manual_seed(2 + draw)
    tokenizer = write_seg_files(out)
    model = OneFormerForUniversalSegmentation(seg_config(len(tokenizer)))
    task = panoptic_task(tokenizer)

    def loss(step: int) -> Tensor:
        pixels, masks, classes = seg_batch("train", step * batch, batch, draw=draw)
        if step < COARSE_SHARE * steps:
            pixels = functional.interpolate(pixels, size=(COARSE, COARSE), mode="area")
        # a fourth of the truth's pixels is enough: the masks predicted are coarser still
        masks = [mask[:, ::2, ::2] for mask in masks]
        result = model(pixel_values=pixels, task_inputs=task.expand(batch, -1), mask_labels=masks, class_labels=classes)
        value: Tensor = result.loss.squeeze()
        return value

    fit(model, loss, steps, lr=1e-3, out=out)
    write_half(model, out)


def panoptic_task(tokenizer: CLIPTokenizer) -> Tensor:
    """Return the ids (1, 77) of OneFormer's panoptic task."""
    encoded = tokenizer("the task is panoptic", padding="max_length", max_length=77, return_tensors="pt")
    ids: Tensor = encoded["input_ids"]
    return ids


def write_seg_files(out: Path) -> CLIPTokenizer:
    """Write class file, processor and a tokenizer of single characters; return the tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    write_json(out / "vocab.json", {token: number for number, token in enumerate(tokens)})
    (out / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 77,
        },
    )
    things = [index for index, name in enumerate(CLASSES) if name in SHAPES]
    write_json(
        out / "toyworld_panoptic.json",
        {str(index): {"name": name, "isthing": int(index in things)} for index, name in enumerate(CLASSES)},
    )
    processor = {
        "class_info_file": "toyworld_panoptic.json", "do_normalize": True, "do_reduce_labels": False,
        "do_rescale": True, "do_resize": True, "ignore_index": None, "image_mean": IMAGENET_MEAN,
        "image_processor_type": "OneFormerImageProcessor", "image_std": IMAGENET_STD,
        "metadata": {
            **{str(index): name for index, name in enumerate(CLASSES)},
            "class_names": list(CLASSES),
            "thing_ids": things,
        },
        "num_text": 14, "processor_class": "OneFormerProcessor", "repo_path": "toyworld", "resample": 2,
        "rescale_factor": 1 / 255, "size": {"longest_edge": SIDE, "shortest_edge": SIDE},
    }  # fmt: skip
    write_json(out / "preprocessor_config.json", processor)
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(out)
    return tokenizer


@torch.no_grad()
def score_seg(folder: Path) -> dict[str, float]:
    """Return mean intersection over union of the classes, and the recall of things, on held-out scenes.

    A thing is found where a query of its class covers it at an IoU above 0.5. The baseline calls every pixel by the
    class that is most frequent at its place.
    """
    model = OneFormerForUniversalSegmentation.from_pretrained(folder)
    task = panoptic_task(CLIPTokenizer.from_pretrained(folder))
    truth, predicted, found, things = [], [], 0, 0
    for start in held_out(16):
        pixels, masks, classes = seg_batch("test", start, 16)
        result = model(pixel_values=pixels, task_inputs=task.expand(16, -1))
        probabilities = result.class_queries_logits.softmax(-1)[..., :-1]
        covers = functional.interpolate(
            result.masks_queries_logits, size=(SIDE, SIDE), mode="bilinear", align_corners=False
        ).sigmoid()
        predicted.append(torch.einsum("bqc,bqhw->bchw", probabilities, covers).argmax(1))
        for number, (mask, label) in enumerate(zip(masks, classes, strict=True)):
            truth.append((mask * label[:, None, None]).sum(0).long())
            for each, kind in zip(mask.bool(), label.tolist(), strict=True):
                if kind < len(STUFF):
                    continue
                things += 1
                guesses = covers[number][probabilities[number].argmax(-1) == kind] > 0.5
                union = (guesses | each).sum((1, 2))
                found += bool(((guesses & each).sum((1, 2)) > 0.5 * union).any())
    t, p = torch.stack(truth), torch.cat(predicted)
    majority = torch.stack([(t == c).sum(0) for c in range(len(CLASSES))]).argmax(0).expand_as(t)
    return {
        "test mIoU": mean_iou(p, t),
        "test mIoU of the most frequent class by place": mean_iou(majority, t),
        "test recall of things": found / things,
    }


def mean_iou(predicted: Tensor, truth: Tensor) -> float:
    """Return the mean over classes of intersection over union."""
    ratios = [
        float(((predicted == c) & (truth == c)).sum() / ((predicted == c) | (truth == c)).sum().clamp(min=1))
        for c in range(len(CLASSES))
    ]
    return sum(ratios) / len(ratios)
