"""`olatrain import-ola`: a checkpoint in the published OLA-VLM layout becomes a student's folder with a sidecar."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import AddedToken, GenerationConfig, PreTrainedTokenizerBase

from olaschema.errors import ConfigError
from olaschema.manifest import canonical_json
from olatrain.chat import IMAGE_TOKEN
from olatrain.compose import load_tokenizer, make_processor, own_template, task_names
from olatrain.convert import ImportedOla, import_ola, tower_folder
from olatrain.convnext import is_convnext
from olatrain.folder import publish_folder, require_new
from olatrain.sidecar import Sidecar
from olatrain.tokenformat import in_format
from olatrain.tokens import TaskFormat, TaskTokens
from olatrain.weights import read_json

SETTINGS_NAME = "published.json"
PAD_TOKEN = "<ola_pad>"  # noqa: S105 - a token of the vocabulary

ViewName = Literal["squash", "crop", "pad"]


def import_student(
    folder: Path,
    out: Path,
    *,
    vision: Path | None = None,
    view: ViewName | None = None,
    system: str | None = None,
    task_format: TaskFormat | None = None,
) -> tuple[TaskTokens, ViewName]:
    """Turn a published checkpoint with its tokenizer into a student's folder that `olatrain run` starts from.

    `out` becomes a LLaVA with processor and `ola.json` as `olatrain compose` writes, `ola.safetensors` with latents,
    predictors and logit scales, and `published.json` with the layers, weights and context the checkpoint was trained
    with, for `olatrain run --config`. `vision` is the tower's folder where it is not inside `folder`; `view` is taken
    from the checkpoint's `image_aspect_ratio` where it is None; `system` is the system message it was trained with;
    `task_format` what stands in the sequence, by default what did when the checkpoint was trained.
    The new ids follow the model's vocabulary, so that the published softmax stays whole; vocabulary rows without a
    token get names that stand for nothing.

    Returns the record and the view. Raises ConfigError naming the file, setting or tensor that cannot be represented.
    """
    require_new(out)
    settings = read_json(folder / "config.json")
    chosen = view or _view(settings)
    if settings.get("mm_vision_select_feature", "patch") != "patch":
        raise ConfigError(
            f"mm_vision_select_feature is {settings['mm_vision_select_feature']}",
            "Only students that see the patch tokens alone are supported.",
        )
    tower = vision if vision is not None else tower_folder(folder, settings)
    # a ConvNeXT is known by its name, and instruction-tuned checkpoints hold the tower's weights
    if not is_convnext(str(settings.get("mm_vision_tower"))) and not (tower / "config.json").is_file():
        raise ConfigError(
            f"the vision tower {settings.get('mm_vision_tower')} is not inside {folder}",
            "Give its folder with --vision.",
        )
    ours = import_ola(folder, config=settings, vision=tower)
    model: Any = ours.student.model
    tokenizer = load_tokenizer(folder, config=model.config.text_config)
    template = own_template(tokenizer, folder)
    tokens = ours.tokens.model_copy(
        update={
            "image_length": int(model.config.image_seq_length),
            "chat_template": "adapted" if template else "plain",
        }
    )
    names = task_names(tokens.teachers, tokens.tokens_per_teacher)
    _name_ids(tokenizer, tokens, ours.pad_id, [name for group in names.values() for name in group])
    processor = make_processor(tokenizer, model.config.vision_config, tower, chosen, names, template, system=system)
    if system is not None:
        _require_said(processor, system)
    ours.student.store_task_embeddings()
    model.generation_config = _generation(folder, model, tokens, ours.pad_id)
    tokens = in_format(task_format or ours.trained_format, model, processor, tokens, ours.student.latents)
    sidecar = Sidecar.of(ours.student, ours.bank, origin=f"imported from the OLA-VLM checkpoint {folder.name}")
    with publish_folder(out) as made:
        model.save_pretrained(made)
        processor.save_pretrained(made)
        tokens.save(made)
        sidecar.save(made)
        (made / SETTINGS_NAME).write_bytes(canonical_json(_settings(ours)))
    return tokens, chosen


def _view(settings: Mapping[str, Any]) -> ViewName:
    """The published stages: `square`, CLIP's own centre crop, in pretraining, `pad` in instruction tuning."""
    found = settings.get("image_aspect_ratio")
    views: dict[Any, ViewName] = {None: "crop", "square": "crop", "pad": "pad"}
    if found not in views:
        raise ConfigError(
            f"image_aspect_ratio is {found}, which is no view that this version knows",
            f"Say what the student sees with --view: {', '.join(get_args(ViewName))}.",
        )
    return views[found]


def _name_ids(tokenizer: PreTrainedTokenizerBase, tokens: TaskTokens, pad_id: int, task: list[str]) -> None:
    """Give the ids beyond the model's vocabulary their tokens, and a token to each row below them that has none."""
    first = tokens.image_id
    known = len(tokenizer)
    if known > first:
        raise ConfigError(
            f"the tokenizer has {known} tokens, the model's vocabulary only {first}",
            "Does the tokenizer belong to this checkpoint?",
        )
    wanted = {f"<ola_unused_{n}>": n for n in range(known, first)}
    wanted |= {IMAGE_TOKEN: first, PAD_TOKEN: pad_id, **dict(zip(task, tokens.flat, strict=True))}
    taken = sorted(wanted.keys() & tokenizer.get_vocab().keys())
    if taken:
        raise ConfigError(f"the tokenizer already has {taken[0]}", "Import the checkpoint as it was published.")
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in wanted], special_tokens=True)
    vocabulary = tokenizer.get_vocab()
    wrong = [name for name, id_ in wanted.items() if vocabulary.get(name) != id_]
    if wrong:
        raise ConfigError(
            f"the tokenizer numbers {wrong[0]} as {vocabulary.get(wrong[0])}, the model has its row at "
            f"{wanted[wrong[0]]}",
            "Give a tokenizer whose ids run from 0 without gaps.",
        )
    tokenizer.pad_token = PAD_TOKEN


def _require_said(processor: Any, system: str) -> None:
    said: str = processor.apply_chat_template([{"role": "user", "content": "so?"}], tokenize=False)
    if system.strip() not in said:
        raise ConfigError(
            "the tokenizer's chat template leaves system messages out",
            "Import without --system, or give the tokenizer a template that has one.",
        )


def _generation(folder: Path, model: Any, tokens: TaskTokens, pad_id: int) -> GenerationConfig:
    found: GenerationConfig = model.generation_config
    if (folder / "generation_config.json").is_file():
        try:
            found = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{folder}: generation_config.json cannot be read: {error}", "Mend or remove it."
            ) from error
    found.pad_token_id = pad_id
    found.suppress_tokens = sorted({*(found.suppress_tokens or ()), *tokens.never_predicted})
    return found


def _settings(ours: ImportedOla) -> dict[str, Any]:
    """The part of a run's settings that the checkpoint was trained with."""
    return {
        "teachers": {
            teacher: {"layers": list(config.layers), "weight": ours.losses.weight(teacher)}
            for teacher, config in ours.bank.configs.items()
        },
        "contrastive": ours.losses.contrastive,
        "context": ours.bank.context,
    }
