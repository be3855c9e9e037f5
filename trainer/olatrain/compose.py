"""Compose a student: a language model, a vision tower, a fresh projector and the task tokens in one LLaVA folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError, TemplateSyntaxError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AddedToken,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionModel,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_backends import PilBackend

from olaschema.errors import ConfigError, ViewError
from olaschema.manifest import View
from olatrain.chat import IMAGE_TOKEN, make_chat_template
from olatrain.convnext import is_convnext, load_convnext
from olatrain.families import Parts
from olatrain.folder import publish_folder, require_new
from olatrain.imageside import make_image_processor, square
from olatrain.tokens import TaskTokens

PAD_TOKEN = "<pad>"  # noqa: S105 - a token of the vocabulary
LANGUAGE_MODELS = ("llama", "phi3")
VISION_MODELS = ("clip", "clip_vision_model")
VISION_LAYER = -2


def compose(
    llm: Path,
    vision: Path,
    out: Path,
    *,
    teachers: Sequence[str] = ("gen", "depth", "seg"),
    tokens_per_teacher: int = 8,
    view: Literal["squash", "crop", "pad"] = "squash",
    seed: int,
) -> TaskTokens:
    """Join a causal language model (Llama or Phi-3) and a CLIP vision tower into a LLaVA folder.

    `out` becomes a `LlavaForConditionalGeneration` with its processor, chat template and `ola.json`. The projector is
    a fresh two-layer GELU MLP on the patch tokens of the tower's last layer but one. Where the tower is an OpenCLIP
    ConvNeXT, which the name of its folder tells, it is a `FastVlmForConditionalGeneration` whose projector reads the
    last map (`olatrain.convnext`). `<image>` and the task tokens
    become special tokens whose embedding and output rows start as the mean of the model's own. Equal inputs and
    `seed` give equal bytes. The language model's own chat template is kept and fed rewritten turns (`adapted`);
    without one, a plain `USER: … ASSISTANT: …` is written (`plain`).

    Raises ConfigError where a folder is missing or of another model, the tokenizer is missing, `out` is not empty,
    or a task token's name is taken.
    """
    check_request(teachers, tokens_per_teacher, out)
    read_config(llm, LANGUAGE_MODELS, "language model", "--llm")
    convnext = is_convnext(vision.resolve().name)
    if not convnext:
        read_config(vision, VISION_MODELS, "CLIP vision tower", "--vision")
    tokenizer = load_tokenizer(llm)
    template = own_template(tokenizer, llm)
    language = load_weights(AutoModelForCausalLM, llm, "--llm", "auto")
    tower: Any = (
        load_convnext(vision, language.dtype)
        if convnext
        else load_weights(CLIPVisionModel, vision, "--vision", language.dtype)
    )
    size, patch = square(tower.config, vision)
    names = task_names(teachers, tokens_per_teacher)
    tokens, pad_id = _add_tokens(tokenizer, names, (size // patch) ** 2, "adapted" if template else "plain")
    grow(language, tokens.never_predicted)
    model = _join(language, tower, tokens, (size // patch) ** 2, pad_id, seed)
    processor = make_processor(tokenizer, tower.config, vision, view, names, template)
    with publish_folder(out) as made:
        model.save_pretrained(made)
        processor.save_pretrained(made)
        tokens.save(made)
    return tokens


def task_names(teachers: Sequence[str], tokens_per_teacher: int) -> dict[str, list[str]]:
    """Name each teacher's task tokens, as the vocabulary holds them."""
    return {t: [f"<ola_{t}_{n}>" for n in range(tokens_per_teacher)] for t in teachers}


def make_processor(
    tokenizer: PreTrainedTokenizerBase,
    vision_config: Any,
    vision: Path,
    view: Literal["squash", "crop", "pad"],
    names: dict[str, list[str]],
    template: str | None,
    *,
    system: str | None = None,
) -> LlavaProcessor:
    """Make a student's processor; its chat template puts the task tokens `names` behind each image.

    `template` is the language model's own, None where it has none; `vision` the tower's folder, whose
    `preprocessor_config.json` names mean, deviation and filter. `system` is said first where a conversation has no
    system message of its own.
    """
    size, patch = square(vision_config, vision)
    chat_template = make_chat_template(template, [name for group in names.values() for name in group], system=system)
    tokenizer.chat_template = chat_template
    return LlavaProcessor(  # type: ignore[no-untyped-call]
        image_processor=make_image_processor(vision, size, view),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=chat_template,
    )


def load_processor(folder: Path) -> Any:
    """Load a student's processor with its image side computed on PIL images, whatever else is installed.

    Raises ConfigError where the folder has no processor or the image processor has no PIL version.
    """
    with loading(folder, "the student's folder"):
        # a saved processor does not say its backend: transformers would take torchvision's where that is installed
        image = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            folder, local_files_only=True, backend="pil"
        )
        if type(image).__name__.startswith("Qwen2VL"):  # its processor also makes videos, with torchvision
            return Parts(AutoTokenizer.from_pretrained(folder, local_files_only=True), image, folder)
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)  # type: ignore[no-untyped-call]
    if not isinstance(image, PilBackend):
        raise ConfigError(
            f"{folder}: the image processor is a {type(image).__name__}, which does not compute on PIL images",
            "Choose a student whose image processor has a PIL version in transformers.",
        )
    processor.image_processor = image
    return processor


def student_view(processor: Any) -> View:
    """Say which part of an image a student's processor shows it.

    A tiled student's is that of its base view, the whole image scaled to a square. Qwen's image keeps its shape, but
    every token's place in it is relative to the whole, as in a squashed one.

    Raises ViewError naming what was found where the geometry is none of squash, crop and pad.
    """
    image = getattr(processor, "image_processor", processor)
    name = type(image).__name__
    if name.removesuffix("Pil").removesuffix("Fast") in _WHOLE and image.do_resize:
        return View(kind="squash")
    size, crop = dict(image.size or {}), dict(getattr(image, "crop_size", None) or {})
    size = {k: v for k, v in size.items() if v is not None}
    crop = {k: v for k, v in crop.items() if v is not None}
    resize, center_crop = bool(image.do_resize), bool(image.do_center_crop)
    pad = bool(getattr(image, "do_pad", False))
    family = name.removesuffix("Pil").removesuffix("Fast")
    if family in ("CLIPImageProcessor", "LlavaImageProcessor") and resize:
        edge = size.get("shortest_edge")
        square = size.get("height") is not None and size.get("height") == size.get("width")
        target = size["height"] if square else edge
        crop_square = crop.get("height") is not None and crop.get("height") == crop.get("width")
        whole = not center_crop or (crop_square and crop["height"] == target)
        if pad and family == "LlavaImageProcessor" and target is not None and whole:
            return View(kind="pad")
        if not pad and square and whole:
            return View(kind="squash")
        if not pad and edge is not None and center_crop and crop_square and crop["height"] <= edge:
            return View(kind="crop", fraction=crop["height"] / edge)
    raise ViewError(
        f"the student's view of an image is not known: {name} with do_resize={resize}, size={size}, "
        f"do_center_crop={center_crop}, crop_size={crop}, do_pad={pad}",
        "Use a CLIP or LLaVA image processor that squashes, centre-crops or pads to a square.",
    )


def check_request(teachers: Sequence[str], tokens_per_teacher: int, out: Path) -> None:
    """Raise ConfigError for names or numbers that cannot be task tokens, or an `out` that is not new."""
    wrong = [t for t in teachers if not t.replace("_", "").replace("-", "").isalnum()]
    if wrong or len(set(teachers)) != len(teachers) or not teachers:
        raise ConfigError(
            f"teachers {list(teachers)!r}: names must be different, made of letters, digits, - and _",
            "Correct --teacher.",
        )
    if tokens_per_teacher < 0:
        raise ConfigError(f"{tokens_per_teacher} task tokens per teacher", "Give 0 or more.")
    require_new(out)


def read_config(folder: Path, wanted: Sequence[str], what: str, flag: str) -> Any:
    """Read the config of a model folder; raises ConfigError where it is none, or of no type in `wanted`."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is no model folder: it has no config.json", f"Give the {what}'s folder ({flag}).")
    with loading(folder, flag):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type not in wanted:
        raise ConfigError(
            f"{folder} holds a model of type {config.model_type}", f"The {what} ({flag}) must be {' or '.join(wanted)}."
        )
    return config


_WHOLE = ("LlavaNextImageProcessor", "Idefics3ImageProcessor", "Qwen2VLImageProcessor")


def load_weights(model_class: Any, folder: Path, flag: str, dtype: Any) -> Any:
    """Load a model on the CPU; raises ConfigError where it cannot be, or any weight is missing."""
    with loading(folder, flag):
        model, report = model_class.from_pretrained(
            folder, local_files_only=True, dtype=dtype, output_loading_info=True
        )
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would go on with random weights in their place
        raise ConfigError(
            f"{folder}: {len(missing)} weights are missing, the first is {missing[0]}",
            f"Check the folder given ({flag}): is the checkpoint complete?",
        )
    return model


def load_tokenizer(folder: Path, *, config: Any = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a language model's folder; raises ConfigError where it has none.

    `config` stands in for the folder's own where transformers does not know its model.
    """
    names = ("tokenizer.json", "tokenizer.model")
    if not any((folder / name).is_file() for name in names):
        raise ConfigError(
            f"{folder} has no tokenizer ({' or '.join(names)})", "Copy the language model's tokenizer files there."
        )
    with loading(folder, "--llm"):
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError(f"{folder}: the tokenizer cannot be loaded", "Copy the tokenizer files again.")
    return tokenizer


def own_template(tokenizer: PreTrainedTokenizerBase, folder: Path) -> str | None:
    """Return a tokenizer's chat template, None without one.

    Raises ConfigError where it has several and no default, or it cannot be parsed.
    """
    template: str | dict[str, str] | None = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise ConfigError(
                f"{folder}: the tokenizer has chat templates named {', '.join(template)} and none named default",
                "Keep one of them as the tokenizer's chat_template.",
            )
        template = template["default"]
    if template is not None:
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": ""}], chat_template=template, tokenize=False)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"{folder}: the chat template cannot be parsed: {error.message}",
                "Correct it (chat_template.jinja or tokenizer_config.json), or remove it for a plain one.",
            ) from error
        except (TemplateError, TypeError):
            pass  # it may want other content than a bare string: the prompts' builder finds out
    return template


def _add_tokens(
    tokenizer: PreTrainedTokenizerBase,
    names: dict[str, list[str]],
    image_length: int,
    chat_template: Literal["adapted", "plain"],
) -> tuple[TaskTokens, int]:
    flat = [name for group in names.values() for name in group]
    taken = [name for name in flat if name in tokenizer.get_vocab()]
    if taken:
        raise ConfigError(
            f"the tokenizer already has {taken[0]}", "Compose from the original language model, not from a student."
        )
    has_pad = tokenizer.pad_token is not None
    new = [IMAGE_TOKEN, *flat, *([] if has_pad else [PAD_TOKEN])]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in new], special_tokens=True)
    if not has_pad:
        tokenizer.pad_token = PAD_TOKEN
    vocabulary = tokenizer.get_vocab()
    record = TaskTokens(
        teachers=tuple(names),
        tokens_per_teacher=len(flat) // len(names),
        ids={t: tuple(vocabulary[name] for name in group) for t, group in names.items()},
        image_id=vocabulary[IMAGE_TOKEN],
        image_length=image_length,
        never_predicted=tuple(sorted(vocabulary[name] for name in new)),
        chat_template=chat_template,
    )
    return record, vocabulary[str(tokenizer.pad_token)]


@torch.no_grad()
def grow(language: Any, new: Sequence[int]) -> None:
    """Make room for the ids `new`; their embedding and output rows start as the mean of the model's own rows."""
    own = language.get_input_embeddings().weight.shape[0]
    total = max(own, max(new) + 1)
    if total > own:
        language.resize_token_embeddings(total, mean_resizing=False)
    rows = sorted({*new, *range(own, total)})
    # tied embeddings are one tensor: the second pass then writes nearly the same mean again
    for module in (language.get_input_embeddings(), language.get_output_embeddings()):
        weight = module.weight
        weight[rows] = weight[:own].float().mean(dim=0).to(weight.dtype)


def _join(
    language: Any, tower: Any, tokens: TaskTokens, image_length: int, pad_id: int, seed: int
) -> LlavaForConditionalGeneration | FastVlmForConditionalGeneration:
    language.config.pad_token_id = pad_id
    for part in (language.config, tower.config):
        part._name_or_path = ""  # the folder it was loaded from, which is nobody's business
    shared: dict[str, Any] = {
        "vision_config": tower.config,
        "text_config": language.config,
        "image_token_index": tokens.image_id,
        "image_seq_length": image_length,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": bool(language.config.tie_word_embeddings),
    }
    config: Any
    if tower.config.model_type == "convnext":
        config = FastVlmConfig(**shared)
    else:
        config = LlavaConfig(**shared, vision_feature_layer=VISION_LAYER, vision_feature_select_strategy="default")
    config.pad_token_id = pad_id
    # without memory of its own: everything but the projector comes from the two models
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)  # type: ignore[no-untyped-call]
    model.model.language_model = language.model
    model.model.vision_tower = tower
    model.lm_head = language.lm_head
    projector = model.model.multi_modal_projector.to_empty(device="cpu").to(language.dtype)
    _init_linear(projector, torch.Generator().manual_seed(seed))
    generation = language.generation_config
    generation.pad_token_id = pad_id
    generation.suppress_tokens = sorted({*(generation.suppress_tokens or ()), *tokens.never_predicted})
    model.generation_config = generation
    model.train(False)
    made: LlavaForConditionalGeneration | FastVlmForConditionalGeneration = model
    return made


@torch.no_grad()
def _init_linear(module: nn.Module, generator: torch.Generator) -> None:
    """Uniform in ±1/√(inputs), torch's own initialisation of a linear layer."""
    for layer in module.children():
        if isinstance(layer, nn.Linear):
            bound = layer.in_features**-0.5
            for parameter in layer.parameters():
                drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                parameter.copy_(drawn)


# What transformers lets through for a damaged file, the last one for a .bin that is none.
_LOADING_ERRORS = (
    OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, StrictDataclassError, UnpicklingError,
)  # fmt: skip


@contextmanager
def loading(folder: Path, flag: str) -> Iterator[None]:
    """Turn what transformers raises for a damaged folder into a ConfigError that names it and the option `flag`."""
    try:
        yield
    except _LOADING_ERRORS as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{folder} cannot be loaded: {first}", f"Check the folder given ({flag}).") from error
