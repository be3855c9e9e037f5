"""The command `verify`: every byte of a store against what its documents promise. Reads only, one shard at a time."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Literal, TypeVar

from olapipe.progress import Reporter
from olapipe.stored import StoredBasis, stored_basis
from olapipe.verify_shard import check_shard
from olaschema.errors import OlaError, StoreError
from olaschema.layout import basis_file, receipt_file
from olaschema.manifest import Generation, Receipt, RowReceipt, TeacherRecord
from olaschema.place import open_place
from olaschema.seal import MANIFEST, read_manifest, receipt_digest
from olaschema.store import FeatureStore
from olaschema.zarrbytes import array_documents

Result = TypeVar("Result")
Mending = Literal["shard", "document", "manifest"]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `file` is relative to the store; `rows` are those of the store that are hit, if known.

    `mending` says what `--repair` can do: extract the shard again, or write a document that follows from others.
    """

    file: str
    text: str
    teacher: str | None = None
    shard: int | None = None
    rows: tuple[int, ...] = ()
    mending: Mending | None = None


@dataclass
class Findings:
    """What `verify` found, and how much it has looked at."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is not damage: shards not extracted yet, an unfinished run."""
    files: int = 0
    bytes: int = 0
    shards: int = 0
    rows: int = 0
    """Rows of all teachers whose values were decoded."""

    def add(self, file: str, text: str, **more: object) -> None:
        """Add a problem."""
        self.problems.append(Problem(file, text, **more))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Plan:
    """What the generations say: how many images each planned shard has. None of it is known if one is damaged."""

    planned: dict[int, int]
    parts: frozenset[str]

    @property
    def shards(self) -> int:
        """Number of planned shards."""
        return len(self.planned)


def verify(
    root: str,
    reporter: Reporter,
    *,
    teachers: Collection[str] | None = None,
    only: Collection[tuple[str, int]] | None = None,
) -> Findings:
    """Check a store: all of it, or the shards of some `teachers`, or `only` some (teacher, shard) and all documents.

    Raises StoreError where there is no store, or not the teacher asked for.
    """
    findings = Findings()
    try:
        store = FeatureStore.open(root)
    except StoreError as error:
        if not open_place(root).exists("zarr.json"):
            raise
        findings.add("zarr.json", error.problem)
        findings.notes.append("nothing else was checked: the root document says how the rest is to be read")
        return findings
    for name in teachers or ():
        store.teacher(name)
    return _Verifier(store, findings, reporter, teachers, only).run()


class _Verifier:
    def __init__(
        self,
        store: FeatureStore,
        findings: Findings,
        reporter: Reporter,
        teachers: Collection[str] | None,
        only: Collection[tuple[str, int]] | None,
    ) -> None:
        self.store = store
        self.found = findings
        self.reporter = reporter
        self.teachers = teachers
        self.only = only
        self.known: set[str] = {"zarr.json", MANIFEST}
        """Files that may be there."""
        self._bases: dict[str, StoredBasis] = {}

    def run(self) -> Findings:
        plan = self._plan()
        records = {}
        for name in self.store.teachers():
            record = self._teacher(name, plan)
            if record is not None:
                records[name] = record
        self._manifest(plan)
        chosen = [name for name in records if self.teachers is None or name in self.teachers]
        totals = {name: sum(self._images(plan, shard) for shard in self._shards(name)) for name in chosen}
        self.reporter.begin(totals, dict.fromkeys(chosen, 0))
        try:
            for name, record in records.items():
                self._receipts(name, record, plan, check=name in chosen)
        finally:
            self.reporter.end()
        self._strays(plan)
        return self.found

    def _plan(self) -> Plan | None:
        names = [f"samples/{name}" for name in self.store.place.names("samples") if name.endswith(".json")]
        self.known |= set(names)
        generations: list[Generation] = []
        for name in names:
            generation = self._try(name, partial(self.store.generation, name))
            if generation is not None:
                generations.append(generation)
                self._parts(generation)
        if len(generations) < len(names):
            return None
        if self._try("samples", self.store.generations) is None:
            return None
        size = self.store.rows_per_shard
        planned = {
            (generation.first_row + offset) // size: min(size, generation.rows - offset)
            for generation in generations
            for offset in range(0, generation.rows, size)
        }
        return Plan(planned, frozenset(part for generation in generations for part in generation.parts))

    def _parts(self, generation: Generation) -> None:
        row = generation.first_row
        for name in generation.parts:
            self.known.add(name)
            rows = self._try(name, partial(_rows_of, self.store, generation, name))
            if rows is None:
                return
            self._count(generation.parts[name].bytes)
            if rows != list(range(row, row + len(rows))):
                self.found.add(name, f"its rows are not numbered from {row} on")
            row += len(rows)
        if row != generation.first_row + generation.rows:
            self.found.add(
                f"samples/{generation.number:04d}.json",
                f"its parts hold {row - generation.first_row} images, it promises {generation.rows}",
            )

    def _teacher(self, name: str, plan: Plan | None) -> TeacherRecord | None:
        self.known.add(f"{name}/zarr.json")
        record = self._try(f"{name}/zarr.json", partial(self.store.teacher, name))
        self.known |= {receipt_file(name, shard) for shard in self.store.committed(name)}
        if record is not None and record.fingerprint.teacher != name:
            self.found.add(f"{name}/zarr.json", f"it describes the teacher {record.fingerprint.teacher}")
            record = None
        if record is None:  # then nothing says which arrays there should be
            arrays = self.store.array_names(name)
            self.known |= {f"{name}/{array}/zarr.json" for array in arrays}
            return None
        if record.basis is not None:
            file = basis_file(name)
            self.known.add(file)
            basis = self._try(file, partial(stored_basis, self.store, record))
            if basis is not None:
                self._bases[name] = basis
                self._count(record.basis.bytes)
        implied = self._documents(record, plan.shards if plan else 0)
        for array, document in implied.items():
            self._array(name, array, document, record, plan)
        return record

    def _documents(self, record: TeacherRecord, shards: int) -> dict[str, bytes]:
        """Return what the `zarr.json` of each array of a teacher must be, by the array's name."""
        return array_documents(record, self.store.rows_per_shard, shards)

    def _array(self, name: str, array: str, document: bytes, record: TeacherRecord, plan: Plan | None) -> None:
        file = f"{name}/{array}/zarr.json"
        self.known.add(file)
        try:
            data = self.store.place.read(file)
        except StoreError:
            self.found.add(file, "it is missing", teacher=name, mending="document")
            return
        self._count(len(data))
        if data == document:
            return
        rows, committed = _rows(data), self.store.committed(name)
        span = -1 if rows is None or rows % self.store.rows_per_shard else rows // self.store.rows_per_shard
        if span >= 0 and data == self._documents(record, span)[array]:
            if plan is None:
                return
            if max(committed, default=-1) < span < plan.shards:
                self.found.notes.append(f"{file} does not span all planned rows yet: a plan was interrupted")
                return
        self.found.add(file, "it is not what the teacher's record implies", teacher=name, mending="document")

    def _manifest(self, plan: Plan | None) -> None:
        try:
            manifest = read_manifest(self.store)
        except StoreError as error:
            self.found.add(MANIFEST, error.problem, mending="manifest")
            return
        if manifest is None or not manifest.files:
            self.found.notes.append(
                "no run has finished since the last change: a lost document cannot be told from one not written yet"
            )
            if manifest is None:
                return
        reported = {problem.file for problem in self.found.problems}
        for name, promised in manifest.files.items():
            mending: Mending | None = "document" if name.count("/") == 2 else None
            if not self.store.place.exists(name):
                if name not in reported:
                    self.found.add(name, "it is missing; the manifest lists it", mending=mending)
                continue
            data = self.store.place.read(name)
            same = (len(data), hashlib.sha256(data).hexdigest()) == (promised.bytes, promised.sha256)
            if not same and name not in reported:
                self.found.add(name, "it is not the document that the manifest lists", mending=mending)
        for teacher, digests in manifest.receipts.items():
            committed = set(self.store.committed(teacher))
            for shard, digest in enumerate(digests):
                text = None
                if shard not in committed:
                    text = "it is missing; the manifest lists it"
                elif receipt_digest(self.store, teacher, shard) != digest:
                    text = "it is not the receipt that the manifest lists"
                if text:
                    file = receipt_file(teacher, shard)
                    self.found.add(file, text, teacher=teacher, shard=shard, mending="shard")

    def _shards(self, teacher: str) -> list[int]:
        return [s for s in self.store.committed(teacher) if self.only is None or (teacher, s) in self.only]

    def _images(self, plan: Plan | None, shard: int) -> int:
        return self.store.rows_per_shard if plan is None else plan.planned.get(shard, 0)

    def _receipts(self, teacher: str, record: TeacherRecord, plan: Plan | None, *, check: bool) -> None:
        committed = self.store.committed(teacher)
        if plan is not None:
            missing = plan.shards - len(set(committed) & plan.planned.keys())
            if missing:
                self.found.notes.append(f"{teacher}: {missing} of {plan.shards} shards are not extracted yet")
        wanted = set(self._shards(teacher)) if check else set()
        documents = self._documents(record, 1)
        shared = _shared_rows(self.store, teacher)
        basis = self._bases.get(teacher)
        done = 0
        for shard in sorted(wanted):
            self.reporter.update({teacher: done})
            done += self._images(plan, shard)
            planned = None if plan is None else plan.planned.get(shard, 0)
            checked = check_shard(self.store, record, shard, planned, documents, shared, basis)
            for trouble in checked.troubles:
                self.found.add(
                    trouble.file, trouble.text, teacher=teacher, shard=shard, rows=trouble.rows, mending="shard"
                )
            self.found.shards += 1
            self.found.rows += checked.rows
            self.found.files += checked.files
            self.found.bytes += checked.bytes
        if check:
            self.reporter.update({teacher: done})

    def _strays(self, plan: Plan | None) -> None:
        uncommitted = 0
        for name in self.store.place.walk():
            if name in self.known:
                continue
            place = _shard_of(name)
            if place is not None and f"{name.split('/c/')[0]}/zarr.json" in self.known:
                teacher, shard = place
                if receipt_file(teacher, shard) in self.known:
                    continue  # its receipt names it, or was reported
                if plan is None or shard < plan.shards:
                    uncommitted += 1
                    continue
            if plan is not None and _unfinished_part(name, self.known):
                self.found.notes.append(f"{name} belongs to a plan that was interrupted")
                continue
            if plan is None and (part := _PART.fullmatch(name)) and self.store.place.exists(f"samples/{part[1]}.json"):
                continue  # its generation names it, or did before it was damaged, which is reported
            self.found.add(name, "nothing in the store names this file")
        if uncommitted:
            self.found.notes.append(f"{uncommitted} files of uncommitted shards: `extract` writes them again")

    def _count(self, size: int) -> None:
        self.found.files += 1
        self.found.bytes += size

    def _try(self, file: str, read: Callable[[], Result]) -> Result | None:
        try:
            return read()
        except OlaError as error:
            self.found.add(file, error.problem)
            return None


def _shared_rows(store: FeatureStore, teacher: str) -> Callable[[int], RowReceipt | None]:
    """Return a function that gives the receipt of a row, None where it cannot be read."""

    @lru_cache(maxsize=64)
    def read(shard: int) -> Receipt | None:
        try:
            return store.receipt(teacher, shard)
        except StoreError:
            return None

    def row(number: int) -> RowReceipt | None:
        receipt = read(number // store.rows_per_shard)
        index = number % store.rows_per_shard
        return receipt.rows[index] if receipt is not None and index < len(receipt.rows) else None

    return row


def damaged_shards(problems: Sequence[Problem]) -> dict[int, list[str]]:
    """Return the teachers whose shard must be extracted again, by shard."""
    found: dict[int, set[str]] = {}
    for problem in problems:
        if problem.mending == "shard" and problem.shard is not None and problem.teacher is not None:
            found.setdefault(problem.shard, set()).add(problem.teacher)
    return {shard: sorted(teachers) for shard, teachers in sorted(found.items())}


def _rows_of(store: FeatureStore, generation: Generation, part: str) -> list[int]:
    return [sample.row for sample in store.part_samples(generation, part)]


def _rows(data: bytes) -> int | None:
    try:
        rows = json.loads(data)["shape"][0]
    except (ValueError, KeyError, TypeError, IndexError):
        return None
    return rows if isinstance(rows, int) else None


def _shard_of(name: str) -> tuple[str, int] | None:
    """Return teacher and shard of a file that is named like one of an array's shards."""
    parts = name.split("/")
    if len(parts) < 5 or parts[2] != "c" or not parts[3].isdecimal() or set(parts[4:]) != {"0"}:
        return None
    return (parts[0], int(parts[3])) if str(int(parts[3])) == parts[3] else None


_PART = re.compile(r"samples/(\d{4})-.*\.parquet")


def _unfinished_part(name: str, known: Collection[str]) -> bool:
    number = name.removeprefix("samples/")[:4]
    is_part = name.startswith("samples/") and name.endswith(".parquet") and number.isdecimal()
    return is_part and f"samples/{number}.json" not in known
