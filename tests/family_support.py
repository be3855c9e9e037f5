"""Tiny checkpoints of each family of students, saved in the layouts that transformers gives the real ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from trainer_support import LLAMA, byte_tokenizer
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    Phi3Config,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

FAMILIES = ("llava-llama", "llava-phi3", "llava-next", "idefics3", "qwen2.5-vl")
LAYERS = 4
HIDDEN = 32
_SIDE = 28
_SQUARE = {"height": _SIDE, "width": _SIDE}
# content as a list only, as llava-hf writes its templates
PARTS = (
    "{{ bos_token }}{% for message in messages %}<|start|>{{ message['role'] }}<|sep|>"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|sep|>{% endif %}"
)
# a string or a list, as Qwen2.5-VL does
QWEN = (
    "{% for message in messages %}<|start|>{{ message['role'] }}<|sep|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|sep|>{% endif %}"
)


def _text(vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.1,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip


def _vision(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": _SIDE, "initializer_range": 0.1, **more,
    }  # fmt: skip


def _tokenizer(template: str, *extra: str) -> Any:
    tokenizer = byte_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": [*tokenizer.additional_special_tokens, *extra]}) if (
        hasattr(tokenizer, "additional_special_tokens")
    ) else tokenizer.add_tokens(list(extra), special_tokens=True)
    return tokenizer


def make_checkpoint(folder: Path, family: str) -> Path:
    """A checkpoint of random weights, larger than usual, so that layers differ visibly."""
    torch.manual_seed(11)
    model, processor = _MAKERS[family]()
    model = model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)
    model.save_pretrained(folder)
    for part in processor:
        part.save_pretrained(folder)
    return folder


def _llava(phi3: bool = False) -> tuple[nn.Module, Sequence[Any]]:
    tokenizer = _tokenizer(LLAMA, "<image>")
    image = tokenizer.convert_tokens_to_ids("<image>")
    text = Phi3Config(**_text(len(tokenizer))) if phi3 else LlamaConfig(**_text(len(tokenizer)))
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_vision(patch_size=14)), text_config=text,
        image_token_index=image, image_seq_length=4,
    )  # fmt: skip
    images = CLIPImageProcessorPil(size=_SQUARE, crop_size=_SQUARE, do_center_crop=False)
    processor = LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=LLAMA,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config), (processor,)


def _llava_next() -> tuple[nn.Module, Sequence[Any]]:
    tokenizer = _tokenizer(PARTS, "<image>")
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_vision(patch_size=14)), text_config=LlamaConfig(**_text(len(tokenizer))),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_grid_pinpoints=pinpoints,
    )  # fmt: skip
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": _SIDE}, crop_size=_SQUARE, image_grid_pinpoints=pinpoints
    )
    processor = LlavaNextProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=PARTS,
    )  # fmt: skip
    return LlavaNextForConditionalGeneration(config), (processor,)


def _idefics3() -> tuple[nn.Module, Sequence[Any]]:
    rows = [f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)]
    tokenizer = _tokenizer(PARTS, "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *rows)
    config = Idefics3Config(
        vision_config=_vision(patch_size=7), text_config={"model_type": "llama", **_text(len(tokenizer))},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), scale_factor=2, pad_token_id=2,
    )  # fmt: skip
    images = Idefics3ImageProcessorPil(size={"longest_edge": 2 * _SIDE}, max_image_size={"longest_edge": _SIDE})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=PARTS)
    return Idefics3ForConditionalGeneration(config), (processor,)


def _qwen() -> tuple[nn.Module, Sequence[Any]]:
    tokenizer = _tokenizer(QWEN, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    config = Qwen2_5_VLConfig(
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "depth": 2, "num_heads": 2, "patch_size": 7,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": HIDDEN, "window_size": 28,
            "fullatt_block_indexes": [1],
        },
        text_config={
            "model_type": "qwen2_5_vl_text", **_text(len(tokenizer)),
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"), vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"], video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )  # fmt: skip
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 14 * 14, "longest_edge": 8 * 14 * 14}, patch_size=7, merge_size=2
    )
    return Qwen2_5_VLForConditionalGeneration(config), (tokenizer, images)


_MAKERS = {
    "llava-llama": _llava,
    "llava-phi3": lambda: _llava(phi3=True),
    "llava-next": _llava_next,
    "idefics3": _idefics3,
    "qwen2.5-vl": _qwen,
}
