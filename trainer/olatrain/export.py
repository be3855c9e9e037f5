"""`olatrain export`: a run's newest checkpoint as a folder that transformers loads without this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from pydantic import ValidationError
from torch import nn

from olaschema.errors import ConfigError
from olaschema.manifest import TeacherRecord
from olatrain.card import model_card
from olatrain.chat import IMAGE_TOKEN
from olatrain.checkpoint import CheckpointError, latest_checkpoint, load_tensors, prefixed, read_state
from olatrain.compose import load_processor
from olatrain.config import TrainConfig
from olatrain.folder import publish_folder, require_new
from olatrain.learner import Learner, build_learner, load_start
from olatrain.lora import merge_adapters
from olatrain.predictors import Standard
from olatrain.setup import student_digest
from olatrain.sidecar import Sidecar
from olatrain.tokenformat import in_format
from olatrain.tokens import TaskFormat, TaskTokens
from olatrain.watch import last_events

Dtype = Literal["float32", "bfloat16", "float16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PROBE = "probe"


@dataclass(frozen=True)
class Trained:
    """A run's newest checkpoint, loaded."""

    config: TrainConfig
    step: int
    samples: str
    """Digest of the samples."""
    teachers: tuple[TeacherRecord, ...]
    """Of this run: those that were losses, then those that were fed, in the order of its settings."""
    start: Sidecar | None
    learner: Learner

    @property
    def all_teachers(self) -> tuple[TeacherRecord, ...]:
        """The run's teachers, and those that shaped its student before."""
        before = self.start.record.teachers if self.start is not None else ()
        own = {record.fingerprint.digest() for record in self.teachers}
        return (*self.teachers, *(record for record in before if record.fingerprint.digest() not in own))


def export(
    run: Path,
    out: Path,
    *,
    student: Path | None = None,
    dtype: Dtype = "float32",
    task_format: TaskFormat | None = None,
) -> Trained:
    """Write a run's student as a plain checkpoint: model, processor, chat template, model card, sidecar.

    The group means of the latents become the embedding rows of the task tokens. Tied embeddings are untied for that:
    a mean must not become an output row. Features that a student is fed cannot be in it: the rows of their tokens stand
    for an image without a feature, and the sidecar holds what projects features. The ids that are no answer are
    suppressed in generation. In `dtype` float32 the model computes what the trained one does; the sidecar always is
    float32. `student` is the folder that the run started from, where it has moved. `task_format` `emb` puts every
    latent into the sequence from here on, for the next stage; the model then is another one than was trained.

    Raises CheckpointError where the run has no checkpoint, or the student is not the one it was made with; ConfigError
    for what cannot be loaded or written.
    """
    require_new(out)
    trained = load_trained(run, student=student)
    processor = load_processor(trained.config.student)
    tokens = trained.learner.tokens
    model: Any = trained.learner.student.model
    if tokens.flat:
        untie(model)
    trained.learner.student.store_task_embeddings()
    tokens = in_format(task_format, model, processor, tokens, trained.learner.student.latents)
    require_prompts(processor, tokens)
    suppressed = model.generation_config.suppress_tokens or ()
    model.generation_config.suppress_tokens = sorted({*suppressed, *tokens.never_predicted})
    control = trained.config.target_control
    arm = f", the control arm target_control = {control}" if control != "none" else ""
    sidecar = Sidecar.of(
        trained.learner.student,
        trained.learner.bank,
        origin=f"exported from the run {run.resolve().name} at step {trained.step}{arm}",
        teachers=trained.all_teachers,
        feeds={name: trained.config.fingerprints[name] for name in trained.config.feed},
    )
    card = model_card(
        name=out.resolve().name,
        config=trained.config,
        step=trained.step,
        samples=trained.samples,
        teachers=trained.teachers,
        earlier=trained.all_teachers[len(trained.teachers) :],
        origin=trained.start.record.origin if trained.start is not None else None,
        model=model,
        tokens=tokens,
        dtype=dtype,
        figures=last_events(run, trained.step),
    )
    model.to(_DTYPES[dtype])
    with publish_folder(out) as made:
        model.save_pretrained(made)
        processor.save_pretrained(made)
        tokens.save(made)
        sidecar.save(made)
        (made / "README.md").write_text(card, encoding="utf-8")
    return trained


def load_trained(run: Path, *, student: Path | None = None) -> Trained:
    """Load a run's newest checkpoint into its student, on the CPU; the store is not needed.

    Raises CheckpointError and ConfigError as `export`.
    """
    folder = latest_checkpoint(run / "checkpoints")
    if folder is None:
        raise CheckpointError(f"{run} has no checkpoint", "Give the folder of a run (--out of `olatrain run`).")
    state = read_state(folder)
    config, teachers = _read_state(state, folder)
    if config.probe is not None:
        raise ConfigError(f"{run} is a probe, which leaves its student as it was", "Export the run that trained it.")
    if student is not None:
        config = config.model_copy(update={"student": student})
    if not config.student.is_dir():
        raise ConfigError(
            f"{config.student}, the student that the run started from, is no folder here",
            "Give where it is now with --student, or run in the folder that the run was started in.",
        )
    if student_digest(config.student) != state["identity"]["student"]:
        raise CheckpointError(
            f"{config.student} is not the student that {folder} was made with", "Give that student with --student."
        )
    tokens = TaskTokens.load(config.student)
    start = load_start(config)
    standards = {}
    if config.normalise == "channel":  # the run's own statistics come with its tensors, here is only their place
        widths = {name: config.fingerprints[name].channels for name in config.teachers}
        standards = {name: Standard(torch.zeros(width), torch.ones(width)) for name, width in widths.items()}
    learner = build_learner(config, config.fingerprints, tokens, torch.device("cpu"), start=start, standards=standards)
    load_tensors(folder, state, prefixed("trainable", learner.state()))
    if config.lora is not None:
        merge_adapters(learner.student.model)
    return Trained(config, int(state["step"]), state["identity"]["samples"], teachers, start, learner)


def _read_state(state: dict[str, Any], folder: Path) -> tuple[TrainConfig, tuple[TeacherRecord, ...]]:
    try:
        config = TrainConfig.model_validate(state["config"])
        teachers = tuple(TeacherRecord.model_validate(state["teachers"][name]) for name in config.reads)
    except (KeyError, ValidationError) as error:
        raise CheckpointError(
            f"{folder}: its settings or its teachers' licences are not readable: {error}",
            "Continue the run for one step with this version, which saves them.",
        ) from error
    return config, teachers


def require_prompts(processor: Any, tokens: TaskTokens) -> None:
    """Raise ConfigError unless both forms of a prompt put the task tokens right behind the image.

    Structured content, and plain strings that hold `<image>`, as evaluation harnesses pass them.
    """
    parts = [{"type": "image"}, {"type": "text", "text": _PROBE}]
    wanted = [tokens.image_id, *tokens.after_image, *tokens.flat]
    for form, content in (("structured", parts), ("plain", f"{IMAGE_TOKEN}\n{_PROBE}")):
        try:
            text = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
        except (TemplateError, TypeError) as error:
            raise _no_prompt(form, str(error)) from error
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not _holds(ids, wanted) or _PROBE not in text:
            raise _no_prompt(form, "the task tokens do not follow the image")


def _holds(ids: Sequence[int], wanted: Sequence[int]) -> bool:
    places = [place for place, id_ in enumerate(ids) if id_ == wanted[0]]
    return len(places) == 1 and list(ids[places[0] : places[0] + len(wanted)]) == list(wanted)


def _no_prompt(form: str, why: str) -> ConfigError:
    return ConfigError(
        f"the student's chat template does not serve {form} content: {why}",
        "Make the student's folder with `olatrain compose` or `olatrain import-ola`.",
    )


@torch.no_grad()
def untie(model: Any) -> None:
    """Give a model with tied embeddings an output matrix of its own, equal to what it was."""
    output: nn.Linear = model.get_output_embeddings()
    if output.weight is model.get_input_embeddings().weight:
        output.weight = nn.Parameter(output.weight.detach().clone(), requires_grad=output.weight.requires_grad)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
