"""The sidecar `ola.safetensors` of a student's folder: what the method learned that no plain checkpoint has room for.

Latents, predictors, logit scales and projectors of fed features, named as in a run's checkpoint; the settings that give
them a meaning are in the file's own header. `olatrain import-ola` and `olatrain export` write it, `olatrain run` starts
from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from olaschema.errors import ConfigError
from olaschema.manifest import Fingerprint, Frozen, TeacherRecord, canonical_json
from olatrain.feed import Feeds
from olatrain.predictors import PredictorBank, PredictorConfig
from olatrain.student import Student
from olatrain.tokens import Context

SIDECAR_NAME = "ola.safetensors"
_HEADER = "ola"
_REMEDY = "Make the student's folder again, or start without the file (init = fresh)."


class SidecarRecord(Frozen):
    """What the tensors of a sidecar mean."""

    format: Literal[1] = 1
    predictors: dict[str, PredictorConfig]
    context: Context
    """What the predictors read while they were trained."""
    origin: str
    """Where the tensors come from, in words; no paths."""
    teachers: tuple[TeacherRecord, ...] = ()
    """Every teacher whose features shaped the student so far, with its licence."""
    feeds: dict[str, Fingerprint] = Field(default_factory=dict)
    """Teachers whose features the student takes as inputs, and what they mean."""


@dataclass(frozen=True)
class Sidecar:
    """A sidecar in memory. Tensors are float32: `latents.TEACHER`, `predictors.heads.TEACHER.LAYER.…`,
    `predictors.logit_scales.TEACHER`, `feeds.TEACHER.…`.
    """  # fmt: skip

    record: SidecarRecord
    tensors: dict[str, Tensor]

    @property
    def fingerprints(self) -> list[Fingerprint]:
        """What the features of the teachers mean that shaped the student."""
        return [record.fingerprint for record in self.record.teachers]

    @classmethod
    def of(
        cls,
        student: Student,
        bank: PredictorBank,
        *,
        origin: str,
        teachers: Sequence[TeacherRecord] = (),
        feeds: Mapping[str, Fingerprint] | None = None,
    ) -> Sidecar:
        """Gather what a student and its predictors have learned; copies. `feeds` says what is fed to it."""
        parts = {
            "latents": student.latents.state_dict(),
            "predictors": bank.state_dict(),
            "feeds": student.feeds.projectors.state_dict(),
        }
        tensors = {
            f"{part}.{name}": value.detach().to("cpu", torch.float32, copy=True).contiguous()
            for part, state in parts.items()
            for name, value in state.items()
        }
        record = SidecarRecord(
            predictors=bank.configs,
            context=bank.context,
            origin=origin,
            teachers=tuple(teachers),
            feeds=dict(feeds or {}),
        )
        return cls(record, tensors)

    @classmethod
    def load(cls, folder: Path) -> Sidecar | None:
        """Read a student's sidecar; None where the folder has none. Raises ConfigError where it is damaged."""
        path = folder / SIDECAR_NAME
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                record = SidecarRecord.model_validate_json((file.metadata() or {}).get(_HEADER, ""))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "its header"
            raise ConfigError(f"{path}: {where}: {problem['msg']}", _REMEDY) from error
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path} cannot be read: {error}", _REMEDY) from error
        return cls(record, tensors)

    def save(self, folder: Path) -> None:
        """Write the sidecar, equal bytes for equal content."""
        save_file(self.tensors, folder / SIDECAR_NAME, {_HEADER: canonical_json(self.record).decode()})

    def predictor(self, teacher: str, shape: tuple[int, ...], layers: tuple[int, ...]) -> PredictorConfig | None:
        """Return how the sidecar predicts a teacher, at other layers if need be; None where it does not.

        Raises ConfigError where the teacher's target has another shape than the sidecar's.
        """
        found = self.record.predictors.get(teacher)
        if found is None:
            return None
        if found.shape != shape:
            raise ConfigError(
                f"the student's {SIDECAR_NAME} predicts {teacher} as {found.shape}, the store holds {shape}",
                "Extract features of that shape, or start without what it learned (init = fresh).",
            )
        return found.model_copy(update={"layers": layers})

    def latents(self, teacher: str) -> Tensor | None:
        """Return the vectors (N, D) learned for a teacher."""
        return self.tensors.get(f"latents.{teacher}")

    @torch.no_grad()
    def fill(self, student: Student, bank: PredictorBank) -> None:
        """Put what the sidecar holds into a fresh student and its predictors; `describe` says what that is.

        Raises ConfigError naming the tensor that does not fit.
        """
        for teacher, latents in student.latents.items():
            found = self.latents(teacher)
            if found is not None and (found.shape == latents.shape or teacher in self.record.predictors):
                self._copy(latents, found, f"latents.{teacher}")
        for teacher in self.record.predictors.keys() & bank.configs.keys():
            standardised = f"predictors.standards.{teacher}.mean" in self.tensors
            if standardised != (teacher in bank.standards):
                told = "channel" if standardised else "none"
                raise ConfigError(
                    f"the student's {SIDECAR_NAME} predicts {teacher} with normalise = {told}, this run differs",
                    f"Set normalise to {told}, or start without what it learned (init = fresh).",
                )
        for name, value in bank.state_dict().items():
            found = self.tensors.get(f"predictors.{name}")
            if found is not None:
                self._copy(value, found, f"predictors.{name}")
        self.fill_feeds(student.feeds)

    def require_feeds(self, fed: Mapping[str, Fingerprint]) -> None:
        """Raise ConfigError where the student is fed a teacher that `fed` lacks, FingerprintError where it differs."""
        lacking = sorted(self.record.feeds.keys() - fed.keys())
        if lacking:
            raise ConfigError(
                f"the student is fed features of {', '.join(lacking)}, and this run does not feed them",
                f"Feed them (--feed {','.join(self.record.feeds)}), or start without what it learned (init = fresh).",
            )
        for teacher, fingerprint in self.record.feeds.items():
            fingerprint.require_equal(
                fed[teacher],
                mine=f"in the student's {SIDECAR_NAME}",
                theirs="in the store",
                remedy="Extract with the settings of the store that it was trained from.",
            )

    @torch.no_grad()
    def fill_feeds(self, feeds: Feeds) -> None:
        """Put the projectors of fed features that the sidecar holds into fresh ones."""
        for name, value in feeds.projectors.state_dict().items():
            found = self.tensors.get(f"feeds.{name}")
            if found is not None:
                self._copy(value, found, f"feeds.{name}")

    def describe(self, layers: Mapping[str, Sequence[int]]) -> list[str]:
        """Say for each teacher and its layers what starts from the sidecar and what starts fresh."""
        notes = []
        for teacher, wanted in layers.items():
            found = self.record.predictors.get(teacher)
            known = [n for n in wanted if found is not None and n in found.layers]
            fresh = [n for n in wanted if n not in known]
            parts = [f"layers {_numbers(known)} from {SIDECAR_NAME}"] if known else []
            parts += [f"layers {_numbers(fresh)} fresh"] if fresh else []
            notes.append(f"{teacher}: predictors of {', of '.join(parts)}")
        return notes

    def _copy(self, target: Tensor, source: Tensor, name: str) -> None:
        if target.shape != source.shape:
            raise ConfigError(
                f"{name} in the student's {SIDECAR_NAME} is {tuple(source.shape)}, this run needs "
                f"{tuple(target.shape)}",
                _REMEDY,
            )
        target.copy_(source)


def _numbers(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
