"""The command `verify` as a whole: check, repair, check what was repaired, compare with the teacher, report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from rich.console import Console
from rich.table import Table
from rich.text import Text

from olapipe.live import Compared, compare_live
from olapipe.progress import Reporter
from olapipe.repair import Repair, Source, repair
from olapipe.report import size, visible
from olapipe.verify import Findings, Problem, damaged_shards, verify
from olaschema.store import FeatureStore

_LISTED = 50


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    store: str
    teachers: Sequence[str] | None
    repair: bool
    live: int
    seed: int
    source: Source


@dataclass
class Report:
    """What was found at first, what was done about it, and what is left."""

    findings: Findings
    repair: Repair | None = None
    left: list[Problem] = field(default_factory=list)
    live: list[Compared] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 while something is wrong, or where a repair gave a shard up or could not bring a feature back."""
        gone = self.repair is not None and (self.repair.gone or self.repair.lost)
        return 1 if self.left or gone or not all(compared.agrees for compared in self.live) else 0

    def show(self, console: Console, *, as_json: bool) -> None:
        """Print it."""
        if as_json:
            console.file.write(json.dumps(self._plain(), indent=1, ensure_ascii=False) + "\n")
            return
        found = self.findings
        for problem in found.problems[:_LISTED]:
            where = "" if problem.shard is None else f" [{problem.teacher} shard {problem.shard}]"
            console.print(Text(visible(f"damaged: {problem.file}{where}: {problem.text}")), soft_wrap=True)
        if len(found.problems) > _LISTED:
            console.print(Text(f"and {len(found.problems) - _LISTED} more; all of them: --json"))
        for note in found.notes:
            console.print(Text(visible(f"note: {note}")), soft_wrap=True)
        counts = f"{found.files} files, {size(found.bytes)}, {found.shards} shards, {found.rows} rows"
        console.print(Text(f"checked: {counts}; problems: {len(found.problems)}"), soft_wrap=True)
        self._show_repair(console)
        self._show_live(console)
        if self.left and self.repair is None and any(problem.mending for problem in self.left):
            console.print(Text("--repair --images FOLDER makes the damaged shards again"), soft_wrap=True)

    def _show_repair(self, console: Console) -> None:
        if self.repair is None:
            return
        made = [f"{teacher} shard {shard}" for teacher, shard in self.repair.shards] + self.repair.documents
        console.print(Text(visible(f"made again: {', '.join(made) or 'nothing'}")), soft_wrap=True)
        for key in self.repair.changed:
            text = f"{key}: the image has changed since; the shard holds the features of the new one"
            console.print(Text(visible(text)), soft_wrap=True)
        for text in self.repair.gone:
            console.print(Text(visible(f"not brought back: {text}")), soft_wrap=True)
        for text in self.repair.lost:
            console.print(Text(visible(f"given up: {text}")), soft_wrap=True)
        for problem in self.left:
            console.print(Text(visible(f"still damaged: {problem.file}: {problem.text}")), soft_wrap=True)

    def _show_live(self, console: Console) -> None:
        if not self.live:
            return
        table = Table(title="computed again", title_justify="left")
        for column in ("teacher", "images", "worst / allowed", "worst relative L2", "worst image"):
            table.add_column(column)
        for teacher in dict.fromkeys(compared.teacher for compared in self.live):
            mine = [compared for compared in self.live if compared.teacher == teacher]
            worst = max(mine, key=lambda compared: compared.worst)
            relative = max(compared.relative for compared in mine)
            cells = (teacher, str(len(mine)), f"{worst.worst:.3g}", f"{relative:.3g}", visible(worst.key))
            table.add_row(*map(Text, cells))
        console.print(table)
        for compared in self.live:
            if not compared.agrees:
                text = compared.problem or f"differs by {compared.worst:.3g} times what is allowed"
                console.print(Text(visible(f"{compared.teacher} {compared.key}: {text}")), soft_wrap=True)

    def _plain(self) -> dict[str, object]:
        found = self.findings
        checked = {"files": found.files, "bytes": found.bytes, "shards": found.shards, "rows": found.rows}
        return {
            "problems": [asdict(problem) for problem in found.problems],
            "notes": found.notes,
            "checked": checked,
            "repair": None if self.repair is None else asdict(self.repair),
            "left": [asdict(problem) for problem in self.left],
            "live": [_finite(asdict(compared)) for compared in self.live],
        }


def audit(request: Request, reporter: Reporter) -> Report:
    """Verify a store and do what else was asked for; raises OlaError for what cannot be done."""
    findings = verify(request.store, reporter, teachers=request.teachers)
    report = Report(findings, left=findings.problems)
    if request.repair and findings.problems:
        store = FeatureStore.open(request.store)
        report.repair = repair(store, findings.problems, request.source, reporter)
        again = {(name, shard) for shard, names in damaged_shards(findings.problems).items() for name in names}
        report.left = verify(request.store, reporter, only=again).problems
    if request.live:
        store = FeatureStore.open(request.store)
        names = request.teachers or store.teachers()
        report.live = compare_live(store, names, request.live, request.source, seed=request.seed)
    return report


def _finite(values: dict[str, object]) -> dict[str, object]:
    # JSON has no infinity
    return {name: None if value == float("inf") else value for name, value in values.items()}
