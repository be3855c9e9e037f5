"""A teacher as it is listed: its name, licence, shape and options, before anything is loaded."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from olapipe.teachers import variants
from olapipe.teachers.base import Option, Teacher, TeacherSettings, resolve_options
from olaschema.errors import TeacherError
from olaschema.manifest import Fingerprint, Scalar


@dataclass(frozen=True)
class TeacherInfo:
    """A teacher as listed before anything is loaded. `module` holds its `load(info, settings)`.

    `published` is the hub id taken where no checkpoint is given, empty where one must be. `grid` and `channels`
    are those of the published checkpoint; 0 channels: whatever the checkpoint has. `problem` says why a teacher
    that is listed cannot be used, empty for all that can.
    """

    name: str
    published: str
    licence: str
    about: str
    grid: tuple[int, int] | None
    channels: int
    module: str
    options: Mapping[str, Option] = field(default_factory=dict)
    problem: str = ""

    @property
    def all_options(self) -> dict[str, Option]:
        """The teacher's own options and the target variants common to all; its own come first."""
        return {**self.options, **{name: each for name, each in variants.OPTIONS.items() if name not in self.options}}

    def options_of(self, fingerprint: Fingerprint) -> dict[str, Scalar]:
        """Return the options by which this teacher, with the same checkpoint, gives features of that fingerprint."""
        preprocessing = fingerprint.preprocessing
        view, sizes = preprocessing.view, [step.values for step in preprocessing.steps if "height" in step.values]
        told: dict[str, Scalar] = {
            **fingerprint.options,
            "channel_order": preprocessing.channel_order,
            "exif": preprocessing.exif,
            "view": view.kind if view.fraction == 1.0 else "own",
            "taps": ",".join(str(tap) for tap in fingerprint.taps),
            "pooling": fingerprint.pooling,
        }
        if sizes:
            told["image_size"] = str(sizes[-1]["height"])
        if fingerprint.grid is not None and "grid_resize" in fingerprint.options:
            told["grid"] = "{}x{}".format(*fingerprint.grid)
        return {name: told[name] for name in self.all_options if name in told}

    def load(self, settings: TeacherSettings) -> Teacher:
        """Load the teacher; raises TeacherError where the checkpoint or a setting cannot be used."""
        if self.problem:
            raise TeacherError(
                f"{self.name}: {self.problem}", "Mend or uninstall that package; the other teachers work without it."
            )
        if settings.checkpoint is None:
            if not self.published:
                raise TeacherError(
                    f"{self.name}: it has no checkpoint of its own", f"Pass one: --checkpoint {self.name}=FOLDER_OR_ID"
                )
            settings = replace(settings, checkpoint=self.published)
        resolved = resolve_options(self.name, self.all_options, settings)
        own = {name: value for name, value in settings.options.items() if name in self.options}
        variant = variants.Variant.of(
            self.name, {name: value for name, value in resolved.items() if name not in self.options}
        )
        teacher: Teacher = importlib.import_module(self.module).load(self, replace(settings, options=own))
        return variants.vary(teacher, variant)
