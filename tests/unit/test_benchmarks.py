"""The benchmark scripts run, and their figures follow from what they measured. Speed itself is not tested."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def loaded(name: str) -> ModuleType:
    """A script of `benchmarks/`, which is no package, as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_of_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module `benchmarks/teachers.py`."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield loaded("teachers")
    sys.modules.pop("published_teachers", None)


def test_teachers_at_reduced_size(script: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    arguments = ["--teacher", "dinov2", "--pairs", "2", "--batch-size", "2", "--conditions", "a test"]
    assert script.main([*arguments, "--dtype", "float32", "--dtype", "bfloat16", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["conditions"]["said"] == "a test"
    assert result["settings"]["size"] == "reduced"
    assert result["versions"]["torch"]
    assert result["hardware"]["cores"] == os.cpu_count()
    assert [row["dtype"] for row in result["teachers"]] == ["float32", "bfloat16"]
    for row in result["teachers"]:
        assert row["output"] == [16, 16, 256]
        alone, batch = row["seconds"]["one_by_one"], row["seconds"]["batch"]
        assert len(alone) == len(batch) == 2
        # seconds are kept to 0.1 ms, which is what the tolerance allows for
        assert row["one_by_one_images_per_second"] == pytest.approx(2 / statistics.median(alone), rel=0.02)
        assert row["batch_images_per_second"] == pytest.approx(2 / statistics.median(batch), rel=0.02)
        ratio = statistics.median(a / b for a, b in zip(alone, batch, strict=True))
        assert row["batch_over_one_by_one"] == pytest.approx(ratio, rel=0.02)


def test_pairs_take_turns_after_a_warm_up(script: ModuleType) -> None:
    calls: list[str] = []
    first, second = script.paired_seconds(lambda: calls.append("a"), lambda: calls.append("b"), 3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert len(first) == len(second) == 3


def test_a_full_size_teacher_of_another_shape_is_refused(script: ModuleType) -> None:
    other = SimpleNamespace(name="depth", fingerprint=SimpleNamespace(grid=(24, 24), channels=768))
    script.check_shape(other, full=False)
    with pytest.raises(SystemExit, match=r"depth gives \(\(24, 24\), 768\), the published one \(\(24, 24\), 1024\)"):
        script.check_shape(other, full=True)


def test_every_teacher_with_a_published_checkpoint_is_timed(script: ModuleType) -> None:
    from olapipe.teachers.catalogue import BUILT_IN

    assert sorted(script.NAMES) == sorted(info.name for info in BUILT_IN if info.published)


def test_every_mutation_has_its_place_in_the_code_and_was_seen_to_fail() -> None:
    """The record is of the mutations that the script makes, and each could be made today."""
    module = loaded("mutations")
    for mutation in module.MUTATIONS:
        text = (BENCHMARKS.parent / "trainer/olatrain" / mutation.file).read_text(encoding="utf-8")
        assert text.count(mutation.before) == 1, mutation.name
        assert mutation.before != mutation.after
        assert (BENCHMARKS.parent / mutation.tests[0]).is_file()
    record = json.loads((BENCHMARKS / "results/mutations.json").read_text(encoding="utf-8"))
    assert [one["mutation"] for one in record["mutations"]] == [one.name for one in module.MUTATIONS]
    assert all(one["failed"] for one in record["mutations"])
    assert record["survived"] == []


@pytest.mark.parametrize("reader", ["memmap", "ours", "zarr", "tensorstore"])
def test_readers_see_the_rows_that_were_written(reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the comparison that are installed beside us; the others have an environment of their own."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    script = loaded("store_read")
    layout = script.Layout(str(tmp_path), rows=4, rows_per_shard=2, batch=2, window=2)
    spent = script.make(layout, 0)
    assert spent["float32_mb"] == pytest.approx(4 * 24 * 24 * 1024 * 4 / 1e6)
    script.WRITERS["raw"](layout)
    found = script.measure(reader, 0, layout, 1, script.sums(layout))
    assert 0 <= found["share_a_shard"] <= 1 and found["rows_per_cpu_s"] > 0
    with pytest.raises(SystemExit, match=f"{reader}: row . is not what was written"):
        script.measure(reader, 0, layout, 1, [0] * 4)
