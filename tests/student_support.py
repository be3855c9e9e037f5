"""Tiny students of random weights, in the layouts that transformers gives the real ones."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Phi3Config,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from olatrain.tokens import TaskTokens

HIDDEN = 32
LAYERS = 4
VOCABULARY = 96
IMAGE_ID = 90
PAD_ID = 91
_TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "pad_token_id": PAD_ID,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def task_tokens(
    teachers: tuple[str, ...] = ("gen", "depth"), size: int = 2, *, image_length: int | None = 4
) -> TaskTokens:
    first = 60
    ids = {t: tuple(range(first + n * size, first + (n + 1) * size)) for n, t in enumerate(teachers)}
    flat = [i for group in ids.values() for i in group]
    return TaskTokens(
        teachers=teachers,
        tokens_per_teacher=size,
        ids=ids,
        image_id=IMAGE_ID,
        image_length=image_length,
        never_predicted=tuple(sorted((*flat, IMAGE_ID, PAD_ID))),
    )


def _vision() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )


def _llava(text: Any) -> nn.Module:
    config = LlavaConfig(vision_config=_vision(), text_config=text, image_token_index=IMAGE_ID, image_seq_length=4)
    return LlavaForConditionalGeneration(config)


def _llava_next() -> nn.Module:
    config = LlavaNextConfig(
        vision_config=_vision(),
        text_config=LlamaConfig(**_TEXT),
        image_token_index=IMAGE_ID,
        image_grid_pinpoints=[[28, 56], [56, 28]],
    )
    return LlavaNextForConditionalGeneration(config)


def _idefics3() -> nn.Module:
    config = Idefics3Config(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 7,
        },
        text_config={"model_type": "llama", **_TEXT},
        image_token_id=IMAGE_ID,
        scale_factor=2,
        pad_token_id=PAD_ID,
    )
    return Idefics3ForConditionalGeneration(config)


def _qwen() -> nn.Module:
    config = Qwen2_5_VLConfig(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "depth": 2,
            "num_heads": 2,
            "patch_size": 7,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": HIDDEN,
            "window_size": 28,
            "fullatt_block_indexes": [1],
        },
        text_config={
            "model_type": "qwen2_5_vl_text",
            **_TEXT,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        image_token_id=IMAGE_ID,
        vision_start_token_id=92,
        vision_end_token_id=93,
        video_token_id=94,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


FAMILIES = {
    "llava-llama": lambda: _llava(LlamaConfig(**_TEXT)),
    "llava-phi3": lambda: _llava(Phi3Config(**_TEXT)),
    "llava-next": _llava_next,
    "idefics3": _idefics3,
    "qwen2.5-vl": _qwen,
}


def build(family: str = "llava-llama") -> nn.Module:
    """A student of random weights, the same ones each time; larger than usual, so that layers differ visibly."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model


def inputs(family: str, tokens: TaskTokens, *, prefix: int = 3, suffix: int = 5, seed: int = 1) -> dict[str, Tensor]:
    """One sample: text, one image, task tokens, text."""
    generator = torch.Generator().manual_seed(seed)
    extra: dict[str, Tensor] = {}
    placeholders = [IMAGE_ID] * 4
    if family in ("llava-llama", "llava-phi3"):
        pixels = torch.randn(1, 3, 28, 28, generator=generator)
    elif family == "llava-next":
        pixels = torch.randn(1, 3, 3, 28, 28, generator=generator)
        extra["image_sizes"] = torch.tensor([[28, 56]])
        # base view, and two tiles side by side with a newline embedding after each row
        placeholders = [IMAGE_ID] * (4 + 2 * (4 + 1))
    elif family == "idefics3":
        pixels = torch.randn(1, 3, 3, 28, 28, generator=generator)
        placeholders = [50, *[IMAGE_ID] * 4, 51, *[IMAGE_ID] * 4, 52, *[IMAGE_ID] * 4]
    else:
        pixels = torch.randn(16, 3 * 2 * 7 * 7, generator=generator)
        extra["image_grid_thw"] = torch.tensor([[1, 4, 4]])
    before = torch.randint(3, 50, (prefix,), generator=generator).tolist()
    after = torch.randint(3, 50, (suffix,), generator=generator).tolist()
    opening, closing = ([92], [93]) if family == "qwen2.5-vl" else ([], [])
    ids = torch.tensor([[*before, *opening, *placeholders, *closing, *tokens.flat, *after]])
    if family == "qwen2.5-vl":
        extra["mm_token_type_ids"] = (ids == IMAGE_ID).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, **extra}


def twin(model: nn.Module) -> nn.Module:
    """A copy of the bare model, made before a Student puts its hooks on."""
    return copy.deepcopy(model)
