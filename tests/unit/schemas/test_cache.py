"""The cache of remote files: bounded, shared, and never trusted unseen."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from olaschema.cache import Cache, CacheSettings
from olaschema.errors import ConfigError, DamagedStoreError
from olaschema.manifest import FileReceipt
from olaschema.place import LocalPlace

SIZE = 1000


@pytest.fixture
def place(tmp_path: Path) -> LocalPlace:
    (tmp_path / "origin").mkdir()
    for number in range(8):
        (tmp_path / "origin" / str(number)).write_bytes(content(number))
    return LocalPlace(tmp_path / "origin")


def content(number: int) -> bytes:
    return bytes([number]) * SIZE


def promised(number: int) -> FileReceipt:
    return FileReceipt(bytes=SIZE, sha256=hashlib.sha256(content(number)).hexdigest())


def cache(tmp_path: Path, files: int) -> Cache:
    return Cache(CacheSettings(folder=tmp_path / "cache", limit=files * SIZE))


def read(cached: Cache, place: LocalPlace, number: int, offset: int = 0, length: int = SIZE) -> bytes:
    return cached.read(place, str(number), promised(number), offset, length)


def held(tmp_path: Path) -> set[int]:
    names = {promised(number).sha256: number for number in range(8)}
    return {names[name] for name in os.listdir(tmp_path / "cache/files")}


def test_a_file_is_downloaded_once_and_the_least_recently_used_makes_room(tmp_path: Path, place: LocalPlace) -> None:
    cached = cache(tmp_path, 3)
    for number in (0, 1, 2):
        assert read(cached, place, number, 3, 5) == bytes([number]) * 5
        time.sleep(0.01)
    assert place.requests.total() == 3
    assert read(cached, place, 0, SIZE - 2, 10) == bytes(2), "at its end a file gives what it has"
    assert place.requests.total() == 3
    read(cached, place, 3)
    assert held(tmp_path) == {0, 2, 3}, "file 1 was used before the others"
    assert read(cache(tmp_path, 3), place, 2) == content(2)
    assert place.requests.total() == 4, "another process finds it"


def test_a_cached_file_is_checked_once_before_it_is_trusted(tmp_path: Path, place: LocalPlace) -> None:
    read(cache(tmp_path, 3), place, 0)
    path = tmp_path / "cache/files" / promised(0).sha256
    path.write_bytes(b"\1" + content(0)[1:])
    assert read(cache(tmp_path, 3), place, 0) == content(0)
    assert place.requests.total() == 2
    assert path.read_bytes() == content(0)


def test_what_is_not_the_promised_file_is_refused_and_not_kept(tmp_path: Path, place: LocalPlace) -> None:
    (place.root / "0").write_bytes(content(1))
    with pytest.raises(DamagedStoreError, match=f"{place.root}/0 is damaged"):
        read(cache(tmp_path, 3), place, 0)
    assert held(tmp_path) == set()


def test_a_file_beyond_the_limit_is_refused(tmp_path: Path, place: LocalPlace) -> None:
    cached = Cache(CacheSettings(folder=tmp_path / "cache", limit=SIZE - 1))
    with pytest.raises(ConfigError, match=r"has 1000 bytes.*limited to 999"):
        read(cached, place, 0)


def test_a_download_that_was_killed_takes_no_room(tmp_path: Path, place: LocalPlace) -> None:
    cached = cache(tmp_path, 1)
    for number in (0, 1):
        part = tmp_path / "cache/files" / (promised(number).sha256 + ".part")
        part.write_bytes(b"torn")
        os.truncate(part, SIZE)
    assert read(cached, place, 0) == content(0)
    assert held(tmp_path) == {0}


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"")
    with pytest.raises(ConfigError, match=str(tmp_path / "cache")):
        cache(tmp_path, 3)


def test_many_processes_share_a_cache_smaller_than_what_they_read(tmp_path: Path, place: LocalPlace) -> None:
    """Every byte is right, the limit holds at every moment, and a wanted file is not downloaded twice at once."""
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_reader, args=(tmp_path, place.root, seed)) for seed in range(4)]
    for worker in workers:
        worker.start()
    most = 0
    while any(worker.is_alive() for worker in workers):
        sizes = []
        for entry in os.scandir(tmp_path / "cache/files") if (tmp_path / "cache/files").is_dir() else ():
            try:
                sizes.append(entry.stat().st_size)
            except FileNotFoundError:
                continue
        most = max(most, len(sizes))
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert 0 < most <= 3 + 1, "a listing may see a file that is gone beside the one that took its room"
    assert sum(1 for _ in (tmp_path / "cache/files").iterdir()) <= 3


def _reader(tmp_path: Path, origin: Path, seed: int) -> None:
    cached, place = cache(tmp_path, 3), LocalPlace(origin)
    for turn in range(150):
        number = (turn * (2 * seed + 1) + seed) % 8
        assert read(cached, place, number, 1, 7) == bytes([number]) * 7
    assert place.requests.total() < 150 * 2
