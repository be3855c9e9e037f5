"""Both halves over a bucket: extract, look, forget, drop, train; two jobs at once; a job that is killed."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from hub_support import REPOSITORY, on_the_hub
from pipeline_support import depth_arguments, digests, olapipe, ray_session, start_olapipe, write_images
from place_support import BUCKET, kill, s3, s3_server
from rich.console import Console
from store_support import make_store as simple_store
from trainer_support import Corpus, make_corpus, make_student, metrics, settings

from olaschema.config import load_config
from olaschema.errors import DamagedStoreError
from olaschema.place import open_place
from olaschema.reader import FeatureReader
from olaschema.seal import seal
from olaschema.store import FeatureStore
from olatrain.config import TrainConfig
from olatrain.train import train

__all__ = ["ray_session", "s3", "s3_server"]


def _address() -> str:
    return f"s3://{BUCKET}/{uuid4().hex}/features.zarr"


def _copied(root: Path) -> str:
    """Put a store that lies in a folder into the bucket, file by file."""
    place = open_place(_address())
    for name in digests(root):
        place.publish(name, (root / name).read_bytes())
    return place.url


def test_a_copy_to_a_bucket_and_back_is_the_same_bytes(tmp_path: Path, s3: str) -> None:
    store, _, _ = simple_store(tmp_path / "a", precision="int8")
    seal(store, store.teachers())
    url = _address()
    result = olapipe("copy", tmp_path / "a", url)
    assert result.exit_code == 0, result.output
    place, wanted = open_place(url), digests(tmp_path / "a")
    assert sorted(place.walk()) == sorted(wanted)
    assert {name: hashlib.sha256(place.read(name)).hexdigest() for name in place.walk()} == wanted
    again = olapipe("copy", tmp_path / "a", url)
    assert again.exit_code == 0 and f"{len(wanted)} of them were there already" in again.stdout
    # stopped before the last objects: there is no store until a second call has put them
    for name in ("zarr.json", "receipts/depth/00001.json"):
        place.remove(name)
    assert olapipe("verify", url).exit_code != 0
    assert olapipe("copy", tmp_path / "a", url).exit_code == 0
    assert olapipe("copy", url, tmp_path / "b").exit_code == 0
    assert digests(tmp_path / "b") == wanted
    # another store is not overwritten
    other, _, _ = simple_store(tmp_path / "other", precision="int8", seed=1)
    seal(other, other.teachers())
    assert olapipe("copy", tmp_path / "other", url).exit_code == 1
    assert {name: hashlib.sha256(place.read(name)).hexdigest() for name in place.walk()} == wanted


@pytest.mark.usefixtures("ray_session")
def test_of_two_jobs_one_waits_and_goes_on_when_the_other_is_killed(tmp_path: Path, s3: str) -> None:
    write_images(tmp_path / "images", *(f"{place}.png" for place in range(9)), size=(60, 45))
    url, more = _address(), ("--shard-size", 1, "--batch-size", 1, "--workers", 1)
    place = open_place(url)
    jobs = [start_olapipe(*depth_arguments(tmp_path / "images", url, *more)) for _ in range(2)]
    try:
        deadline = time.monotonic() + 200
        while not place.names("receipts/depth"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        holder = json.loads(place.read("_log/leases/depth"))["pid"]
        (first,) = [job for job in jobs if job.pid == holder]
        (second,) = [job for job in jobs if job.pid != holder]
        kill(first)
        said = second.communicate(timeout=200)[0]
        assert second.returncode == 0, said
        assert f"process {holder}, which writes the same" in said
    finally:
        for job in jobs:
            kill(job)
            assert job.stdout is not None
            job.stdout.close()
    here = olapipe(*depth_arguments(tmp_path / "images", tmp_path / "s", *more))
    assert here.exit_code == 0, here.output
    expected = digests(tmp_path / "s")
    assert sorted(place.walk()) == sorted(expected)
    for name in expected:
        assert place.read(name) == (tmp_path / "s" / name).read_bytes(), name
    _look_forget_and_drop(url, tmp_path)


def _look_forget_and_drop(url: str, folder: Path) -> None:
    assert olapipe("verify", url).exit_code == 0
    shown = olapipe("inspect", url, "3.png", "--json")
    assert json.loads(shown.stdout)["teachers"]["depth"]["receipt"]["status"] == "ok"
    assert olapipe("preview", url, "3.png", "--out", folder / "preview.png").exit_code == 0
    assert olapipe("forget", url, "3.png", "--yes").exit_code == 0
    store = FeatureStore.open(url)
    row = next(sample.row for sample in store.samples() if sample.problem == "forgotten")
    status = FeatureReader(store, "depth").status(row)
    assert status is not None
    assert status.reason == "forgotten"
    result = olapipe("verify", url)
    assert result.exit_code == 0, result.output
    name = "depth/values/c/1/0/0/0"
    changed = bytearray(store.place.read(name))
    changed[100] ^= 1
    store.place.publish(name, bytes(changed))
    result = olapipe("verify", url)
    assert result.exit_code == 1
    assert f"damaged: {name}" in result.output
    assert olapipe("drop", url, "--teacher", "depth", "--yes").exit_code == 0
    assert FeatureStore.open(url).teachers() == []
    assert not store.place.holds("depth")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_student(tmp_path_factory.mktemp("student") / "s")


@pytest.mark.parametrize("workers", [0, 2])
def test_training_from_a_bucket_is_training_from_a_folder(
    corpus: Corpus, student: Path, tmp_path: Path, s3: str, workers: int
) -> None:
    address = _copied(corpus.store)
    for name, store in (("here", str(corpus.store)), ("there", address)):
        chosen = settings(corpus, student, tmp_path / name, store=store, workers=workers, steps=3)
        train(load_config(TrainConfig, flags=chosen), Console(quiet=True))
    here, there = metrics(tmp_path / "here"), metrics(tmp_path / "there")
    np.testing.assert_array_equal([step["loss"] for step in here], [step["loss"] for step in there])
    asked = [step["requests_per_sample"] for step in there]
    assert all(0 <= figure < 12 for figure in asked)
    assert sum(asked) > 0
    assert "requests_per_sample" not in here[0]


def test_training_from_the_hub_is_training_from_a_folder(
    corpus: Corpus, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(corpus.store, tmp_path / "repository" / "f.zarr")
    address = f"hf://datasets/{REPOSITORY}/f.zarr"
    with on_the_hub(tmp_path / "repository", monkeypatch):
        for name, store in (("here", str(corpus.store)), ("there", address)):
            chosen = settings(corpus, student, tmp_path / name, store=store, workers=1, steps=2)
            train(load_config(TrainConfig, flags=chosen), Console(quiet=True))
    here, there = metrics(tmp_path / "here"), metrics(tmp_path / "there")
    np.testing.assert_array_equal([step["loss"] for step in here], [step["loss"] for step in there])
    assert sum(step["requests_per_sample"] for step in there) > 0


def test_training_finds_a_bit_that_flipped_in_the_bucket(
    corpus: Corpus, student: Path, tmp_path: Path, s3: str
) -> None:
    address = _copied(corpus.store)
    place = open_place(address)
    name = "depth/values/c/0/0/0/0"
    changed = bytearray(place.read(name))
    changed[20] ^= 1
    place.publish(name, bytes(changed))
    with pytest.raises(DamagedStoreError, match=f"{address}/{name}"):
        chosen = settings(corpus, student, tmp_path / "run", store=address)
        train(load_config(TrainConfig, flags=chosen), Console(quiet=True))
