"""What teachers must give: forward passes with transformers, diffusers and Pillow alone, none of our code."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tiny_teachers import CLIP, HALF, IMAGENET

BOUND = 1e-5
"""Relative L2, float32 on CPU: against the passes written here, and batch 1 against batch N."""
DIGEST, OTHER_DIGEST = (hashlib.sha256(name).hexdigest() for name in (b"one", b"other"))


def picture_bytes(seed: int, size: tuple[int, int] = (90, 70), *, orientation: int = 1) -> bytes:
    """A smooth coloured PNG, different in each channel, with an EXIF orientation."""
    values = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    picture = Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", exif=exif)
    return buffer.getvalue()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm())


def normalise(picture: Image.Image, values: dict[str, list[float]]) -> torch.Tensor:
    pixels = (np.asarray(picture, dtype=np.float64) / 255 - values["image_mean"]) / values["image_std"]
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]


def squash(picture: Image.Image, side: int, resample: Image.Resampling) -> Image.Image:
    return picture.resize((side, side), resample)


def crop(picture: Image.Image, shortest: int, side: int) -> Image.Image:
    short = min(picture.size)
    resized = picture.resize(
        (int(shortest * picture.width / short), int(shortest * picture.height / short)), Image.Resampling.BICUBIC
    )
    left, top = (resized.width - side) // 2, (resized.height - side) // 2
    return resized.crop((left, top, left + side, top + side))


def grid(tokens_bnd: torch.Tensor) -> torch.Tensor:
    cells = math.isqrt(tokens_bnd.shape[1])
    return tokens_bnd.reshape(len(tokens_bnd), cells, cells, -1)


def plain_dinov2(folder: Path, picture: Image.Image) -> torch.Tensor:
    model = transformers.Dinov2Model.from_pretrained(folder).eval()
    return grid(model(normalise(crop(picture, 64, 56), IMAGENET)).last_hidden_state[:, 1:])


def plain_registers(folder: Path, picture: Image.Image) -> torch.Tensor:
    model = transformers.Dinov2WithRegistersModel.from_pretrained(folder).eval()
    return grid(model(normalise(crop(picture, 64, 56), IMAGENET)).last_hidden_state[:, 4:])


def plain_dinov3(folder: Path, picture: Image.Image) -> torch.Tensor:
    model = transformers.DINOv3ViTModel.from_pretrained(folder).eval()
    pixels = normalise(squash(picture, 64, Image.Resampling.BILINEAR), IMAGENET)
    return grid(model(pixels).last_hidden_state[:, 5:])


def plain_siglip(folder: Path, picture: Image.Image) -> torch.Tensor:
    model = transformers.SiglipModel.from_pretrained(folder).eval()
    pixels = normalise(squash(picture, 64, Image.Resampling.BILINEAR), HALF)
    return grid(model.vision_model(pixels).last_hidden_state)


def plain_clip(folder: Path, picture: Image.Image) -> torch.Tensor:
    """Layer -2 of LLaVA: the input of the last block, without the class token and without a final norm."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    out = model.vision_model(normalise(crop(picture, 56, 56), CLIP), output_hidden_states=True)
    return grid(out.hidden_states[-2][:, 1:])


def plain_sam(folder: Path, picture: Image.Image) -> torch.Tensor:
    model = transformers.SamModel.from_pretrained(folder).eval()
    pixels = normalise(squash(picture, 64, Image.Resampling.BILINEAR), IMAGENET)
    return model.vision_encoder(pixels).last_hidden_state.permute(0, 2, 3, 1)


def plain_internvit(folder: Path, picture: Image.Image) -> torch.Tensor:
    model = transformers.InternVLForConditionalGeneration.from_pretrained(folder).eval()
    pixels = normalise(squash(picture, 56, Image.Resampling.BICUBIC), IMAGENET)
    return grid(model.model.vision_tower(pixels).last_hidden_state[:, 1:])


def plain_vit(folder: Path, picture: Image.Image) -> torch.Tensor:
    model = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    return grid(model.vit(normalise(squash(picture, 48, Image.Resampling.BILINEAR), HALF)).last_hidden_state[:, 1:])


def plain_convnext(folder: Path, picture: Image.Image) -> torch.Tensor:
    model = transformers.ConvNextModel.from_pretrained(folder).eval()
    pixels = normalise(squash(picture, 64, Image.Resampling.BICUBIC), IMAGENET)
    last = model(pixels, output_hidden_states=True).hidden_states[-1]
    return model.layernorm(last.permute(0, 2, 3, 1))


def plain_latents(folder: Path, picture: Image.Image) -> torch.Tensor:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").eval()
    pixels = normalise(squash(picture, 32, Image.Resampling.LANCZOS), HALF)
    return vae.encode(pixels).latent_dist.mean * 0.18215


def plain_vae(folder: Path, picture: Image.Image) -> torch.Tensor:
    return plain_latents(folder, picture).permute(0, 2, 3, 1)


def plain_noise(digest: str, shape: tuple[int, ...]) -> torch.Tensor:
    """What the docs say of the noise, value by value."""
    count = math.prod(shape)
    words = [int(w) for w in np.random.Philox(key=int.from_bytes(bytes.fromhex(digest)[:16])).random_raw(count)]
    uniform = [(word >> 11) / 2**53 for word in words]
    first, second = uniform[: count // 2], uniform[count // 2 :]
    radius = [math.sqrt(-2 * math.log(1 - u)) for u in first]
    values = [r * math.cos(math.tau * v) for r, v in zip(radius, second, strict=True)]
    values += [r * math.sin(math.tau * v) for r, v in zip(radius, second, strict=True)]
    return torch.tensor(values, dtype=torch.float32).reshape(1, *shape)


def plain_unet(folder: Path, picture: Image.Image, *, step: int = 261, digest: str = DIGEST) -> torch.Tensor:
    from diffusers import DDPMScheduler, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    ids = tokenizer("", padding="max_length", max_length=8, return_tensors="pt").input_ids
    assert ids.tolist() == [[1, 2, 0, 0, 0, 0, 0, 0]]
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    latents = plain_latents(folder, picture)
    noisy = scheduler.add_noise(latents, plain_noise(digest, (4, 8, 8)), torch.tensor([step]))
    kept: list[torch.Tensor] = []
    unet.mid_block.register_forward_hook(lambda module, given, output: kept.append(output))
    unet(noisy, step, encoder_hidden_states=text(ids).last_hidden_state)
    return kept[0].permute(0, 2, 3, 1)


Plain = Callable[[Path, Image.Image], torch.Tensor]


@torch.no_grad()
def plain_depth(folder: Path, picture: Image.Image) -> torch.Tensor:
    backbone = transformers.DepthAnythingForDepthEstimation.from_pretrained(folder).eval().backbone
    pixels = normalise(picture.resize((336, 336), Image.Resampling.BICUBIC), IMAGENET)
    maps = backbone(pixels).feature_maps
    assert len(maps) == 4
    return (sum(tokens[:, 1:] for tokens in maps) / 4).reshape(1, 24, 24, -1)


@torch.no_grad()
def plain_depth_map(folder: Path, picture: Image.Image) -> torch.Tensor:
    """Means over 4 x 4 parts of each of 24 x 24 cells of 14 pixels: 3.5 a part, rounded outwards."""
    model = transformers.DepthAnythingForDepthEstimation.from_pretrained(folder).eval()
    answer = model(normalise(picture.resize((336, 336), Image.Resampling.BICUBIC), IMAGENET)).predicted_depth[0]
    means = torch.empty(1, 24, 24, 16)
    for row in range(96):
        for column in range(96):
            top, left = 7 * row // 2, 7 * column // 2
            area = answer[top : -(-7 * (row + 1) // 2), left : -(-7 * (column + 1) // 2)]
            means[0, row // 4, column // 4, 4 * (row % 4) + column % 4] = area.mean()
    return means


@torch.no_grad()
def plain_seg(folder: Path, picture: Image.Image) -> torch.Tensor:
    encoder = (
        transformers.OneFormerForUniversalSegmentation.from_pretrained(folder).eval().model.pixel_level_module.encoder
    )
    squashed = picture.resize((768, 768), Image.Resampling.BICUBIC)
    last = encoder(normalise(squashed.resize((800, 800), Image.Resampling.BILINEAR), IMAGENET)).feature_maps[-1]
    assert last.shape[-2:] == (25, 25)
    # bilinear by hand: the centre of target cell i lies at (i + ½) · 25/24 − ½ of the source
    position = np.clip((np.arange(24) + 0.5) * 25 / 24 - 0.5, 0, 24)
    low = np.minimum(position.astype(int), 23)
    matrix = np.zeros((24, 25))
    matrix[np.arange(24), low], matrix[np.arange(24), low + 1] = 1 - (position - low), position - low
    resized = np.einsum("ih,jw,bchw->bijc", matrix, matrix, last.double().numpy())
    return torch.from_numpy(resized).float()


@torch.no_grad()
def plain_gen(folder: Path, picture: Image.Image) -> torch.Tensor:
    model = transformers.CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder").eval()
    width, height = picture.size
    short = min(width, height)
    resized = picture.resize((int(224 * width / short), int(224 * height / short)), Image.Resampling.BICUBIC)
    left, top = (resized.width - 224) // 2, (resized.height - 224) // 2
    return model(normalise(resized.crop((left, top, left + 224, top + 224)), CLIP)).image_embeds


PUBLISHED: dict[str, Plain] = {"depth": plain_depth, "seg": plain_seg, "gen": plain_gen}
"""The teachers of OLA-VLM at their default preset: upright RGB."""
PLAIN: dict[str, Plain] = {
    "dinov2": plain_dinov2, "dinov3": plain_dinov3, "siglip": plain_siglip, "clip": plain_clip, "sam": plain_sam,
    "internvit": plain_internvit, "hf": plain_vit, "sd-vae": plain_vae, "sd-unet": plain_unet,
    "depth-map": plain_depth_map,
}  # fmt: skip


@torch.no_grad()
def expected(name: str, folder: Path, picture: Image.Image) -> torch.Tensor:
    return PLAIN[name](folder, picture)
