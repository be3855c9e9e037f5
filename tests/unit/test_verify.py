"""`verify`: what an intact store gives, and that each kind of damage is found in the file it is in."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from pipeline_support import digests, olapipe
from store_support import EXECUTION, fill_shard, images, record

from olapipe.progress import LineReporter
from olapipe.verify import Findings, verify
from olaschema.digest import intact, sealed
from olaschema.errors import OlaError
from olaschema.manifest import ChannelStatistics, Precision, Receipt, RowReceipt
from olaschema.precision import Stored
from olaschema.reader import FeatureReader
from olaschema.seal import seal
from olaschema.store import FeatureStore

R = 4


class _Silent(LineReporter):
    def __init__(self) -> None:
        import io

        super().__init__(io.StringIO())


def _fill(store: FeatureStore, teacher: str, precision: Precision = "float16", **changes: object) -> None:
    told = record(precision, teacher=teacher, **changes)
    store.put_teacher(told)
    rng = np.random.default_rng(len(teacher))
    for shard in range(store.shard_count()):
        n = len(store.shard_samples(shard))
        features = rng.normal(size=(n, *told.fingerprint.shape)).astype(np.float32)
        fill_shard(store, told, shard, features, failed=(1,) if shard == 1 else ())


@pytest.fixture(scope="module")
def intact_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three teachers (float16, int8, int4), two generations, one failed row, absent rows; sealed as `extract` does."""
    root = tmp_path_factory.mktemp("v") / "s"
    store = FeatureStore.create(root, rows_per_shard=R)
    store.add_generation(images(6))
    store.add_generation(images(3, start=6))
    _fill(store, "depth", grid=(2, 2), channels=3)
    _fill(store, "gen", "int4", grid=None, channels=7)
    _fill(store, "seg", "int8", grid=(1, 2), channels=65)
    seal(store, store.teachers())
    return root


@pytest.fixture
def root(intact_store: Path, tmp_path: Path) -> Path:
    return shutil.copytree(intact_store, tmp_path / "s")


def _check(root: Path) -> Findings:
    return verify(str(root), _Silent())


def _files(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.is_file() and p.relative_to(root).parts[0] != "_log")


def test_an_intact_store_has_no_problem_and_all_of_it_is_looked_at(root: Path) -> None:
    found = _check(root)
    assert found.problems == []
    assert found.notes == []
    assert (found.shards, found.rows) == (9, 9 * R)
    result = olapipe("verify", root)
    assert result.exit_code == 0
    assert "problems: 0" in result.stdout
    assert json.loads(olapipe("verify", root, "--json").stdout)["problems"] == []


def _uses(root: Path) -> None:
    """Read all that training reads: the plan, the records, the receipts and every feature."""
    store = FeatureStore.open(root)
    rows = {sample.row for sample in store.samples()}
    assert len(rows) == 9
    for name in ("depth", "gen", "seg"):
        reader = FeatureReader(store, name)
        for row in rows:
            status = reader.status(row)
            assert status is not None
            if status.status == "ok":
                reader.read(row)


def _training_reads(name: str) -> bool:
    """All but the manifest and the arrays' documents, which only other programs read."""
    return name != "manifest.json" and (name.count("/") != 2 or not name.endswith("zarr.json"))


def test_progress_counts_images_and_no_empty_rows(root: Path) -> None:
    shown = _Silent()
    told: list[Mapping[str, int]] = []
    shown.begin = lambda totals, done: told.append(totals)  # type: ignore[method-assign]
    shown.update = lambda done, failed=None: told.append(done)  # type: ignore[method-assign]
    verify(str(root), shown, teachers=["depth"])
    # 6 images in shards of 4, then 3 more
    assert told == [{"depth": 9}, {"depth": 0}, {"depth": 4}, {"depth": 6}, {"depth": 9}]


def test_500_flipped_bits_anywhere_are_found_in_the_file_they_are_in(root: Path) -> None:
    files = _files(root)
    rng = random.Random(20)
    undetected = []
    # every kind of file gets its share, and positions are drawn from the whole of each
    flips = [(file, rng.randrange(file.stat().st_size), rng.randrange(8)) for _ in range(16) for file in files]
    assert len(flips) >= 500
    for file, offset, bit in flips:
        original = file.read_bytes()
        damaged = bytearray(original)
        damaged[offset] ^= 1 << bit
        file.write_bytes(damaged)
        name = str(file.relative_to(root))
        if name not in {problem.file for problem in _check(root).problems}:
            undetected.append((name, offset, bit, "verify"))
        if _training_reads(name):
            try:
                _uses(root)
                undetected.append((name, offset, bit, "training"))
            except OlaError:
                pass
        file.write_bytes(original)
    assert undetected == []
    assert _check(root).problems == []


def test_each_file_cut_short_or_missing_is_found(root: Path) -> None:
    for file in _files(root):
        original = file.read_bytes()
        name = str(file.relative_to(root))
        for length in (0, len(original) - 1):
            file.write_bytes(original[:length])
            assert name in {problem.file for problem in _check(root).problems}, (name, length)
            if _training_reads(name):
                with pytest.raises(OlaError):
                    _uses(root)
        file.unlink()
        if name == "zarr.json":
            with pytest.raises(OlaError, match=r"zarr\.json is missing"):
                _check(root)
        elif name == "manifest.json":
            assert "no run has finished" in _check(root).notes[0]
        else:
            assert name in {problem.file for problem in _check(root).problems}, name
        file.write_bytes(original)


def test_the_command_names_shard_and_row_and_exits_1(root: Path) -> None:
    # one row per chunk, so that the damage is in one row alone
    shutil.rmtree(root)
    store = FeatureStore.create(root, rows_per_shard=R)
    store.add_generation(images(6))
    _fill(store, "depth", grid=(24, 24), channels=1024)
    path = root / "depth/values/c/1/0/0/0"
    data = bytearray(path.read_bytes())
    data[10] ^= 4
    path.write_bytes(data)
    result = olapipe("verify", root)
    assert result.exit_code == 1
    assert "depth/values/c/1/0/0/0 [depth shard 1]" in result.stdout
    assert "damaged: row 4" in result.stdout
    problem = json.loads(olapipe("verify", root, "--json").stdout)["problems"][0]
    assert (problem["teacher"], problem["shard"], problem["rows"]) == ("depth", 1, [4])


def _receipt(root: Path, number: int, /, **changes: object) -> None:
    """Change a receipt and give it a right digest: what a defect of the writer would leave."""
    store = FeatureStore.open(root)
    receipt = store.receipt("depth", number)
    assert receipt is not None
    (root / f"receipts/depth/{number:05d}.json").write_bytes(sealed(receipt.model_copy(update=changes)))


def _rows(root: Path, shard: int) -> list[RowReceipt]:
    receipt = FeatureStore.open(root).receipt("depth", shard)
    assert receipt is not None
    return list(receipt.rows)


def _statistics(root: Path, shard: int) -> dict[str, object]:
    receipt = FeatureStore.open(root).receipt("depth", shard)
    assert receipt is not None
    statistics = ChannelStatistics.from_json(receipt.statistics, 3)
    statistics.mean = statistics.mean + 0.01
    return statistics.to_json()


OK = RowReceipt(status="ok", sha256="0" * 64, width=1, height=1)
ABSENT = RowReceipt(status="absent")
LIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "another teacher": (lambda r: _receipt(r, 0, teacher="gen"), "it is the receipt of gen shard 0"),
    "another shard": (lambda r: _receipt(r, 0, shard=1), "it is the receipt of depth shard 1"),
    "another fingerprint": (lambda r: _receipt(r, 0, fingerprint="f" * 64), "is not that of the teacher"),
    "too few rows": (lambda r: _receipt(r, 0, rows=tuple(_rows(r, 0)[:-1])), "it has 3 rows, a shard has 4"),
    "a planned row is absent": (lambda r: _receipt(r, 0, rows=(ABSENT, *_rows(r, 0)[1:])), "the first 4 rows"),
    "an absent row is ok": (lambda r: _receipt(r, 2, rows=(*_rows(r, 2)[:3], OK)), "the first 3 rows"),
    "a failed row is ok": (
        lambda r: _receipt(r, 1, rows=(_rows(r, 1)[0], OK, *_rows(r, 1)[2:])),
        "rows with a feature hold NaN or infinity: row 5",
    ),
    "an ok row is failed": (
        lambda r: _receipt(r, 0, rows=(_rows(r, 0)[0], RowReceipt(status="failed", reason="x"), *_rows(r, 0)[2:])),
        "rows without a feature hold one: row 1",
    ),
    "no files": (lambda r: _receipt(r, 0, files={}), "it names []"),
    "statistics of others": (lambda r: _receipt(r, 0, statistics=_statistics(r, 0)), "mean of channel"),
    "statistics of nothing": (lambda r: _receipt(r, 0, statistics={"count": 0}), "they count 0 tokens, there are 16"),
    "a revision too many": (lambda r: _receipt(r, 0, revision=1), "revision 1 is not the number"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_receipt_with_a_right_digest_that_says_something_wrong(root: Path, lie: str) -> None:
    tell, expected = LIES[lie]
    tell(root)
    found = [p.text for p in _check(root).problems]
    assert any(expected in text for text in found), found


def test_a_receipt_put_back_from_an_older_copy_is_named(root: Path) -> None:
    _receipt(root, 0, execution=EXECUTION.model_copy(update={"threads": 7}))
    assert [(p.file, p.text) for p in _check(root).problems] == [
        ("receipts/depth/00000.json", "it is not the receipt that the manifest lists")
    ]


def test_values_that_are_not_finite_though_every_digest_is_right(root: Path) -> None:
    store = FeatureStore.open(root)
    told = store.teacher("depth")
    values = np.ones((R, 2, 2, 3), np.float16)
    values[2, 1, 1, 1] = np.inf
    statistics = ChannelStatistics(3)
    store.commit_shard(told, 0, Stored(values), [OK] * R, statistics, EXECUTION, replace=True)
    texts = [p.text for p in _check(root).problems if p.file.startswith("depth/values")]
    assert texts == ["rows with a feature hold NaN or infinity: row 2"]


def test_files_that_nobody_names(root: Path) -> None:
    stray = ["readme.txt", "depth/values/c/3/0/0/0", "depth/values/c/0/0/0/1", "samples/0000-00009.parquet"]
    stray += ["receipts/depth/00004.json", "receipts/other/00000.json", "depth/extra/c/0/0/0/0", "depth/.hidden"]
    for name in stray:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"{}")
    (root / "link").symlink_to(root.parent)
    found = {p.file for p in _check(root).problems}
    assert found == {*stray, "link", "depth/values/c/4/0/0/0"}, "and what the stray receipt would promise"


def test_an_unfinished_store_is_not_damaged(root: Path) -> None:
    (root / "manifest.json").unlink()
    (root / "receipts/depth/00001.json").unlink()
    (root / "receipts/gen/00002.json").unlink()
    (root / "gen/values/c/2/0").unlink()
    (root / "gen/scale/c/2/0").unlink()
    (root / "samples/0002-00000.parquet").write_bytes(b"of a plan that was killed")
    found = _check(root)
    assert found.problems == []
    notes = "\n".join(found.notes)
    assert "depth: 1 of 3 shards are not extracted yet" in notes
    assert "1 files of uncommitted shards" in notes
    assert "belongs to a plan that was interrupted" in notes
    assert olapipe("verify", root).exit_code == 0


def test_only_one_teacher_can_be_checked(root: Path) -> None:
    (root / "gen/values/c/0/0").write_bytes(b"")
    assert verify(str(root), _Silent(), teachers=["depth"]).problems == []
    assert olapipe("verify", root, "--teacher", "gen").exit_code == 1
    result = olapipe("verify", root, "--teacher", "other")
    assert result.exit_code == 1
    assert "It holds: depth, gen, seg" in result.stderr


def test_verify_writes_nothing(root: Path) -> None:
    before = digests(root)
    olapipe("verify", root)
    assert digests(root) == before


def test_the_digest_of_a_document_is_what_the_format_says(root: Path) -> None:
    import hashlib

    for file in _files(root):
        if file.suffix != ".json":
            continue
        data = file.read_bytes()
        document = json.loads(data)
        digest = document["attributes"]["ola"]["digest"] if file.name == "zarr.json" else document["digest"]
        assert hashlib.sha256(data.replace(digest.encode(), b"0" * 64)).hexdigest() == digest, file
        assert intact(data, digest)
        assert not intact(data + b"\n", digest)
        assert not intact(data, digest.upper())


def test_a_document_whose_content_holds_text_like_a_digest(root: Path) -> None:
    rows = (RowReceipt(status="failed", reason="x", detail='"digest": "' + "0" * 64 + '"'), *_rows(root, 0)[1:])
    _receipt(root, 0, rows=rows)
    read = FeatureStore.open(root).receipt("depth", 0)
    assert isinstance(read, Receipt) and read.rows == rows
