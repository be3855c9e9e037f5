"""From settings to loaded teachers, and to what a store records of them. Runs in workers, or here to compare."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager

from olapipe.config import ExtractConfig
from olapipe.teachers import registry
from olapipe.teachers.base import Teacher, TeacherSettings
from olaschema.manifest import Precision, TeacherRecord
from olaschema.precision import is_centred

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


def load_one(config: ExtractConfig, name: str) -> Teacher:
    """Load one teacher of the settings in this process, on a GPU where there is one and the settings allow it."""
    import torch

    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    return load_teachers(config.model_copy(update={"teachers": (name,)}), device)[name]


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Let torch use `count` CPU threads meanwhile: another number gives other bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def teacher_record(teacher: Teacher, precision: Precision) -> TeacherRecord:
    """Return what a store records of a teacher."""
    return TeacherRecord(
        fingerprint=teacher.fingerprint,
        precision=precision,
        centred=is_centred(teacher.fingerprint.shape, precision),
        source=teacher.source,
        licence=teacher.licence,
        libraries=libraries_of(teacher.name),
    )


def libraries_of(teacher: str) -> dict[str, str]:
    """Return the versions of the libraries that are recorded for a teacher."""
    return {name: importlib.metadata.version(name) for name in (*_RECORDED, *_RECORDED_FOR.get(teacher, ()))}
