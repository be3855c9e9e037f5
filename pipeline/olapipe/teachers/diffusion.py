"""Stable Diffusion's autoencoder and U-Net as teachers, through diffusers (the optional extra `diffusion`)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from olapipe.teachers.base import Teacher, TeacherSettings, resolve_options
from olapipe.teachers.checkpoint import Checkpoint, locate, read_config, read_weights, weights_digest
from olapipe.teachers.diffusion_models import Schedule, load_part, noise_from_digest, signal_and_noise
from olapipe.teachers.huggingface import TorchTeacher, load_strictly, make_config
from olapipe.teachers.pixels import OURS, OwnPreprocessor, own_arguments, see
from olaschema.errors import TeacherError
from olaschema.manifest import Fingerprint, Scalar

if TYPE_CHECKING:
    from olapipe.teachers.info import TeacherInfo

_TOKENIZER = ("vocab.json", "merges.txt", "tokenizer_config.json")


def load(info: TeacherInfo, settings: TeacherSettings) -> Teacher:
    """Load `sd-vae` or `sd-unet`; raises TeacherError, also where diffusers is not installed."""
    options = resolve_options(info.name, info.options, settings)
    try:
        importlib.import_module("diffusers")
    except ImportError as error:
        raise TeacherError(
            f"{info.name}: it needs diffusers, which cannot be imported: {error}",
            "Install the extra: pip install 'ola-distill[diffusion]'",
        ) from error
    preprocessor = _preprocessor(options)
    return (_load_vae if info.name == "sd-vae" else _load_unet)(info, settings, options, preprocessor)


def _load_vae(
    info: TeacherInfo, settings: TeacherSettings, options: Mapping[str, Scalar], preprocessor: OwnPreprocessor
) -> Teacher:
    checkpoint = locate(info.name, settings.checkpoint or info.published)
    folder = checkpoint.path / "vae" if (checkpoint.path / "vae").is_dir() else checkpoint.path
    vae, tensors = load_part(checkpoint, folder, "AutoencoderKL", keep=_encodes)
    fingerprint = Fingerprint(
        teacher=info.name,
        model_class="AutoencoderKL",
        weights=weights_digest(tensors),
        preset=settings.preset,
        preprocessing=preprocessor.record,
        taps=(),
        pooling="none",
        options=_vae_options(vae),
        grid=_grid(checkpoint, preprocessor.output_size[0], len(vae.config.block_out_channels) - 1),
        channels=int(vae.config.latent_channels),
        compute_dtype=settings.compute_dtype,
    )
    return TorchTeacher(
        Latents(vae), settings, name=info.name, licence=info.licence, source=checkpoint.source,
        preprocessor=preprocessor, fingerprint=fingerprint,
    )  # fmt: skip


def _load_unet(
    info: TeacherInfo, settings: TeacherSettings, options: Mapping[str, Scalar], preprocessor: OwnPreprocessor
) -> Teacher:
    wanted = settings.checkpoint or info.published
    locate(info.name, wanted, subfolder="vae")
    locate(info.name, wanted, subfolder="text_encoder", extra=tuple(f"tokenizer/{name}" for name in _TOKENIZER))
    checkpoint = locate(info.name, wanted, subfolder="unet", extra=("scheduler/scheduler_config.json",))
    vae, vae_tensors = load_part(checkpoint, checkpoint.path / "vae", "AutoencoderKL", keep=_encodes)
    unet, unet_tensors = load_part(
        checkpoint, checkpoint.path / "unet", "UNet2DConditionModel", keep=lambda name: not _after_middle(name)
    )
    _require_plain(checkpoint, unet, vae)
    prompt_1nd, text_tensors = _empty_prompt(checkpoint)
    step = int(options["timestep"])
    schedule = signal_and_noise(checkpoint, checkpoint.path / "scheduler" / "scheduler_config.json", step)
    blocks = len(vae.config.block_out_channels) + len(unet.config.block_out_channels) - 2
    parts = {"vae": vae_tensors, "unet": unet_tensors, "text_encoder": text_tensors}
    named = {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    fingerprint = Fingerprint(
        teacher=info.name,
        model_class="UNet2DConditionModel",
        weights=weights_digest(named),
        preset=settings.preset,
        preprocessing=preprocessor.record,
        taps=(),
        pooling="none",
        options={
            **_vae_options(vae),
            "timestep": step,
            **schedule.record,
            "prompt": "",
            "noise": "normal by Philox and Box-Muller, keyed by the SHA-256 of the image file",
            "unet_attention_head_dim": _text(unet.config.attention_head_dim),
            "unet_activation": str(unet.config.act_fn),
            "unet_norm_groups": int(unet.config.norm_num_groups),
            "unet_norm_eps": float(unet.config.norm_eps),
        },
        grid=_grid(checkpoint, preprocessor.output_size[0], blocks),
        channels=int(unet.config.block_out_channels[-1]),
        compute_dtype=settings.compute_dtype,
    )
    latent_grid = _grid(checkpoint, preprocessor.output_size[0], len(vae.config.block_out_channels) - 1)
    return NoisyTeacher(
        MiddleBlock(Latents(vae), unet, prompt_1nd, step, schedule), settings, name=info.name,
        licence=info.licence, source=checkpoint.source, preprocessor=preprocessor, fingerprint=fingerprint,
        noise_chw=(int(vae.config.latent_channels), *latent_grid),
    )  # fmt: skip


class Latents(torch.nn.Module):
    """The mode of the encoder's distribution, shifted and scaled as the diffusion model sees it, `(B, h, w, C)`."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        vae.decoder, vae.post_quant_conv = None, None
        self.vae = vae

    def forward(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        """Return (mode − shift) · scale, by the autoencoder's own config; nothing is drawn."""
        mode_bchw: torch.Tensor = self.vae.encode(pixels_bchw).latent_dist.mode()
        shifted_bchw = mode_bchw - (self.vae.config.shift_factor or 0.0)
        return (shifted_bchw * float(self.vae.config.scaling_factor)).permute(0, 2, 3, 1)


class MiddleBlock(torch.nn.Module):
    """Output of the U-Net's middle block for latents at one noise level, without a prompt, `(B, h, w, C)`."""

    prompt_1nd: torch.Tensor

    def __init__(self, latents: Latents, unet: Any, prompt_1nd: torch.Tensor, step: int, schedule: Schedule) -> None:
        super().__init__()
        self.latents = latents
        # Without what follows the middle block, the model's output is that block's.
        unet.up_blocks = torch.nn.ModuleList()
        unet.conv_norm_out, unet.conv_out = None, torch.nn.Identity()
        self.unet = unet
        self.register_buffer("prompt_1nd", prompt_1nd)
        self.step, self.signal, self.noise = step, schedule.signal, schedule.noise

    def forward(self, pixels_bchw: torch.Tensor, noise_bchw: torch.Tensor) -> torch.Tensor:
        """Add the drawn noise to the latents and run the first half of the U-Net."""
        latents_bchw = self.latents(pixels_bchw).permute(0, 3, 1, 2)
        noisy_bchw = self.signal * latents_bchw + self.noise * noise_bchw
        steps_b = torch.full((len(noisy_bchw),), self.step, device=noisy_bchw.device)
        prompt_bnd = self.prompt_1nd.expand(len(noisy_bchw), -1, -1)
        middle_bchw: torch.Tensor = self.unet(noisy_bchw, steps_b, encoder_hidden_states=prompt_bnd).sample
        return middle_bchw.permute(0, 2, 3, 1)


class NoisyTeacher(TorchTeacher):
    """A teacher whose module takes noise of the shape `noise_chw` too, drawn from each image's digest."""

    def __init__(self, *given: Any, noise_chw: tuple[int, int, int], **named: Any) -> None:
        super().__init__(*given, **named)
        self.noise_chw = noise_chw

    def encode(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        """Refuse: without digests the noise would not be the image's own."""
        raise TeacherError(
            f"{self.name}: it draws noise from the digests of the image files, and none were given",
            "Call encode_images(pixels, digests).",
        )

    def encode_images(self, pixels_bchw: torch.Tensor, digests: Sequence[str]) -> torch.Tensor:
        """Return float32 features `(B, H, W, C)`; raises TeacherError unless there is one SHA-256 per image."""
        self._require_size(pixels_bchw)
        if len(digests) != len(pixels_bchw):
            raise TeacherError(
                f"{self.name}: {len(pixels_bchw)} images were given with {len(digests)} digests",
                "Give the SHA-256 of each image's file.",
            )
        noise_bchw = np.stack([noise_from_digest(self.name, digest, self.noise_chw) for digest in digests])
        return self._run(pixels_bchw, torch.from_numpy(noise_bchw))


def _preprocessor(options: Mapping[str, Scalar]) -> OwnPreprocessor:
    """Return pixels in −1 … 1, resized by Lanczos as diffusers' own image processor does."""
    side = int(options["image_size"])
    plain = own_arguments(side, resample=Image.Resampling.LANCZOS, mean=0.5, std=0.5)
    return OwnPreprocessor(
        module="", processor=OURS, arguments=see(plain, view=str(options["view"]), side=side), squash=None,
        channel_order=str(options["channel_order"]), exif=bool(options["exif"]),
    )  # fmt: skip


def _grid(checkpoint: Checkpoint, side: int, halvings: int) -> tuple[int, int]:
    factor = 2**halvings
    if side % factor:
        raise checkpoint.error(
            f"an image of {side} × {side} cannot be halved {halvings} times", f"image_size is a multiple of {factor}."
        )
    return side // factor, side // factor


def _encodes(name: str) -> bool:
    return name.startswith(("encoder.", "quant_conv."))


def _after_middle(name: str) -> bool:
    return name.startswith(("up_blocks.", "conv_norm_out.", "conv_out."))


def _vae_options(vae: Any) -> dict[str, Scalar]:
    return {
        "latents": "mode",
        "scaling_factor": float(vae.config.scaling_factor),
        "shift_factor": float(vae.config.shift_factor or 0.0),
        "vae_activation": str(vae.config.act_fn),
        "vae_norm_groups": int(vae.config.norm_num_groups),
    }


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _require_plain(checkpoint: Checkpoint, unet: Any, vae: Any) -> None:
    """Refuse a U-Net that needs more than latents, a step and a prompt, such as that of SDXL."""
    for name in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type"):
        if getattr(unet.config, name, None) is not None:
            raise checkpoint.error(
                f"unet/config.json sets {name}={getattr(unet.config, name)!r}: it needs more than a prompt",
                "Pass a Stable Diffusion 1 or 2 checkpoint for text to image.",
            )
    if unet.config.in_channels != vae.config.latent_channels:
        raise checkpoint.error(
            f"its U-Net takes {unet.config.in_channels} channels, its autoencoder gives {vae.config.latent_channels}",
            "Pass a Stable Diffusion 1 or 2 checkpoint for text to image, not one for inpainting or depth.",
        )


def _empty_prompt(checkpoint: Checkpoint) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the text encoder's last states `(1, N, D)` of the empty prompt, and the encoder's tensors."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = checkpoint.path / "text_encoder"
    values = read_config(checkpoint, folder, model_type="clip_text_model", what="Stable Diffusion checkpoint")
    tensors = read_weights(checkpoint, folder, keep=lambda name: True)
    stripped = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    encoder = load_strictly(CLIPTextModel, make_config(CLIPTextConfig, values, checkpoint), stripped, checkpoint)
    missing = [name for name in _TOKENIZER if not (checkpoint.path / "tokenizer" / name).is_file()]
    if missing:
        raise checkpoint.error(f"tokenizer/ has no {', '.join(missing)}", "Download that folder again.")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(checkpoint.path / "tokenizer", local_files_only=True)
        length = encoder.config.max_position_embeddings
        ids = tokenizer("", padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise checkpoint.error(f"its tokenizer/ cannot be read: {error}", "Download that folder again.") from error
    encoder.train(False)
    with torch.inference_mode():
        states_1nd: torch.Tensor = encoder(input_ids=ids).last_hidden_state
    return states_1nd.clone(), tensors
