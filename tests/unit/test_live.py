"""`verify --live`: rows that share another one, and values that are not numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pipeline_support import FakeTeacher, image_bytes, olapipe

from olapipe import live
from olapipe.corpus import list_corpus
from olapipe.dedup import dedup
from olapipe.encode import Limits, ShardEncoder, execution
from olapipe.load import teacher_record
from olapipe.progress import make_reporter
from olaschema.store import FeatureStore


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_a_shared_row_is_compared_where_its_feature_is_and_a_nan_is_no_agreement(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "c"
    corpus.mkdir()
    for name, seed in (("a", 0), ("b", 1), ("c", 0)):
        (corpus / f"{name}.png").write_bytes(image_bytes(seed))
    store = FeatureStore.create(tmp_path / "s", rows_per_shard=2)
    store.add_generation(entry.sample() for entry in list_corpus(corpus, None).entries)
    teacher = FakeTeacher()
    record = teacher_record(teacher, precision)
    store.put_teacher(record)
    encoder = ShardEncoder(store, corpus, {"fake": teacher}, {"fake": record}, Limits(2), execution("cpu", 2))
    for shard in (0, 1):
        encoder.encode(shard, ["fake"], lambda name, rows: None)
    assert dedup(store, make_reporter())["fake"].rows == 1
    for row in (0, 1, 2):
        compared = live._compare(store, teacher, row, corpus, 10_000)
        assert compared.agrees and compared.relative < 0.01, compared

    real = live._stored

    def spoilt(*where: object) -> tuple[np.ndarray, np.ndarray]:
        values, _ = real(*where)
        values[0, 0, 0] = np.nan
        return values, np.abs(values) * 2.0**-11 + 2.0**-25

    monkeypatch.setattr(live, "_stored", spoilt)
    assert not live._compare(store, teacher, 0, corpus, 10_000).agrees


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--images", "x"], "--repair and --live"),
        (["--device", "gpu"], "--repair and --live"),
        (["--workers", 2, "--live", 1], "--repair"),
        (["--seed", 4, "--repair"], "--live"),
    ],
)
def test_flags_that_nothing_would_use_are_refused(tmp_path: Path, flags: list[object], wanted: str) -> None:
    result = olapipe("verify", tmp_path, *flags)
    assert result.exit_code == 2
    assert f"{flags[0]}: nothing but {wanted} uses this" in result.stderr
