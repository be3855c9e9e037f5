"""A store read from the Hub: the same as the folder that was uploaded, of one commit, and never written to."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from hub_support import REPOSITORY, Hub, on_the_hub
from pipeline_support import olapipe

from olaschema.errors import StoreError
from olaschema.hub import keep_libraries_off
from olaschema.place import LocalPlace, Place, open_place
from olaschema.reader import FeatureReader
from olaschema.store import FeatureStore

STORE = Path(__file__).parents[1] / "fixtures" / "store_v1" / "int8"
ADDRESS = f"hf://datasets/{REPOSITORY}"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    shutil.copytree(STORE, tmp_path / "repository" / "sub" / "features.zarr")
    with on_the_hub(tmp_path / "repository", monkeypatch) as hub:
        yield hub


def _folders(place: Place) -> dict[str, tuple[list[str], list[str]]]:
    found, waiting = {}, [""]
    while waiting:
        folder = waiting.pop()
        found[folder] = place.names(folder), place.folders(folder)
        waiting += [f"{folder}/{name}".strip("/") for name in place.folders(folder)]
    return found


def test_it_reads_what_the_folder_holds(hub: Hub) -> None:
    place, local = open_place(f"{ADDRESS}/sub/features.zarr"), LocalPlace(STORE)
    assert _folders(place) == _folders(local)
    names = list(place.walk())
    assert sorted(names) == sorted(local.walk())
    for name in names:
        data = (STORE / name).read_bytes()
        assert (place.read(name), place.find(name), place.size(name), place.exists(name)) == (
            data,
            data,
            len(data),
            True,
        )
        assert place.read_range(name, 3, 7) == data[3:10]
        assert place.read_range(name, len(data) - 2, 100) == data[-2:]
        assert place.read_range(name, len(data) + 5, 3) == b""
        assert place.read_tail(name, 5) == (data[-5:], len(data))
        assert place.read_tail(name, len(data) + 5) == (data, len(data))
    assert place.present()
    assert not open_place(f"{ADDRESS}/nowhere").present()
    assert (place.find("none"), place.exists("none"), place.holds("none"), place.names("none")) == (
        None,
        False,
        False,
        [],
    )
    for read in (place.read, place.size, lambda name: place.read_range(name, 0, 1)):
        with pytest.raises(StoreError, match=r"sub/features\.zarr/none is missing"):
            read("none")
    # as another process gets it
    assert copy.copy(place).read("zarr.json") == (STORE / "zarr.json").read_bytes()


def test_features_are_those_of_the_folder(hub: Hub) -> None:
    far, near = (FeatureStore.open(where) for where in (f"{ADDRESS}@main/sub/features.zarr", STORE))
    for name in near.teachers():
        one, other = (FeatureReader(store, name) for store in (far, near))
        rows = [row for row in range(near.shard_count() * near.rows_per_shard) if _has_feature(other, row)]
        assert rows
        for row in rows:
            assert np.array_equal(one.feature(row), other.feature(row))


def _has_feature(reader: FeatureReader, row: int) -> bool:
    status = reader.status(row)
    return status is not None and status.status == "ok"


def test_a_place_stays_with_the_commit_that_it_began_with(hub: Hub, tmp_path: Path) -> None:
    place = open_place(f"{ADDRESS}/sub/features.zarr")
    assert place.exists("zarr.json")
    changed = tmp_path / "changed" / "sub" / "features.zarr"
    changed.mkdir(parents=True)
    (changed / "zarr.json").write_text("{}")
    hub.commits["b" * 40] = tmp_path / "changed"
    hub.revisions["main"] = "b" * 40
    assert place.read("zarr.json") == (STORE / "zarr.json").read_bytes()
    assert open_place(place.url).read("zarr.json") == b"{}"
    assert open_place(f"{ADDRESS}@{'a' * 40}/sub/features.zarr").read("zarr.json") == (STORE / "zarr.json").read_bytes()


def test_commands_read_it_and_copy_it_down(hub: Hub, tmp_path: Path) -> None:
    url = f"{ADDRESS}/sub/features.zarr"
    assert olapipe("verify", url).exit_code == 0
    assert olapipe("inspect", url).exit_code == 0
    assert olapipe("copy", url, tmp_path / "copy").exit_code == 0
    assert {name: (tmp_path / "copy" / name).read_bytes() for name in LocalPlace(tmp_path / "copy").walk()} == {
        name: (STORE / name).read_bytes() for name in LocalPlace(STORE).walk()
    }


def test_nothing_is_written(hub: Hub) -> None:
    place = open_place(f"{ADDRESS}/sub/features.zarr")
    tries = (
        lambda: place.publish("x", b""), lambda: place.publish_if_absent("x", b""), lambda: place.swap("x", None, b""),
        lambda: place.remove("zarr.json"), lambda: place.withdraw("depth"), lambda: place.append_log("x", ""),
        lambda: place.lock("x").__enter__(),
    )  # fmt: skip
    for attempt in tries:
        with pytest.raises(StoreError, match="read, not changed") as refused:
            attempt()
        assert f"olapipe copy {place.url} FOLDER" in str(refused.value.remedy)
    result = olapipe("drop", place.url, "--teacher", "depth", "--yes")
    assert result.exit_code != 0
    assert "read, not changed" in result.output


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("hf://datasets/tests/none", "there is no dataset tests/none"),
        (f"{ADDRESS}@v9/sub/features.zarr", "has no revision v9"),
        ("hf://datasets", "names no repository"),
        ("hf://tests", "names no repository"),
    ],
)
def test_what_is_not_there_is_named(hub: Hub, url: str, told: str) -> None:
    with pytest.raises(StoreError, match=told):
        open_place(url).read("zarr.json")


def test_the_trainer_that_keeps_libraries_off_the_hub_reads_stores_there(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # by the user: it stands
    keep_libraries_off()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StoreError, match="HF_HUB_OFFLINE forbids"):
        open_place(ADDRESS).read("zarr.json")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with monkeypatch.context() as patch:
        patch.setenv("OLA_HUB_OFFLINE_BY_DEFAULT", "")  # for the context to take it back
        keep_libraries_off()
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        assert open_place(f"{ADDRESS}/sub/features.zarr").read("zarr.json").startswith(b"{")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")


def test_offline_and_unreachable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StoreError, match="HF_HUB_OFFLINE forbids"):
        open_place(ADDRESS).read("zarr.json")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match="connection to the Hub fails"):
        open_place(ADDRESS).read("zarr.json")
