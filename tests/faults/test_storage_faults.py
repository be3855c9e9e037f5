"""A whole job into a bucket whose storage breaks: it ends in a clean error, or survives; never half a file."""

from __future__ import annotations

import hashlib
import subprocess
import threading
from collections import Counter
from itertools import cycle
from pathlib import Path

import pytest
from pipeline_support import depth_arguments, digests, olapipe, ray_session, start_olapipe, write_images
from place_support import BUCKET, kill, s3, s3_server
from proxy_support import Fault, Proxy, Request

from olaschema.place import open_place
from olaschema.store import FeatureStore

pytestmark = pytest.mark.usefixtures("ray_session")
__all__ = ["ray_session", "s3", "s3_server"]

URL = f"s3://{BUCKET}/storage-faults/features.zarr"
MORE = ("--shard-size", 2, "--batch-size", 2, "--workers", 1)


class EveryFifth:
    """Breaks every fifth request, in another way each time; `done` counts them."""

    def __init__(self) -> None:
        self.done: Counter[str] = Counter()
        self._seen = 0
        self._guard = threading.Lock()
        self._reads = cycle([Fault("truncate"), Fault("status", 500), Fault("refuse"), Fault("stall", seconds=0.5)])
        self._writes = cycle([Fault("half-upload"), Fault("lose-reply"), Fault("status", 503), Fault("refuse")])

    def __call__(self, request: Request) -> Fault | None:
        with self._guard:
            self._seen += 1
            if self._seen % 5:
                return None
            fault = next(self._writes if request.method == "PUT" else self._reads)
            self.done[fault.kind] += 1
            return fault


class Dead:
    """Lets the values of two shards through and then no more, whatever is tried."""

    def __init__(self) -> None:
        self.refused = 0
        self._written: set[str] = set()

    def __call__(self, request: Request) -> Fault | None:
        if request.method != "PUT" or "/depth/values/c/" not in request.path:
            return None
        if request.path in self._written or len(self._written) < 2:
            self._written.add(request.path)
            return None
        self.refused += 1
        return Fault("half-upload")


def _run(corpus: Path) -> subprocess.CompletedProcess[str]:
    process = start_olapipe(*depth_arguments(corpus, URL, *MORE))
    try:
        said = process.communicate(timeout=300)[0]
    finally:
        kill(process)
    return subprocess.CompletedProcess((), process.returncode, said)


def test_storage_that_dies_ends_the_job_cleanly_and_storage_that_falters_is_survived(
    tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "images"
    write_images(corpus, *(f"{place:02d}.png" for place in range(12)), size=(60, 45))
    here = olapipe(*depth_arguments(corpus, tmp_path / "s", *MORE))
    assert here.exit_code == 0, here.output
    expected = digests(tmp_path / "s")
    place = open_place(URL)

    with Proxy(s3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.fault = dead = Dead()
        ended = _run(corpus)
    assert ended.returncode == 1, ended.stdout
    assert "fails or stalls" in ended.stdout, ended.stdout
    assert dead.refused > 6, "the job tried again, and again"
    assert "Traceback" not in ended.stdout
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    half = {name: hashlib.sha256(place.read(name)).hexdigest() for name in place.walk()}
    assert set(half) < set(expected)
    assert half.items() - expected.items() <= {("manifest.json", half.get("manifest.json"))}, "nothing is half there"
    assert FeatureStore.open(URL).committed("depth") == [0, 1]

    with Proxy(s3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.fault = faltering = EveryFifth()
        ended = _run(corpus)
    assert ended.returncode == 0, ended.stdout
    assert set(faltering.done) == {"truncate", "status", "refuse", "stall", "half-upload", "lose-reply"}
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    assert {name: hashlib.sha256(place.read(name)).hexdigest() for name in place.walk()} == expected
