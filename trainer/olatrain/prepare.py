"""`olatrain prepare`: an existing image-text-to-text checkpoint, task tokens put into its vocabulary and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AddedToken, AutoModelForImageTextToText

from olaschema.errors import ConfigError
from olatrain.chat import make_chat_template
from olatrain.compose import (
    PAD_TOKEN,
    check_request,
    grow,
    load_processor,
    load_weights,
    read_config,
    student_view,
    task_names,
)
from olatrain.families import FAMILIES
from olatrain.folder import publish_folder
from olatrain.tokens import Family, TaskTokens

_FLAG = "--model"
_PROBE = "probe"


def prepare(
    model: Path, out: Path, *, teachers: Sequence[str] = ("gen", "depth", "seg"), tokens_per_teacher: int = 8
) -> TaskTokens:
    """Make a student of a LLaVA, LLaVA-NeXT, Idefics3 or Qwen2.5-VL checkpoint.

    The task tokens become special tokens whose embedding and output rows start as the mean of the model's own; the
    chat template is the checkpoint's, fed turns in which each image is followed by its task tokens. All else stays.

    Raises ConfigError where the folder is of another model or incomplete, its chat template is missing or of no use,
    `out` is not empty, or a task token's name is taken; ViewError where it is not known what it sees of an image.
    """
    check_request(teachers, tokens_per_teacher, out)
    config = read_config(model, FAMILIES, "image-text-to-text model", _FLAG)
    family: Family = config.model_type
    processor = load_processor(model)
    student_view(processor)
    tokenizer = processor.tokenizer
    image_id = int(config.image_token_id)
    names = task_names(teachers, tokens_per_teacher)
    block, after = _image_text(family, tokenizer, image_id)
    template = _adapt(processor, model, block, [name for group in names.values() for name in group])
    weights = load_weights(AutoModelForImageTextToText, model, _FLAG, "auto")
    tokens, pad_id = _add_tokens(tokenizer, names, family, config, processor, after)
    new = [i for i in tokens.never_predicted if i != image_id]
    if new:
        grow(weights, new)
    weights.config.pad_token_id = weights.config.get_text_config().pad_token_id = pad_id
    weights.generation_config.pad_token_id = pad_id
    suppressed = weights.generation_config.suppress_tokens or ()
    weights.generation_config.suppress_tokens = sorted({*suppressed, *tokens.never_predicted})
    processor.chat_template = tokenizer.chat_template = template
    with publish_folder(out) as made:
        weights.save_pretrained(made)
        processor.save_pretrained(made)
        tokens.save(made)
    return tokens


def _image_text(family: Family, tokenizer: Any, image_id: int) -> tuple[str, tuple[int, ...]]:
    """What the model's prompts hold for one image, and the ids in it that follow the placeholder."""
    mark = str(tokenizer.convert_ids_to_tokens(image_id))
    if family != "qwen2_5_vl":
        return mark, ()
    closing = "<|vision_end|>"
    return f"<|vision_start|>{mark}{closing}", (int(tokenizer.convert_tokens_to_ids(closing)),)


def _adapt(processor: Any, folder: Path, block: str, names: Sequence[str]) -> str:
    own = processor.chat_template or processor.tokenizer.chat_template
    remedy = "Give a checkpoint whose chat template takes text, or put one in its chat_template.jinja."
    if not isinstance(own, str):
        raise ConfigError(f"{folder} has no chat template", remedy)
    for structured in (False, True):
        content: Any = [{"type": "text", "text": _PROBE}] if structured else _PROBE
        try:
            text = processor.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], chat_template=own, tokenize=False
            )
        except (TemplateError, TypeError):
            continue
        if text.count(_PROBE) == 1 and "'type'" not in text:
            return make_chat_template(own, names, image=block, structured=structured)
    raise ConfigError(f"{folder}: its chat template shows no text of a user's turn", remedy)


def _add_tokens(
    tokenizer: Any, names: dict[str, list[str]], family: Family, config: Any, processor: Any, after: tuple[int, ...]
) -> tuple[TaskTokens, int]:
    flat = [name for group in names.values() for name in group]
    taken = [name for name in flat if name in tokenizer.get_vocab()]
    if taken:
        raise ConfigError(f"the tokenizer already has {taken[0]}", "Prepare the original checkpoint, not a student.")
    new = [*flat, *([] if tokenizer.pad_token is not None else [PAD_TOKEN])]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in new], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = PAD_TOKEN
    vocabulary = tokenizer.get_vocab()
    image_id = int(config.image_token_id)
    base: dict[str, Any] = {}
    if family == "llava":
        base["image_length"] = _squares(config.vision_config)
    elif family == "llava_next":
        base |= {"base_view": "first", "base_length": _squares(config.vision_config)}
    elif family == "idefics3":
        base |= {"base_view": "last", "base_length": int(processor.image_seq_len)}
    record = TaskTokens(
        teachers=tuple(names),
        tokens_per_teacher=len(flat) // len(names),
        ids={teacher: tuple(vocabulary[name] for name in group) for teacher, group in names.items()},
        family=family,
        image_id=image_id,
        after_image=after,
        never_predicted=tuple(sorted((image_id, *(vocabulary[name] for name in new)))),
        chat_template="adapted",
        **base,
    )
    return record, vocabulary[str(tokenizer.pad_token)]


def _squares(vision: Any) -> int:
    """Patches of the tower's square input; the class token is left out, as LLaVA's default does."""
    return int((vision.image_size // vision.patch_size) ** 2)
