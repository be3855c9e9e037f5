"""Corpora of tar and parquet files through the whole of `olapipe`: the same features as from a folder of the images."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archives_support import write_tar
from pipeline_support import DEPTH, depth_arguments, digests, image_bytes, olapipe, ray_session
from rich.console import Console

from olapipe.config import ExtractConfig
from olapipe.measure import Measured
from olapipe.plan import Assumptions, predict
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore

__all__ = ["ray_session"]

pytestmark = pytest.mark.usefixtures("ray_session")
SIZE = (72, 56)


def _images(count: int) -> dict[str, bytes]:
    return {f"{i:09d}.png": image_bytes(i, SIZE) for i in range(count)}


def _features(store: Path) -> list[np.ndarray]:
    opened = FeatureStore.open(store)
    reader = FeatureReader(opened, "depth")
    return [reader.feature(sample.row) for sample in opened.samples()]


def _run(*arguments: object) -> str:
    result = olapipe(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    root = tmp_path_factory.mktemp("folder")
    (root / "c").mkdir()
    for name, data in _images(5).items():
        (root / "c" / name).write_bytes(data)
    _run(*depth_arguments(root / "c", root / "s", "--shard-size", 4, "--workers", 1))
    return root / "s"


def test_tar_files_give_the_features_of_their_images_and_grow(tmp_path: Path, folder: Path) -> None:
    images = _images(7)
    corpus, store = tmp_path / "c", tmp_path / "s"
    names = list(images)
    write_tar(corpus / "00000.tar", {name: images[name] for name in names[:3]})
    write_tar(corpus / "00001.tar", {name: images[name] for name in names[3:5]})
    arguments = depth_arguments(corpus, store, "--shard-size", 4, "--workers", 1)
    assert "teacher" in _run(*arguments, "--dry-run") and not store.exists()
    _run(*arguments)
    assert [sample.key for sample in FeatureStore.open(store).samples()][3] == "00001.tar/000000003.png"
    for mine, theirs in zip(_features(store), _features(folder), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    before = digests(store)
    write_tar(corpus / "00002.tar", {names[5]: images[names[5]], "bad.png": b"no image"})
    assert "3 images are new" not in _run(*arguments, "--dry-run")
    assert "not-an-image: 1" in _run(*arguments)
    after = digests(store)
    kept = [name for name in before if name.startswith(("receipts", "samples", "depth/values/c"))]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    # what reads single images goes the same way
    checkpoint = ("--checkpoint", f"depth={DEPTH}")
    _run("verify", store, "--live", 3, "--images", corpus, *checkpoint)
    _run("explain", store, "00001.tar/000000003.png", "--images", corpus, "--out", tmp_path / "e.png")
    _run("inspect", store, "00000.tar/000000000.png", "--picture", tmp_path / "p.png", "--images", corpus)
    # a member that was mended, and one that is forgotten
    write_tar(corpus / "00002.tar", {names[5]: images[names[5]], "bad.png": images[names[6]]})
    assert "not-an-image" not in _run(*arguments, "--retry-failed")
    _run("forget", store, "00000.tar/000000001.png", "--yes")
    assert "forgotten: 1" in _run(*arguments)
    shard = store / "depth" / "values" / "c" / "1" / "0" / "0" / "0"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    _run("verify", store, "--repair", "--images", corpus, *checkpoint)
    assert shard.read_bytes() == whole


def test_parquet_and_conversations_over_archives(tmp_path: Path, folder: Path) -> None:
    images = _images(5)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": data, "path": name} for name, data in images.items()]
    (tmp_path / "c").mkdir()
    pq.write_table(pa.table({"image": pa.array(rows, type=kind)}), tmp_path / "c" / "train.parquet", row_group_size=2)
    _run(*depth_arguments(tmp_path / "c", tmp_path / "s", "--shard-size", 4, "--workers", 1))
    for mine, theirs in zip(_features(tmp_path / "s"), _features(folder), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    lines = [{"image": f"train.parquet/{row}"} for row in (3, 1)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _run(*depth_arguments(tmp_path / "c.jsonl", tmp_path / "t", "--images", tmp_path / "c", "--workers", 1))
    for mine, row in zip(_features(tmp_path / "t"), (3, 1), strict=True):
        np.testing.assert_array_equal(mine, _features(folder)[row])


def test_options_that_do_not_exist_are_refused_before_anything_starts(tmp_path: Path) -> None:
    result = olapipe(*depth_arguments(tmp_path / "none", tmp_path / "s", "--set", "options.depth.poolin=x"))
    assert result.exit_code == 2
    assert "no option 'poolin'" in result.output and "Did you mean 'pooling'?" in result.output


def test_plan_tells_time_size_and_whether_it_pays(tmp_path: Path) -> None:
    for name, data in _images(6).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "bad.png").write_bytes(b"no image")
    arguments = ["plan", tmp_path, "--teacher", "depth", "--checkpoint", f"depth={DEPTH}", "--batch-size", 2]
    arguments += ["--seconds", 0.2, "--nodes", 2, "--price-hour", 3, "--price-tb-month", 20, "--workers", 1]
    plan = json.loads(_run(*arguments, "--json"))
    assert plan["images"] == 7
    measured = plan["measured"]
    # 2 nodes: half the time at the same cost
    assert plan["hours"] == pytest.approx(7 * measured["node_seconds"] / 3600 / 2)
    assert plan["extraction_cost"] == pytest.approx(plan["hours"] * 2 * 3)
    assert set(measured["stages"]) >= {"read", "decode", "preprocess", "forward", "compress", "write"}
    assert plan["licences"]["depth"]
    assert 0 < measured["failed"] < measured["images"]
    assert not plan["pays"], "with one use the teachers in the loop do less work"
    config = ExtractConfig(corpus=tmp_path, out=tmp_path / "s", teachers=("depth",))
    many = predict(7, Measured(**measured), Assumptions(epochs=50, runs=20), config, plan["licences"])
    assert many.online_node_hours == pytest.approx(1000 * 7 * measured["node_seconds"] / 3600 * _share(plan))
    text = io.StringIO()
    predict(7, Measured(**measured), Assumptions(), config, {}).show(Console(file=text), as_json=False)
    assert "caching does not pay for 1 epoch(s)" in text.getvalue()


def _share(plan: dict[str, dict[str, dict[str, float]]]) -> float:
    stages = plan["measured"]["stages"]
    return (stages["preprocess"] + stages["forward"]) / sum(stages.values())
