"""Tiny checkpoints for the demo, in the on-disk layouts of the published ones, with seeded random weights.

    python examples/demo/checkpoints.py OUT

writes `OUT/depth` (Depth Anything V2), `OUT/seg` (OneFormer with a Swin backbone), `OUT/gen` (the image encoder of
unCLIP), `OUT/vision` (a CLIP tower) and `OUT/llm` (a Llama, or a Phi-3 with `--llm phi3`). Nothing is trained and
nothing is downloaded: the teachers are random functions of the image. They show that the path works, and their
features mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from photographs import catalogue_texts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    LlamaConfig,
    LlamaForCausalLM,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SwinConfig,
)
from transformers.utils import logging

Family = Literal["llama", "phi3"]

SEED = 20250101
VOCABULARY = 512
CONTEXT_LENGTH = 2048

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
BICUBIC, BILINEAR = 3, 2
RESCALE = 1 / 255

# A few of COCO's panoptic classes: enough for the class file and the decoder's shape.
CLASSES = [("person", 1), ("cat", 1), ("cup", 1), ("motorcycle", 1), ("sky-other-merged", 0), ("grass-merged", 0)]

TASKS = ("panoptic", "instance", "semantic")

LLAMA_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PHI3_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)


@contextmanager
def _seeded(name: str) -> Iterator[None]:
    """Seed torch's CPU generator by the checkpoint's name and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED + zlib.crc32(name.encode()))
        yield


def _save(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)


def _taps(**taps: list[int] | list[str]) -> dict[str, Any]:
    # the backbone configs take their taps through the base class, which their signatures don't show
    return dict(taps)


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8", newline="\n")


def build_depth(folder: Path) -> None:
    """Write a Depth Anything V2: 48 channels, 8 blocks of which 2, 4, 6 and 8 are tapped, patches of 14 pixels."""
    backbone = Dinov2Config(
        hidden_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        image_size=518,
        patch_size=14,
        apply_layernorm=True,
        reshape_hidden_states=False,
        **_taps(out_indices=[2, 4, 6, 8]),
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=14,
        reassemble_hidden_size=48,
        neck_hidden_sizes=[16, 32, 48, 48],
        fusion_hidden_size=32,
        head_hidden_size=16,
    )
    with _seeded("depth"):
        _save(DepthAnythingForDepthEstimation(config), folder)
    _write_json(
        folder / "preprocessor_config.json",
        {
            "do_normalize": True,
            "do_pad": False,
            "do_rescale": True,
            "do_resize": True,
            "ensure_multiple_of": 14,
            "image_mean": IMAGENET_MEAN,
            "image_processor_type": "DPTImageProcessor",
            "image_std": IMAGENET_STD,
            "keep_aspect_ratio": True,
            "resample": BICUBIC,
            "rescale_factor": RESCALE,
            "size": {"height": 518, "width": 518},
            "size_divisor": None,
        },
    )


def build_seg(folder: Path) -> None:
    """Write a OneFormer whose Swin backbone ends in a map of 96 channels, with class file and CLIP tokenizer."""
    backbone = SwinConfig(
        embed_dim=12,
        depths=[1, 1, 2, 1],
        num_heads=[2, 2, 2, 2],
        window_size=7,
        **_taps(out_features=["stage1", "stage2", "stage3", "stage4"]),
    )
    names = [name for name, _ in CLASSES]
    vocabulary, merges = _clip_vocabulary([*names, *(f"the task is {task}" for task in TASKS)])
    config = OneFormerConfig(
        backbone_config=backbone,
        conv_dim=32,
        mask_dim=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        dim_feedforward=32,
        num_attention_heads=4,
        num_queries=10,
        query_dec_layers=2,
        text_encoder_width=32,
        text_encoder_num_layers=1,
        text_encoder_n_ctx=4,
        text_encoder_vocab_size=len(vocabulary),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    with _seeded("seg"):
        _save(OneFormerForUniversalSegmentation(config), folder)
    _write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8", newline="\n")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 77,
        },
    )
    _write_json(
        folder / "coco_panoptic.json",
        {str(index): {"name": name, "isthing": thing} for index, (name, thing) in enumerate(CLASSES)},
    )
    _write_json(
        folder / "preprocessor_config.json",
        {
            "class_info_file": "coco_panoptic.json",
            "do_normalize": True,
            "do_reduce_labels": False,
            "do_rescale": True,
            "do_resize": True,
            "ignore_index": None,
            "image_mean": IMAGENET_MEAN,
            "image_processor_type": "OneFormerImageProcessor",
            "image_std": IMAGENET_STD,
            "metadata": {
                **{str(index): name for index, name in enumerate(names)},
                "class_names": names,
                "thing_ids": [index for index, (_, thing) in enumerate(CLASSES) if thing],
            },
            "num_text": 6,
            "processor_class": "OneFormerProcessor",
            "repo_path": "shi-labs/oneformer_demo",
            "resample": BILINEAR,
            "rescale_factor": RESCALE,
            "size": {"longest_edge": 1333, "shortest_edge": 800},
        },
    )


def build_gen(folder: Path) -> None:
    """Write the part of an unCLIP pipeline that sees images: embeddings of 32 values from 224 × 224 pixels."""
    config = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=224,
        patch_size=14,
        projection_dim=32,
        hidden_act="gelu",
        # At the default of 1 the class token hardly heeds the patches: its mean over the demo's images makes up 89 %
        # of the embeddings' energy, against 65 % here.
        initializer_factor=2.0,
    )
    with _seeded("gen"):
        _save(CLIPVisionModelWithProjection(config), folder / "image_encoder")
    _write_json(folder / "feature_extractor" / "preprocessor_config.json", _clip_preprocessing(224))
    # The pipeline's other parts are not here; diffusers' way to say so is a pair of nulls.
    absent = ("image_normalizer", "image_noising_scheduler", "scheduler", "text_encoder", "tokenizer", "unet", "vae")
    index: dict[str, Any] = {
        "_class_name": "StableUnCLIPImg2ImgPipeline",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    }
    _write_json(folder / "model_index.json", index | {part: [None, None] for part in absent})


def build_vision(folder: Path) -> None:
    """Write a CLIP tower of 48 channels and 4 layers: 576 patch tokens from 336 × 336 pixels, as LLaVA-1.5 uses."""
    config = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
        projection_dim=32,
        hidden_act="quick_gelu",
    )
    with _seeded("vision"):
        _save(CLIPVisionModel(config), folder)
    _write_json(folder / "preprocessor_config.json", _clip_preprocessing(336))


def _clip_preprocessing(side: int) -> dict[str, Any]:
    return {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": CLIP_MEAN,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": CLIP_STD,
        "resample": BICUBIC,
        "rescale_factor": RESCALE,
        "size": {"shortest_edge": side},
    }


def build_llm(folder: Path, family: Family = "llama") -> None:
    """Write a language model of 64 channels and 6 layers with its tokenizer and chat template.

    `llama` has grouped queries (4 heads, 2 of keys and values) and Llama-3's turns, `phi3` has Phi-3's. The
    tokenizer is a byte-level BPE of 512 ids trained on the demo's captions: any text can be encoded.
    """
    tokenizer = _llm_tokenizer(family)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if family == "llama" else 4,
        "max_position_embeddings": CONTEXT_LENGTH,
        # Large enough that the frozen model moves image content to the task tokens, which start from a standard normal:
        # at 0.02 less than 0.1 % of their energy differs between images after block 4, here 23 %.
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with _seeded(f"llm-{family}"):
        if family == "llama":
            _save(LlamaForCausalLM(LlamaConfig(**settings)), folder)
        else:
            _save(Phi3ForCausalLM(Phi3Config(**settings, original_max_position_embeddings=CONTEXT_LENGTH)), folder)
    tokenizer.save_pretrained(folder)


def _llm_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    if family == "llama":
        bos, eos, pad = "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"
        special = [bos, eos, pad, "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"]
        template = LLAMA_TEMPLATE
    else:
        bos, eos, pad = "<s>", "<|endoftext|>", "<|endoftext|>"
        special = [bos, eos, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
        template = PHI3_TEMPLATE
    bpe = _train_bpe([*catalogue_texts(), "system user assistant"], special)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bpe.token_to_id(bos))]
    )
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=[token for token in special if token not in (bos, eos, pad)],
        model_max_length=CONTEXT_LENGTH,
    )
    tokenizer.chat_template = template
    return tokenizer


def _train_bpe(texts: list[str], special: list[str]) -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def _clip_vocabulary(texts: list[str]) -> tuple[dict[str, int], list[str]]:
    """Train CLIP's kind of BPE (byte-level, words closed by `</w>`) and return `vocab.json` and the merges.

    As in CLIP's own vocabulary every byte stands twice, within a word and at its end, and the two special tokens
    come last.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    merges = [" ".join(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    merged = [merge.replace(" ", "") for merge in merges]
    tokens = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet), *merged, "<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges


BUILDERS: dict[str, Callable[[Path], None]] = {
    "depth": build_depth,
    "seg": build_seg,
    "gen": build_gen,
    "vision": build_vision,
}


def main(arguments: list[str] | None = None) -> int:
    """Write every checkpoint into the folder named on the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Write the demo's tiny checkpoints, with random weights.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to, made if missing")
    parser.add_argument("--llm", choices=get_args(Family), default="llama", help="family of the language model")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # a bar for a megabyte says nothing
    out: Path = options.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, build in BUILDERS.items():
            build(out / name)
        build_llm(out / "llm", options.llm)
    except OSError as error:
        print(f"error: {out} can't be written: {error}\nName a folder you may write to.", file=sys.stderr)
        return 1
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{folder}  {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
