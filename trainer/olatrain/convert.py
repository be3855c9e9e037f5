"""Import of checkpoints in the published OLA-VLM layout: the same weights under our names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    ConvNextConfig,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Phi3Config,
)

from olaschema.errors import ConfigError
from olatrain.convnext import convnext_config, fold_epsilon, is_convnext, trunk
from olatrain.convnext import published_name as convnext_name
from olatrain.imageside import square
from olatrain.losses import LossConfig
from olatrain.predictors import PredictorBank, PredictorConfig
from olatrain.student import Student
from olatrain.tokens import TaskFormat, TaskTokens
from olatrain.weights import read_json, read_weights

# Public section and layer keys of each teacher; the public code calls the layers of `gen` "img".
_SECTIONS = {"depth": ("image_depth", "depth"), "seg": ("image_seg", "seg"), "gen": ("image_gen", "img")}
# Parts of frozen teachers that a published checkpoint may carry along; training needs none of them.
_TEACHER_PARTS = ("da_v2_head.", "dav2_backbone.", "oneformer.", "pipe.")
# by model_type: the first two with predictors, as pretrained; the others without, as instruction-tuned
_LANGUAGE_CONFIGS = {
    "ola_llama": LlamaConfig, "ola_phi3": Phi3Config, "llava_llama": LlamaConfig, "llava_phi3": Phi3Config
}  # fmt: skip
_TUNED = ("llava_llama", "llava_phi3")
_NEEDED = ("model_type", "vocab_size", "hidden_size", "num_task_tokens", "aux_mode", "mm_projector_type")
_NEEDED_OF_A_TEACHER = ("output_dim", "num_tokens", "num_heads", "dim_head", "ff_mult", "depth")
_INSIDE = "model.vision_tower.vision_tower."
_OLD_VISION = f"{_INSIDE}vision_model."


@dataclass(frozen=True)
class _Tower:
    """A published vision tower: what it is, and its tensors by the names they were published under."""

    folder: Path
    config: CLIPVisionConfig | ConvNextConfig
    weights: dict[str, Tensor]

    @property
    def vectors(self) -> int:
        """How many it gives for an image."""
        size, patch = square(self.config, self.folder)
        return (size // patch) ** 2

    def published(self, ours: str) -> str:
        """Name of one of transformers' tensors."""
        return convnext_name(ours) if isinstance(self.config, ConvNextConfig) else ours


@dataclass(frozen=True)
class ImportedOla:
    """A published checkpoint as our student and predictors, and the weights its losses were trained with."""

    student: Student
    bank: PredictorBank
    tokens: TaskTokens
    losses: LossConfig
    trained_format: TaskFormat | None
    """What stood in the sequence when it was trained; None where that was the record's own format."""
    pad_id: int
    """A token whose embedding is 0, which is what the public code pads with."""


def import_ola(
    folder: Path,
    *,
    config: Mapping[str, Any] | None = None,
    vision: Path | None = None,
    compat: Literal["ola"] | None = None,
) -> ImportedOla:
    """Read a checkpoint in the published layout: `config.json`, weights, and its vision tower's.

    A CLIP tower's config is in a folder of its own, a CLIP-ConvNeXT's is worked out from its name and tensors. The
    latter's student is a `FastVlmForConditionalGeneration`, the former's a `LlavaForConditionalGeneration`.

    `config` stands in for `config.json`; `vision` for the tower's folder, by default the one named by the config's
    `mm_vision_tower` inside `folder`. The model keeps the dtype of its weights; latents and predictors are float32, as
    in training. The vocabulary grows by the image
    placeholder, a padding token and the task tokens, whose rows are 0.

    Raises ConfigError naming the file, setting or tensor that is missing or that this version cannot represent.
    """
    settings = dict(config) if config is not None else read_json(folder / "config.json")
    _require(settings, _NEEDED, "the config")
    weights = read_weights(folder, skip=_TEACHER_PARTS)
    tower = _read_tower(vision if vision is not None else tower_folder(folder, settings), settings, weights)
    tokens, pad_id = _new_tokens(settings)
    model = _build_model(settings, tower, tokens, pad_id, _dtype(weights, folder))
    tuned = settings["model_type"] in _TUNED
    configs = {} if tuned else _predictor_configs(settings, tokens)
    hidden = int(settings["hidden_size"])
    student = Student(
        model,
        tokens,
        latents=_latents(tokens, weights, folder) if tuned else _latents_of(configs, tokens),
        taps=[layer for c in configs.values() for layer in c.layers],
        seed=0,
    )
    context: Literal["all", "prompt"] = "all" if settings.get("pass_text_to_aux", True) else "prompt"
    bank = PredictorBank(configs, tokens, hidden_size=hidden, seed=0, context=context, compat=compat)
    if not tuned and not any(name.startswith("image_") for name in weights):
        raise ConfigError(
            f"{folder}: the checkpoint has no predictors, though its model_type is {settings['model_type']}",
            "Import the checkpoint of the pretraining stage, which holds them.",
        )
    _load(student, bank, weights, folder, tower)
    losses = LossConfig(
        contrastive=settings.get("contrastive_loss_weight", 0.3) if settings.get("use_contrastive", True) else 0.0,
        teachers={t: float(settings[_SECTIONS[t][0]][f"{_SECTIONS[t][1]}_loss_weight"]) for t in configs},
    )
    # pretraining puts the means there whatever its config says
    trained: TaskFormat | None = settings.get("task_token_format", "emb") if tuned and tokens.flat else None
    if trained not in (None, *get_args(TaskFormat)):
        raise ConfigError(f"task_token_format is {trained}", "emb and expand_emb are supported.")
    return ImportedOla(student, bank, tokens, losses, trained, pad_id)


def tower_folder(folder: Path, settings: Mapping[str, Any]) -> Path:
    """Where a checkpoint's config says that its vision tower is: published ones name a hub id, not a folder in it."""
    return folder / str(settings.get("mm_vision_tower", "clip"))


def published_name(ours: str, configs: Mapping[str, PredictorConfig]) -> str | None:
    """Name in the published layout of one of our tensors (`student.…` or `bank.…`); None for the vision tower."""
    for prefix, published in (
        ("student.model.model.language_model.", "model."),
        ("student.model.lm_head.", "lm_head."),
        ("student.model.model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("student.model.model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ):
        if ours.startswith(prefix):
            return published + ours.removeprefix(prefix)
    parts = ours.split(".")
    if ours.startswith("student.latents."):
        return f"model.special_{parts[2]}_tokens"
    if ours.startswith("bank.logit_scales."):
        return f"{parts[2]}_logit_scale"
    if ours.startswith("bank.heads."):
        teacher, layer = parts[2], int(parts[3])
        return ".".join((f"image_{teacher}_heads", str(configs[teacher].layers.index(layer)), *parts[4:]))
    return None


def _load(student: Student, bank: PredictorBank, weights: dict[str, Tensor], folder: Path, tower: _Tower) -> None:
    named = {f"student.{n}": p for n, p in student.named_parameters()}
    named |= {f"bank.{n}": p for n, p in bank.named_parameters()}
    used = set()
    for ours, parameter in named.items():
        theirs = published_name(ours, bank.configs)
        if theirs is None:
            theirs = tower.published(ours.removeprefix("student.model.model.vision_tower."))
            source = tower.weights.get(theirs)
            used.add(theirs)
            if source is None and theirs.startswith("head.norm."):
                continue  # after the map that the student reads
        else:
            source = weights.get(theirs)
            used.add(theirs)
        if source is None and ours.startswith("bank.logit_scales."):
            continue  # trained without the contrastive term
        if source is None:
            raise ConfigError(f"{folder}: the checkpoint has no tensor {theirs}", "Is the checkpoint complete?")
        if ours.startswith("student.model."):
            parameter.data = parameter.data.to(source.dtype)
        _copy(parameter, source, theirs, grows=ours.endswith(("embed_tokens.weight", "lm_head.weight")))
    left = [n for n in weights if n not in used and not _known(n)]
    if isinstance(tower.config, ConvNextConfig):
        left += [n for n in tower.weights if n not in used]
    if left:
        raise ConfigError(
            f"{folder}: {len(left)} tensors have no place in our student, the first is {left[0]}",
            "Does config.json belong to this checkpoint?",
        )


def _known(name: str) -> bool:
    return name.startswith("model.vision_tower.") or name.endswith("rotary_emb.inv_freq")


@torch.no_grad()
def _copy(parameter: torch.nn.Parameter, source: Tensor, name: str, *, grows: bool) -> None:
    rows = source.shape[0] if grows else None
    target = parameter.data[:rows] if grows else parameter.data
    if target.shape != source.shape:
        raise ConfigError(
            f"{name} has shape {tuple(source.shape)}, the config asks for {tuple(target.shape)}",
            "Does config.json belong to this checkpoint?",
        )
    if grows:
        parameter.data.zero_()
    target.copy_(source)


def _new_tokens(settings: Mapping[str, Any]) -> tuple[TaskTokens, int]:
    teachers = tuple(str(settings["aux_mode"]).split("-"))
    unknown = [t for t in teachers if t not in _SECTIONS]
    if unknown:
        raise ConfigError(f"aux_mode names {', '.join(unknown)}", f"Known teachers are {', '.join(_SECTIONS)}.")
    size = int(settings["num_task_tokens"])
    first = int(settings["vocab_size"])
    image_id, pad_id, next_id = first, first + 1, first + 2
    ids = {t: tuple(range(next_id + n * size, next_id + (n + 1) * size)) for n, t in enumerate(teachers)}
    hidden = (image_id, pad_id, *(i for t in teachers for i in ids[t]))
    tokens = TaskTokens(teachers=teachers, tokens_per_teacher=size, ids=ids, image_id=image_id, never_predicted=hidden)
    return tokens, pad_id


def _predictor_configs(settings: Mapping[str, Any], tokens: TaskTokens) -> dict[str, PredictorConfig]:
    configs = {}
    for teacher in tokens.teachers:
        section, prefix = _SECTIONS[teacher]
        public = settings.get(section)
        if not isinstance(public, Mapping):
            raise ConfigError(f"the config has no section {section} for {teacher}", "Is it an OLA-VLM config?")
        _require(public, (*_NEEDED_OF_A_TEACHER, f"{prefix}_layer_indices", f"{prefix}_loss_weight"), section)
        channels, count = int(public["output_dim"]), int(public["num_tokens"])
        side = round(count**0.5)
        if teacher != "gen" and side * side != count:
            raise ConfigError(f"{section}: {count} tokens are not a square map", "Only square maps are published.")
        if teacher == "gen" and count != 1:
            raise ConfigError(f"{section}: {count} vectors per image", "Only one vector per image is supported.")
        depth = teacher == "depth"
        configs[teacher] = PredictorConfig(
            shape=(channels,) if teacher == "gen" else (side, side, channels),
            layers=tuple(int(n) for n in str(public[f"{prefix}_layer_indices"]).split("-")),
            width=int(settings["hidden_size"]) if depth and tokens.tokens_per_teacher else channels,
            intermediate=depth and bool(public.get("use_intermediate_depth", True)),
            heads=int(public["num_heads"]),
            head_width=int(public["dim_head"]),
            ff_mult=int(public["ff_mult"]),
            blocks=int(public["depth"]),
        )
    return configs


def _latents_of(configs: Mapping[str, PredictorConfig], tokens: TaskTokens) -> dict[str, int]:
    return {t: c.latents(tokens.tokens_per_teacher) for t, c in configs.items() if tokens.flat}


def _latents(tokens: TaskTokens, weights: Mapping[str, Tensor], folder: Path) -> dict[str, int]:
    """Number of vectors that the checkpoint holds for each teacher."""
    counts = {}
    for teacher in tokens.teachers if tokens.flat else ():
        name = f"model.special_{teacher}_tokens"
        if name not in weights:
            raise ConfigError(f"{folder}: the checkpoint has no tensor {name}", "Is the checkpoint complete?")
        counts[teacher] = len(weights[name])
    return counts


def _require(settings: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    missing = [name for name in names if name not in settings]
    if missing:
        raise ConfigError(f"{where} has no {', '.join(missing)}", "Give the config.json of an OLA-VLM checkpoint.")


def _build_model(
    settings: dict[str, Any], tower: _Tower, tokens: TaskTokens, pad_id: int, dtype: torch.dtype
) -> LlavaForConditionalGeneration | FastVlmForConditionalGeneration:
    family = str(settings.get("model_type"))
    if family not in _LANGUAGE_CONFIGS:
        raise ConfigError(
            f"model_type {family} is no OLA-VLM student", f"Supported are {' and '.join(_LANGUAGE_CONFIGS)}."
        )
    if settings.get("mm_projector_type") != "mlp2x_gelu":
        raise ConfigError(f"projector {settings.get('mm_projector_type')}", "Only mlp2x_gelu is published.")
    language_class = _LANGUAGE_CONFIGS[family]
    known = set(language_class().to_dict()) | {"rope_theta", "rope_scaling"}
    dropped = {
        "model_type",
        "architectures",
        "transformers_version",
        "vocab_size",
        "torch_dtype",
        "dtype",
        "pad_token_id",
    }
    language = {k: v for k, v in settings.items() if k in known - dropped and v is not None}
    total = max((pad_id, *tokens.flat)) + 1
    text = language_class(**language, vocab_size=total, pad_token_id=pad_id)
    config: LlavaConfig | FastVlmConfig
    if isinstance(tower.config, ConvNextConfig):
        config = FastVlmConfig(
            vision_config=tower.config,
            text_config=text,
            image_token_index=tokens.image_id,
            image_seq_length=tower.vectors,
            projector_hidden_act="gelu",
        )
    else:
        feature = settings.get("mm_vision_select_feature", "patch")
        config = LlavaConfig(
            vision_config=tower.config,
            text_config=text,
            image_token_index=tokens.image_id,
            vision_feature_layer=int(settings.get("mm_vision_select_layer", -2)),
            vision_feature_select_strategy="default" if feature == "patch" else "full",
            image_seq_length=tower.vectors,
            projector_hidden_act="gelu",
        )
    model: LlavaForConditionalGeneration | FastVlmForConditionalGeneration
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    return model


def _dtype(weights: Mapping[str, Tensor], folder: Path) -> torch.dtype:
    embeddings = weights.get("model.embed_tokens.weight")
    if embeddings is None:
        raise ConfigError(f"{folder}: the checkpoint has no tensor model.embed_tokens.weight", "Is it complete?")
    return embeddings.dtype


def _read_tower(folder: Path, settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> _Tower:
    """The tower's tensors are the checkpoint's where it carries them, else those of the tower's folder."""
    name = str(settings.get("mm_vision_tower", ""))
    if is_convnext(name):
        inside = {n.removeprefix(_INSIDE): t for n, t in weights.items() if n.startswith(_INSIDE)}
        found = trunk(inside or read_weights(folder))
        config = convnext_config(name, found, folder)
        return _Tower(folder, config, fold_epsilon(found, config.num_stages, config.layer_norm_eps))
    vision = read_json(folder / "config.json")
    vision = dict(vision.get("vision_config", vision))
    known = CLIPVisionConfig(**{k: v for k, v in vision.items() if k in CLIPVisionConfig().to_dict()})
    old = {n.removeprefix(_OLD_VISION): t for n, t in weights.items() if n.startswith(_OLD_VISION)}
    return _Tower(folder, known, old or {n.removeprefix("vision_model."): t for n, t in read_weights(folder).items()})
