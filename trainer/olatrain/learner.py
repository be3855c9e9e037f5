"""What is trained: a student, of which all or a part is frozen, and the predictors beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from olaschema.errors import ConfigError
from olaschema.manifest import Fingerprint
from olatrain.config import TrainConfig
from olatrain.groups import choose_trainable, model_groups
from olatrain.lora import add_adapters
from olatrain.losses import LossConfig
from olatrain.predictors import PredictorBank, PredictorConfig, Standard, published_predictor
from olatrain.sharding import shard_language_model
from olatrain.sidecar import Sidecar
from olatrain.student import Student
from olatrain.tokens import TaskTokens
from olatrain.tower import Tower


class Learner(nn.Module):
    """The student, the predictors and the weights of their losses."""

    def __init__(self, student: Student, bank: PredictorBank, losses: LossConfig) -> None:
        super().__init__()
        self.student = student
        self.bank = bank
        self.losses = losses
        self.bases = nn.ModuleDict()
        """By teacher what decodes targets that are stored as klt (`olatrain.scaling.StoredBasis`)."""
        self.tower: Tower | None = None
        """What gives the targets in place of the store, under `target_control = self`."""

    @property
    def tokens(self) -> TaskTokens:
        """The student's task tokens."""
        return self.student.tokens

    def state(self) -> dict[str, Tensor]:
        """Return everything that a checkpoint keeps, by name, as the live tensors.

        Projector, latents and predictors always; of language model and vision tower what trains.
        """
        kept: dict[str, Tensor] = {}
        for part, module in self._parts().items():
            kept |= {f"{part}.{name}": value for name, value in module.state_dict().items()}
        return kept | {name: value.detach() for name, value in self._of_model().items()}

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that train, by their name in `state`."""
        found = {
            f"{part}.{name}": parameter
            for part, module in self._parts().items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        return found | self._of_model()

    def _parts(self) -> dict[str, nn.Module]:
        return {
            "projector": self.student.projector,
            "latents": self.student.latents,
            "predictors": self.bank,
            "feeds": self.student.feeds.projectors,
        }

    def _of_model(self) -> dict[str, nn.Parameter]:
        groups = model_groups(self.student)
        return {
            f"{group}.{name}": parameter
            for group in ("llm", "vision")
            for name, parameter in groups[group].items()
            if parameter.requires_grad
        }


def build_learner(
    config: TrainConfig,
    fingerprints: Mapping[str, Fingerprint],
    tokens: TaskTokens,
    device: torch.device,
    *,
    start: Sidecar | None,
    standards: Mapping[str, Standard] | None = None,
    world: int = 1,
) -> Learner:
    """Load the student in float32, freeze what does not train, and set up what does; the same on every rank.

    `start` is the sidecar to begin from; what it does not hold begins fresh. `standards` are of the store's targets.
    A language model that trains is split over `world` ranks.

    Raises ConfigError where the student lacks a layer or a teacher's task tokens.
    """
    student_model = load_model(config)
    hidden = int(student_model.get_input_embeddings().weight.shape[1])
    tower = None
    if config.target_control == "self":
        tower = Tower(student_model, tokens, frozen_copy="vision" in config.train)
    shapes = {name: tower.shape(fingerprints[name]) if tower else fingerprints[name].shape for name in config.teachers}
    predictors = {
        name: _predictor(name, shapes[name], teacher.layers, hidden, tokens, start)
        for name, teacher in config.teachers.items()
    }
    bank = PredictorBank(
        predictors,
        tokens,
        hidden_size=hidden,
        seed=config.seed,
        context=config.context,
        compat="ola" if config.compat == "ola" else None,
        standards=standards,
    )
    latents = {}
    if tokens.tokens_per_teacher:
        learned = [teacher for teacher in tokens.teachers if teacher not in config.feed]
        latents = {teacher: _latents(teacher, predictors, tokens, start) for teacher in learned}
    feeds = {name: fingerprints[name].shape for name in config.feed}
    student = Student(student_model, tokens, latents=latents, taps=bank.taps, seed=config.seed + 1, feeds=feeds)
    if start is not None:
        start.require_feeds({name: fingerprints[name] for name in config.feed})
        start.fill(student, bank)
    if config.lora is not None:
        add_adapters(student, config.lora, seed=config.seed + 2)
    choose_trainable(student, bank, config)
    if world > 1 and "llm" in config.train:
        shard_language_model(student, device, world)
    learner = Learner(student, bank, loss_config(config))
    learner.tower = tower
    learner.to(device).eval()
    if config.gradient_checkpointing:
        student.checkpoint_gradients()
    return learner


def loss_config(config: TrainConfig) -> LossConfig:
    """Return the weights of a run's losses."""
    teachers = config.teachers.items()
    return LossConfig(
        text=config.text,
        teachers={name: teacher.weight for name, teacher in teachers},
        contrastive=config.contrastive,
        layers={name: teacher.layer_weights for name, teacher in teachers},
        regressions={name: teacher.regression for name, teacher in teachers},
        contrastives={name: t.contrastive for name, t in teachers if t.contrastive is not None},
    )


def load_start(config: TrainConfig) -> Sidecar | None:
    """Return the sidecar that a run starts from: the student's, where it has one and `init` does not say otherwise."""
    return Sidecar.load(config.student) if config.init == "student" else None


def _predictor(
    teacher: str,
    shape: tuple[int, ...],
    layers: tuple[int, ...],
    hidden: int,
    tokens: TaskTokens,
    start: Sidecar | None,
) -> PredictorConfig:
    found = start.predictor(teacher, shape, layers) if start is not None else None
    return found or published_predictor(
        teacher, shape, layers, hidden_size=hidden, tokens_per_teacher=tokens.tokens_per_teacher
    )


def _latents(teacher: str, predictors: Mapping[str, PredictorConfig], tokens: TaskTokens, start: Sidecar | None) -> int:
    if teacher in predictors:
        return predictors[teacher].latents(tokens.tokens_per_teacher)
    # not supervised here: as many as it was trained with before, else one vector for each of its task tokens
    trained = start.latents(teacher) if start is not None else None
    return tokens.count(teacher) if trained is None else len(trained)


def load_model(config: TrainConfig) -> Any:
    """Load the student's model in float32; raises ConfigError where it cannot be loaded."""
    return load_student(config.student, dtype=torch.float32)


def load_student(folder: Path, *, dtype: torch.dtype | Literal["auto"] = "auto") -> Any:
    """Load the model of a student's folder, as it is stored or in `dtype`; raises ConfigError where that fails."""
    try:
        return AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{folder} cannot be loaded as a student: {first}", "Make its folder with `olatrain compose`."
        ) from error
