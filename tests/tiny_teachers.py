"""Checkpoints of the further teachers in their real layouts, a few kilobytes of random numbers each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    ConvNextConfig,
    ConvNextModel,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    InternVLConfig,
    InternVLForConditionalGeneration,
    SamConfig,
    SamModel,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging as transformers_logging

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
USUAL = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Replace zeros, ones and 1e-6 by values that matter: a swapped or dropped tensor must show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def save(model: Any, folder: Path, processor: dict[str, Any]) -> Path:
    randomise(model, len(folder.name))
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder)
    if shown:
        transformers_logging.enable_progress_bar()
    write_json(folder / "preprocessor_config.json", USUAL | processor)
    return folder


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


# As published: resized to 64, cropped to 56 (4 × 4 patches), trained on a 5 × 5 grid.
BIT = {
    "image_processor_type": "BitImageProcessor", "resample": 3, "size": {"shortest_edge": 64}, "do_center_crop": True,
    "crop_size": square(56), "do_convert_rgb": True,
}  # fmt: skip


def make_dinov2(folder: Path) -> Path:
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=70, patch_size=14
    )
    return save(Dinov2Model(config), folder, IMAGENET | BIT)


def make_dinov2_with_registers(folder: Path) -> Path:
    config = Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=70, patch_size=14,
        num_register_tokens=3,
    )  # fmt: skip
    return save(Dinov2WithRegistersModel(config), folder, IMAGENET | BIT)


def make_dinov3(folder: Path) -> Path:
    config = DINOv3ViTConfig(**SMALL, image_size=64, patch_size=16, num_register_tokens=4)
    published = {"image_processor_type": "DINOv3ViTImageProcessorFast", "resample": 2, "do_center_crop": None}
    return save(DINOv3ViTModel(config), folder, IMAGENET | published | {"size": square(64), "crop_size": None})


def make_siglip(folder: Path) -> Path:
    config = SiglipConfig(
        vision_config={**SMALL, "image_size": 64, "patch_size": 16},
        text_config={**TEXT, "max_position_embeddings": 8, "projection_size": 32},
    )
    published = {"image_processor_type": "SiglipImageProcessor", "resample": 2, "size": square(64)}
    return save(SiglipModel(config), folder, HALF | published)


def make_clip(folder: Path) -> Path:
    config = CLIPConfig(
        vision_config={**SMALL, "image_size": 56, "patch_size": 14, "hidden_act": "quick_gelu"},
        text_config={**TEXT, "max_position_embeddings": 8},
        projection_dim=16,
    )
    # the older spelling, as in openai/clip-vit-large-patch14-336
    published = {
        "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3, "size": 56, "crop_size": 56,
        "do_center_crop": True,
    }  # fmt: skip
    return save(CLIPModel(config), folder, CLIP | published)


def make_sam(folder: Path) -> Path:
    config = SamConfig(
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "output_channels": 16,
            "image_size": 64, "patch_size": 16, "window_size": 3, "global_attn_indexes": [1], "mlp_dim": 48,
            "num_pos_feats": 8,
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
    )  # fmt: skip
    published = {
        "image_processor_type": "SamImageProcessor", "resample": 2, "size": {"longest_edge": 64}, "do_pad": True,
        "pad_size": square(64),
    }  # fmt: skip
    return save(SamModel(config), folder, IMAGENET | published)


def make_internvit(folder: Path) -> Path:
    config = InternVLConfig(
        vision_config={**SMALL, "image_size": [56, 56], "patch_size": [14, 14], "use_mean_pooling": True},
        text_config={
            "model_type": "qwen2", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32,
        },
    )  # fmt: skip
    published = {
        "image_processor_type": "GotOcr2ImageProcessorFast", "resample": 3, "size": square(56), "crop_to_patches": False
    }  # fmt: skip
    return save(InternVLForConditionalGeneration(config), folder, IMAGENET | published)


def make_vit(folder: Path) -> Path:
    """Make a classifier, whose head and missing pooler the `hf` teacher has to cope with, with a model card."""
    config = ViTConfig(**SMALL, image_size=48, patch_size=16)
    save(ViTForImageClassification(config), folder, HALF | {
        "image_processor_type": "ViTImageProcessor", "resample": 2, "size": square(48),
    })  # fmt: skip
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- vision\n---\n\n# A model\n")
    return folder


def make_convnext(folder: Path) -> Path:
    config = ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], image_size=64)
    processor = {"image_processor_type": "ViTImageProcessor", "resample": 3, "size": square(64)}
    return save(ConvNextModel(config), folder, IMAGENET | processor)


def make_sd(folder: Path) -> Path:
    """Make a Stable Diffusion 1 pipeline: 2 halvings in the autoencoder, 1 in the U-Net."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=4, norm_num_groups=4,
        sample_size=32, scaling_factor=0.18215,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    text = CLIPTextModel(CLIPTextConfig(**TEXT, max_position_embeddings=8, bos_token_id=1, eos_token_id=2))
    for seed, (name, model) in enumerate({"vae": vae, "unet": unet, "text_encoder": text}.items()):
        randomise(model, seed)
        model.save_pretrained(folder / name)
    vocabulary = ["!", "<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>"]
    write_json(folder / "tokenizer" / "vocab.json", {word: index for index, word in enumerate(vocabulary)})
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    write_json(
        folder / "tokenizer" / "tokenizer_config.json",
        special | {"pad_token": "!", "model_max_length": 8, "tokenizer_class": "CLIPTokenizer"},
    )
    write_json(folder / "scheduler" / "scheduler_config.json", {
        "_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
        "num_train_timesteps": 1000, "trained_betas": None,
    })  # fmt: skip
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    return folder


def make_depth_map(folder: Path) -> Path:
    """Make a Depth Anything V2 whose answer is not cut to zero by its last ReLU."""
    backbone = Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=70, patch_size=14,
        out_indices=[1, 2, 3, 4], reshape_hidden_states=False,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=32, neck_hidden_sizes=[4, 8, 12, 16], fusion_hidden_size=8,
        head_hidden_size=6,
    )  # fmt: skip
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = DepthAnythingForDepthEstimation(config)
        for parameter in (*model.neck.parameters(), *model.head.parameters()):
            parameter.add_(torch.randn(parameter.shape) * 0.15)
        model.head.conv3.bias.fill_(3.0)
    published = {"image_processor_type": "DPTImageProcessor", "resample": 3, "size": square(70)}
    return save(model, folder, IMAGENET | published)


MAKERS: dict[str, Callable[[Path], Path]] = {
    "dinov2": make_dinov2, "dinov3": make_dinov3, "siglip": make_siglip, "clip": make_clip, "sam": make_sam,
    "internvit": make_internvit, "hf": make_vit, "depth-map": make_depth_map,
}  # fmt: skip
