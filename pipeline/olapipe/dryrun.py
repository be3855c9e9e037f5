"""`extract --dry-run`: what a run would do, told without writing anything or loading a teacher."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from olapipe.config import ExtractConfig
from olapipe.report import size
from olapipe.tasks import Pending, Planned
from olapipe.teachers import registry
from olaschema.precision import array_formats, formats_of, is_centred
from olaschema.store import DEFAULT_ROWS_PER_SHARD, FeatureStore


@dataclass(frozen=True)
class TeacherPlan:
    """What one teacher has to do. `row_bytes` are those of a stored feature before compression, in so many `arrays`.

    Both are None if unknown.
    """

    teacher: str
    shards_done: int
    shards: int
    images: int
    row_bytes: int | None
    arrays: int | None


@dataclass(frozen=True)
class DryRun:
    """The plan of a run."""

    images: int
    new: int
    shards: int
    teachers: list[TeacherPlan]

    def show(self, console: Console) -> None:
        """Print a table."""
        table = Table(
            title=f"{self.images} images in {self.shards} shards, {self.new} of them new", title_justify="left"
        )
        for column in ("teacher", "shards done", "shards to do", "images to do", "bytes before compression", "files"):
            table.add_column(column, justify="left" if column == "teacher" else "right")
        for each in self.teachers:
            stored = "unknown" if each.row_bytes is None else size(each.images * each.row_bytes)
            files = "unknown" if each.arrays is None else each.shards * (each.arrays + 1)  # and a receipt
            cells = (each.teacher, each.shards_done, each.shards, each.images, stored, files)
            table.add_row(*(Text(str(cell)) for cell in cells))
        console.print(table)


def dry_run(config: ExtractConfig, store: FeatureStore | None, new: int) -> DryRun:
    """Count what `extract` would do for a corpus that lists `new` images which the store does not have."""
    size_of_shard = store.rows_per_shard if store else config.shard_size or DEFAULT_ROWS_PER_SHARD
    planned = (Planned.of(store) if store else Planned(size_of_shard, (), ())).grown(new)
    pending = Pending(store, planned, config.teachers, retry_failed=config.retry_failed)
    teachers = [
        TeacherPlan(
            name, pending.done[name], pending.shards(name), pending.images(name), *_size_of_row(config, store, name)
        )
        for name in config.teachers
    ]
    return DryRun(sum(planned.rows), new, len(pending.rows), teachers)


def _size_of_row(config: ExtractConfig, store: FeatureStore | None, teacher: str) -> tuple[int | None, int | None]:
    """Return the bytes of one stored feature and its arrays: those of the store, or of the published checkpoint.

    (None, None) where another checkpoint or the job's sample will tell.
    """
    if store is not None and teacher in store.teachers():
        formats = formats_of(store.teacher(teacher))
    else:
        info = registry.available()[teacher]
        if not info.channels or teacher in config.checkpoints or teacher in config.options:
            return None, None
        if config.precision == "auto":
            return None, None  # settled on a sample when it runs
        shape, precision = (*(info.grid or ()), info.channels), config.precision
        formats = array_formats(shape, precision, centred=is_centred(shape, precision))
    return sum(each.row_bytes for each in formats.values()), len(formats)
