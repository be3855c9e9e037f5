"""From settings to loaded teachers, and to what a store records of them. Runs in workers, or here to compare."""

from __future__ import annotations

import importlib.metadata

from olapipe.config import ExtractConfig
from olapipe.teachers import registry
from olapipe.teachers.base import Teacher, TeacherSettings
from olaschema.manifest import Precision, TeacherRecord

_RECORDED = ("torch", "transformers", "pillow", "numpy", "zarr")
# recorded only for the teachers whose features they compute
_RECORDED_FOR = {"sd-vae": ("diffusers",), "sd-unet": ("diffusers",)}


def load_teachers(config: ExtractConfig, device: str) -> dict[str, Teacher]:
    """Load every teacher of the settings on `device`; raises TeacherError."""
    return {
        name: registry.load(
            name,
            TeacherSettings(
                checkpoint=config.checkpoints.get(name),
                preset=config.preset,
                device=device,
                compute_dtype=config.compute_dtype,
                compile=config.compile,
                options=config.options.get(name, {}),
            ),
        )
        for name in config.teachers
    }


def teacher_record(teacher: Teacher, precision: Precision) -> TeacherRecord:
    """Return what a store records of a teacher."""
    libraries = (*_RECORDED, *_RECORDED_FOR.get(teacher.name, ()))
    return TeacherRecord(
        fingerprint=teacher.fingerprint,
        precision=precision,
        source=teacher.source,
        licence=teacher.licence,
        libraries={name: importlib.metadata.version(name) for name in libraries},
    )
