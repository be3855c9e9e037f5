"""`verify --repair` and `--live` on a store that the command `extract` made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from pipeline_support import DEPTH, depth_arguments, digests, olapipe, ray_session, write_images

from olaschema.manifest import ChannelStatistics
from olaschema.precision import Stored
from olaschema.store import FeatureStore
from olaschema.zarrbytes import teacher_document

pytestmark = pytest.mark.usefixtures("ray_session")
__all__ = ["ray_session"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_images(folder, *(f"{index}.png" for index in range(7)), size=(60, 45))
    (folder / "3.png").write_bytes(b"not an image")
    return folder


@pytest.fixture(scope="module")
def extracted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a batch size and a number of threads that are not the defaults."""
    out = tmp_path_factory.mktemp("one") / "s"
    result = olapipe(*depth_arguments(corpus, out, "--shard-size", 3, "--batch-size", 2, "--workers", 1))
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def store(extracted: Path, tmp_path: Path) -> Path:
    return shutil.copytree(extracted, tmp_path / "s")


def _verify(store: Path, corpus: Path, *more: object) -> tuple[int, str]:
    given = ["verify", store, "--images", corpus, "--checkpoint", f"depth={DEPTH}", "--device", "cpu"]
    workers = ("--workers", 1) if "--repair" in more else ()
    result = olapipe(*given, *more, *workers)
    return result.exit_code, result.output


def test_a_finished_run_leaves_a_store_that_verifies(store: Path) -> None:
    result = olapipe("verify", store, "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["problems"] == report["notes"] == []
    assert report["checked"]["shards"] == 3


@pytest.mark.parametrize("damage", ["one bit", "every shard", "array document", "manifest"])
def test_repair_brings_back_the_very_bytes(store: Path, corpus: Path, damage: str) -> None:
    before = digests(store)
    shards = [store / f"depth/values/c/{shard}/0/0/0" for shard in range(3)]
    receipts = [store / f"receipts/depth/{shard:05d}.json" for shard in range(3)]
    if damage == "one bit":
        data = bytearray(shards[1].read_bytes())
        data[len(data) // 2] ^= 16
        shards[1].write_bytes(data)
    elif damage == "every shard":
        receipts[0].write_text(receipts[0].read_text().replace("ok", "OK", 1))
        shards[0].write_bytes(b"x")
        receipts[1].unlink()
        shards[2].unlink()  # its receipt says how features were computed
    elif damage == "array document":
        (store / "depth/values/zarr.json").write_text("{")
    else:
        (store / "manifest.json").write_bytes(b"")
    assert olapipe("verify", store).exit_code == 1
    code, output = _verify(store, corpus, "--repair")
    assert code == 0, output
    assert digests(store) == before
    assert olapipe("verify", store).exit_code == 0


def test_what_cannot_be_made_again_is_said_and_left_alone(store: Path, corpus: Path) -> None:
    (store / "samples/0000-00000.parquet").write_bytes(b"")
    (store / "depth/values/c/1/0/0/0").write_bytes(b"x")
    before = digests(store)
    code, output = _verify(store, corpus, "--repair")
    assert code == 1
    assert "samples/0000-00000.parquet: this cannot be made again" in output
    assert digests(store) == before


def test_repair_says_what_it_needs(store: Path) -> None:
    (store / "depth/values/c/1/0/0/0").write_bytes(b"x")
    result = olapipe("verify", store, "--repair")
    assert result.exit_code == 2
    assert "--images" in result.stderr
    assert "--repair --images FOLDER" in olapipe("verify", store).stdout


def test_repair_names_an_image_that_has_changed(store: Path, corpus: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(corpus, tmp_path / "c")
    shutil.copy(folder / "0.png", folder / "4.png")
    (store / "depth/values/c/1/0/0/0").write_bytes(b"x")
    code, output = _verify(store, folder, "--repair")
    assert code == 0, output
    assert "4.png: the image has changed since" in output


def test_repair_names_an_image_whose_feature_it_cannot_bring_back(store: Path, corpus: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(corpus, tmp_path / "c")
    (folder / "4.png").unlink()
    (store / "depth/values/c/1/0/0/0").write_bytes(b"x")
    code, output = _verify(store, folder, "--repair")
    assert code == 1, output
    assert "not brought back: 4.png: no depth feature any more: missing" in output
    assert "has changed since" not in output


def test_repair_of_a_damaged_receipt_says_what_may_have_been_lost(store: Path, corpus: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(corpus, tmp_path / "c")
    (folder / "4.png").unlink()
    receipt = store / "receipts/depth/00001.json"
    receipt.write_text(receipt.read_text().replace("ok", "OK", 1))
    code, output = _verify(store, folder, "--repair")
    assert code == 1, output
    assert "not brought back: 4.png: no depth feature: missing; whether it had one, the lost receipt said" in output


def test_live_agrees_with_the_store_and_reports_the_worst(store: Path, corpus: Path) -> None:
    code, output = _verify(store, corpus, "--live", 4, "--json")
    assert code == 0, output
    live = json.loads(output[output.index("{") :])["live"]
    assert len(live) == 4
    # float16 rounds by 2^-11 of a value at most, so by no more of the whole
    assert all(0 < entry["relative"] <= 2**-11 for entry in live)
    assert all(entry["worst"] <= 1 for entry in live)
    again = _verify(store, corpus, "--live", 4, "--json")[1]
    assert json.loads(again[again.index("{") :])["live"] == live
    other = _verify(store, corpus, "--live", 4, "--seed", 5, "--json")[1]
    assert json.loads(other[other.index("{") :])["live"] != live
    assert "worst / allowed" in _verify(store, corpus, "--live", 2)[1]


def test_live_finds_features_that_are_well_formed_and_wrong(store: Path, corpus: Path) -> None:
    opened = FeatureStore.open(store)
    told = opened.teacher("depth")
    receipt = opened.receipt("depth", 0)
    assert receipt is not None
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, *told.fingerprint.shape)).astype(np.float16)
    statistics = ChannelStatistics(told.fingerprint.channels)
    for row in values:
        statistics.update(row[None].astype(np.float32))
    (store / "manifest.json").unlink()
    opened.commit_shard(told, 0, Stored(values), list(receipt.rows), statistics, receipt.execution, replace=True)
    assert olapipe("verify", store).exit_code == 0, "every digest is right"
    code, output = _verify(store, corpus, "--live", 6)
    assert code == 1
    assert "differs by" in output


def test_live_with_other_images_or_weights(store: Path, corpus: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(corpus, tmp_path / "c")
    for name in range(6):
        shutil.copy(folder / "6.png", folder / f"{name}.png")
    code, output = _verify(store, folder, "--live", 5)
    assert code == 1
    assert "the image is not the one that was extracted" in output
    opened = FeatureStore.open(store)
    told = opened.teacher("depth")
    other = told.fingerprint.model_copy(update={"weights": "0" * 64})
    (store / "depth/zarr.json").write_bytes(teacher_document(told.model_copy(update={"fingerprint": other})))
    code, output = _verify(store, corpus, "--live", 1)
    assert code == 1
    assert "weights" in output
