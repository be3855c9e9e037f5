"""Checkpoints of the published teachers' architectures with random weights, in the layouts that `olapipe` loads.

The values are those by which the published `config.json` and `preprocessor_config.json` differ from the defaults of
the named class, as far as they change what is computed. Each architecture's own source stands beside it. `reduced`
keeps the inputs (so preprocessing costs the same) and takes a quarter of the channels, heads and blocks.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
USUAL = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
BICUBIC, BILINEAR = 3, 2
# ViT-L, arXiv 2010.11929, table 1: the size of most teachers
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
LARGE_MLP = {**LARGE, "intermediate_size": 4096}
SMALL = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
SMALL_MLP = {**SMALL, "intermediate_size": 1024}


@dataclass(frozen=True)
class Published:
    """One architecture. `wrap` puts the model's config into that of the checkpoint, `prefix` its tensors."""

    source: str
    config_class: str
    model_class: str
    values: Mapping[str, Any]
    reduced: Mapping[str, Any]
    processor: Mapping[str, Any]
    wrap: Callable[[dict[str, Any]], dict[str, Any]] = field(default=dict)
    prefix: str = ""
    model_folder: str = ""
    processor_folder: str = ""


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _cropped(resized: int, side: int) -> dict[str, Any]:
    return {"size": {"shortest_edge": resized}, "do_center_crop": True, "crop_size": _square(side)}


_DEPTH_LARGE = {**LARGE, "mlp_ratio": 4, "image_size": 518, "patch_size": 14, "out_indices": [5, 12, 18, 24]}
_DEPTH_SMALL = {"out_indices": [2, 3, 5, 6]}
_DEPTH_PROCESSOR = {
    "image_processor_type": "DPTImageProcessor", "resample": BICUBIC, "size": _square(518), **IMAGENET,
}  # fmt: skip

TRANSFORMERS: Mapping[str, Published] = {
    "depth": Published(
        source="Depth Anything V2 ViT-L (arXiv 2406.09414): DINOv2 ViT-L/14, taps 4, 11, 17, 23",
        config_class="Dinov2Config", model_class="Dinov2Backbone",
        values=_DEPTH_LARGE,
        reduced={**SMALL, **_DEPTH_SMALL},
        processor=_DEPTH_PROCESSOR,
        wrap=lambda values: {"model_type": "depth_anything", "backbone_config": values},
        prefix="backbone.",
    ),
    "depth-map": Published(
        source="Depth Anything V2 ViT-L (arXiv 2406.09414) with its DPT head (arXiv 2103.13413)",
        config_class="DepthAnythingConfig", model_class="DepthAnythingForDepthEstimation",
        values={
            "backbone_config": {"model_type": "dinov2", "reshape_hidden_states": False, **_DEPTH_LARGE},
            "reassemble_hidden_size": 1024, "neck_hidden_sizes": [256, 512, 1024, 1024], "fusion_hidden_size": 256,
        },
        reduced={
            "backbone_config": {
                "model_type": "dinov2", "reshape_hidden_states": False, **_DEPTH_LARGE, **SMALL, **_DEPTH_SMALL,
            },
            "reassemble_hidden_size": 256, "neck_hidden_sizes": [64, 128, 256, 256], "fusion_hidden_size": 64,
        },
        processor=_DEPTH_PROCESSOR,
    ),
    "seg": Published(
        source="OneFormer Swin-L (arXiv 2211.06220): Swin-L, window 12, pretrained at 384 (arXiv 2103.14030)",
        config_class="SwinConfig", model_class="SwinBackbone",
        values={
            "embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], "window_size": 12,
            "image_size": 384, "out_features": ["stage4"],
        },
        reduced={"embed_dim": 48, "depths": [1, 1, 4, 1], "num_heads": [2, 3, 6, 12]},
        processor={
            "image_processor_type": "OneFormerImageProcessor", "resample": BILINEAR,
            "size": {"shortest_edge": 800, "longest_edge": 1333}, **IMAGENET,
        },
        wrap=lambda values: {"model_type": "oneformer", "backbone_config": values},
        prefix="model.pixel_level_module.encoder.",
    ),
    "gen": Published(
        source="Stable unCLIP 2.1's image encoder: CLIP ViT-H/14 (OpenCLIP; arXiv 2212.07143)",
        config_class="CLIPVisionConfig", model_class="CLIPVisionModelWithProjection",
        values={
            "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
            "image_size": 224, "patch_size": 14, "hidden_act": "gelu", "projection_dim": 1024,
        },
        reduced={
            "hidden_size": 320, "intermediate_size": 1280, "num_hidden_layers": 8, "num_attention_heads": 4,
            "projection_dim": 256,
        },
        processor={"image_processor_type": "CLIPImageProcessor", "resample": BICUBIC, **_cropped(224, 224), **CLIP},
        model_folder="image_encoder", processor_folder="feature_extractor",
    ),
    "dinov2": Published(
        source="DINOv2 ViT-L/14 (arXiv 2304.07193)",
        config_class="Dinov2Config", model_class="Dinov2Model",
        values={**LARGE, "mlp_ratio": 4, "image_size": 518, "patch_size": 14},
        reduced=SMALL,
        processor={"image_processor_type": "BitImageProcessor", "resample": BICUBIC, **_cropped(256, 224), **IMAGENET},
    ),
    "dinov3": Published(
        source="DINOv3 ViT-L/16 (arXiv 2508.10104)",
        config_class="DINOv3ViTConfig", model_class="DINOv3ViTModel",
        values={**LARGE_MLP, "image_size": 224, "patch_size": 16, "num_register_tokens": 4},
        reduced=SMALL_MLP,
        processor={
            "image_processor_type": "DINOv3ViTImageProcessorFast", "resample": BILINEAR, "size": _square(224),
            **IMAGENET,
        },
    ),
    "siglip": Published(
        source="SigLIP 2 L/16 at 384 (arXiv 2502.14786)",
        config_class="SiglipVisionConfig", model_class="SiglipVisionModel",
        values={**LARGE_MLP, "image_size": 384, "patch_size": 16},
        reduced=SMALL_MLP,
        processor={"image_processor_type": "SiglipImageProcessor", "resample": BILINEAR, "size": _square(384), **HALF},
    ),
    "clip": Published(
        source="CLIP ViT-L/14 at 336 (arXiv 2103.00020)",
        config_class="CLIPVisionConfig", model_class="CLIPVisionModel",
        values={**LARGE_MLP, "image_size": 336, "patch_size": 14, "hidden_act": "quick_gelu"},
        reduced=SMALL_MLP,
        processor={"image_processor_type": "CLIPImageProcessor", "resample": BICUBIC, **_cropped(336, 336), **CLIP},
    ),
    "sam": Published(
        source="Segment Anything ViT-L (arXiv 2304.02643): windows of 14, global attention in four blocks",
        config_class="SamVisionConfig", model_class="SamVisionModel",
        values={
            **LARGE, "mlp_dim": 4096, "image_size": 1024, "patch_size": 16, "window_size": 14,
            "global_attn_indexes": [5, 11, 17, 23], "output_channels": 256,
        },
        reduced={**SMALL, "mlp_dim": 1024, "global_attn_indexes": [2, 5], "output_channels": 64},
        processor={
            "image_processor_type": "SamImageProcessor", "resample": BILINEAR, "size": {"longest_edge": 1024},
            **IMAGENET,
        },
        wrap=lambda values: {"model_type": "sam", "vision_config": values},
    ),
    "internvit": Published(
        source="InternViT-300M at 448, the tower of InternVL3-1B (arXiv 2504.10479)",
        config_class="InternVLVisionConfig", model_class="InternVLVisionModel",
        values={**LARGE_MLP, "image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True},
        reduced=SMALL_MLP,
        processor={
            "image_processor_type": "GotOcr2ImageProcessorFast", "resample": BICUBIC, "size": _square(448), **IMAGENET,
        },
    ),
}  # fmt: skip

SD_SOURCE = "Stable Diffusion 1 (arXiv 2112.10752): KL autoencoder f = 8; U-Net 320, 640, 1280, 1280"
_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}  # fmt: skip
_UNET = {
    "sample_size": 64, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
    "attention_head_dim": 8, "cross_attention_dim": 768, "norm_num_groups": 32,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip
_REDUCED_VAE = {"block_out_channels": [32, 64, 128, 128], "layers_per_block": 1, "norm_num_groups": 8}
_REDUCED_UNET = {"block_out_channels": [80, 160, 320, 320], "layers_per_block": 1, "norm_num_groups": 8}

NAMES = (*TRANSFORMERS, "sd-vae", "sd-unet")


def source_of(name: str) -> str:
    """Say where an architecture is published."""
    return TRANSFORMERS[name].source if name in TRANSFORMERS else SD_SOURCE


def write_checkpoint(name: str, folder: Path, *, full: bool) -> None:
    """Write a checkpoint of one teacher; weights are float16, loaded as float32 like the published ones."""
    if name not in TRANSFORMERS:
        _write_stable_diffusion(folder, full=full, unet=name == "sd-unet")
        return
    published = TRANSFORMERS[name]
    transformers = importlib.import_module("transformers")
    values = {**published.values, **({} if full else published.reduced)}
    config = getattr(transformers, published.config_class)(**values)
    model = getattr(transformers, published.model_class)(config)
    tensors = {f"{published.prefix}{key}": value.half().contiguous() for key, value in model.state_dict().items()}
    inside = folder / published.model_folder
    _write_json(inside / "config.json", published.wrap(config.to_dict()))
    save_file(tensors, inside / "model.safetensors")
    _write_json(folder / published.processor_folder / "preprocessor_config.json", {**USUAL, **published.processor})


def _write_stable_diffusion(folder: Path, *, full: bool, unet: bool) -> None:
    diffusers: Any = importlib.import_module("diffusers")
    transformers: Any = importlib.import_module("transformers")
    vae = diffusers.AutoencoderKL(**{**_VAE, **({} if full else _REDUCED_VAE)})
    vae.half().save_pretrained(folder / "vae")
    if not unet:
        return
    half_unet = diffusers.UNet2DConditionModel(**{**_UNET, **({} if full else _REDUCED_UNET)}).half()
    half_unet.save_pretrained(folder / "unet")
    # The prompt is always empty and is encoded once, at load: one block of the text encoder is enough here.
    text = transformers.CLIPTextConfig(
        vocab_size=3, hidden_size=768, intermediate_size=768, num_hidden_layers=1, num_attention_heads=12,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.CLIPTextModel(text).half().save_pretrained(folder / "text_encoder")
    words = ["!", "<|startoftext|>", "<|endoftext|>"]
    _write_json(folder / "tokenizer" / "vocab.json", {word: index for index, word in enumerate(words)})
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    special = {"bos_token": words[1], "eos_token": words[2], "unk_token": words[2], "pad_token": words[0]}
    _write_json(
        folder / "tokenizer" / "tokenizer_config.json",
        {**special, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"},
    )
    _write_json(
        folder / "scheduler" / "scheduler_config.json",
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000},
    )


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
