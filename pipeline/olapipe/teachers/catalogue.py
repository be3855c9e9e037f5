"""The built-in teachers: published checkpoint, licence, shape and options of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from olapipe.teachers.base import COMMON_OPTIONS, Option
from olapipe.teachers.info import TeacherInfo


def _image_options(view: str, *views: str, size: str = "own") -> dict[str, Option]:
    """Return the options that choose which part of the image is seen, and at which size."""
    allowed = ("own",) if size == "own" else ()
    return {
        **COMMON_OPTIONS,
        "view": Option(
            (view, *views), view, view,
            "what is seen: as the checkpoint's processor does it (own), the whole image squashed to a square, "
            "or the largest centred square",
        ),
        "image_size": Option(
            allowed, size, size, "side of the square input in pixels",
            pattern=r"[1-9]\d{1,3}", form="pixels, such as 336",
        ),
    }  # fmt: skip


def _tower_options(taps: str, norm: str) -> Mapping[str, Option]:
    """Return the options of a transformer whose patch tokens are the target."""
    return _image_options("own", "squash", "crop") | {
        "taps": Option(
            (), taps, taps, "blocks whose output is kept, 0-based, negative ones from the end",
            pattern=r"-?\d+(,-?\d+)*", form="one number, or several in ascending order such as 4,11,17,23",
        ),
        "pooling": Option(
            ("mean", "last", "concat"), "mean", "mean", "of several taps: their mean, the last one, or all channels"
        ),
        "norm": Option(
            ("final", "none"), norm, norm, "whether the model's final norm is applied to each tap"
        ),
    }  # fmt: skip


_DEPTH_OPTIONS: Mapping[str, Option] = {
    **COMMON_OPTIONS,
    "channel_order": replace(COMMON_OPTIONS["channel_order"], ola_vlm="bgr"),
    "position_interpolation": Option(
        ("size", "scale"), "size", "scale",
        "position embedding resized to the grid as transformers does, or by the original code's factor",
    ),
}  # fmt: skip

BUILT_IN = (
    TeacherInfo(
        name="depth",
        published="depth-anything/Depth-Anything-V2-Large-hf",
        licence="CC-BY-NC-4.0",
        about="Depth Anything V2: patch tokens that know distance, occlusion and layout",
        grid=(24, 24),
        channels=1024,
        module="olapipe.teachers.depth",
        options={
            **_DEPTH_OPTIONS,
            "pooling": Option(("mean", "last"), "mean", "mean", "mean over the tapped blocks, or the last one"),
        },
    ),
    TeacherInfo(
        name="seg",
        published="shi-labs/oneformer_coco_swin_large",
        licence="MIT",
        about="OneFormer's Swin backbone: what is an object and where it ends",
        grid=(24, 24),
        channels=1536,
        module="olapipe.teachers.seg",
        options=COMMON_OPTIONS,
    ),
    TeacherInfo(
        name="gen",
        published="stabilityai/stable-diffusion-2-1-unclip",
        licence="CreativeML Open RAIL++-M",
        about="unCLIP's image encoder: one vector from which the image can be drawn again",
        grid=None,
        channels=1024,
        module="olapipe.teachers.gen",
        options=COMMON_OPTIONS,
    ),
    TeacherInfo(
        name="depth-map",
        published="depth-anything/Depth-Anything-V2-Large-hf",
        licence="CC-BY-NC-4.0",
        about="Depth Anything V2's answer: the depth map itself, 96 × 96 means",
        grid=(24, 24),
        channels=16,
        module="olapipe.teachers.depth_map",
        options={
            **_DEPTH_OPTIONS,
            "parts": Option((1, 2, 4), 4, 4, "means along each side of a cell"),
            "scale": Option(
                ("model", "image"), "model", "model",
                "the model's own numbers, or each image's map less its median, over its mean absolute deviation",
            ),
        },
    ),
    TeacherInfo(
        name="dinov2",
        published="facebook/dinov2-large",
        licence="Apache-2.0",
        about="DINOv2: parts and objects, matched across images without any label",
        grid=(16, 16),
        channels=1024,
        module="olapipe.teachers.vision",
        options=_tower_options("-1", "final"),
    ),
    TeacherInfo(
        name="dinov3",
        published="facebook/dinov3-vitl16-pretrain-lvd1689m",
        licence="DINOv3 License",
        about="DINOv3: dense features that stay sharp at any resolution",
        grid=(14, 14),
        channels=1024,
        module="olapipe.teachers.vision",
        options=_tower_options("-1", "final"),
    ),
    TeacherInfo(
        name="siglip",
        published="google/siglip2-large-patch16-384",
        licence="Apache-2.0",
        about="SigLIP 2 (fixed resolution): what things are called, localised better than in CLIP",
        grid=(24, 24),
        channels=1024,
        module="olapipe.teachers.vision",
        options=_tower_options("-1", "final"),
    ),
    TeacherInfo(
        name="clip",
        published="openai/clip-vit-large-patch14-336",
        licence="MIT",
        about="CLIP as LLaVA reads it (patch tokens of the last block but one): the student's own frozen tower",
        grid=(24, 24),
        channels=1024,
        module="olapipe.teachers.vision",
        options=_tower_options("-2", "none"),
    ),
    TeacherInfo(
        name="sam",
        published="facebook/sam-vit-large",
        licence="Apache-2.0",
        about="Segment Anything's image encoder: edges and regions at a fine grid",
        grid=(64, 64),
        channels=256,
        module="olapipe.teachers.sam",
        options=COMMON_OPTIONS,
    ),
    TeacherInfo(
        name="internvit",
        published="OpenGVLab/InternVL3-1B-hf",
        licence="MIT",
        about="InternViT, the vision tower of InternVL: text in images, charts, documents",
        grid=(32, 32),
        channels=1024,
        module="olapipe.teachers.vision",
        options=_tower_options("-1", "none"),
    ),
    TeacherInfo(
        name="sd-vae",
        published="stabilityai/sd-vae-ft-mse",
        licence="MIT",
        about="Stable Diffusion's autoencoder: latents from which the pixels can be decoded again",
        grid=(64, 64),
        channels=4,
        module="olapipe.teachers.diffusion",
        options=_image_options("squash", "crop", size="512"),
    ),
    TeacherInfo(
        name="sd-unet",
        published="stable-diffusion-v1-5/stable-diffusion-v1-5",
        licence="CreativeML Open RAIL-M",
        about="Stable Diffusion's U-Net, middle block: layout and semantics that a generator uses",
        grid=(8, 8),
        channels=1280,
        module="olapipe.teachers.diffusion",
        options=_image_options("squash", "crop", size="512")
        | {
            # 261 is where DIFT (arXiv 2306.03881) finds semantic correspondence best.
            "timestep": Option((), "261", "261", "noise level, 0-based", pattern=r"\d{1,4}", form="a step such as 261"),
        },
    ),
    TeacherInfo(
        name="hf",
        published="",
        licence="that of the checkpoint's model card",
        about="any vision model of transformers: patch tokens or maps of chosen blocks",
        grid=None,
        channels=0,
        module="olapipe.teachers.vision",
        options={
            **_tower_options("-1", "final"),
            "licence": Option(
                ("card",), "card", "card", "licence of the checkpoint: the one its README.md states, or this text",
                pattern=r"\S.*", form="the name of the licence",
            ),
        },
    ),
)  # fmt: skip
