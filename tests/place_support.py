"""Places for stores that tests run over: a folder, and a bucket of a real S3 server process on the loopback address."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

from olaschema.place import open_place

BUCKET = "features"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "not-a-secret",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """A moto server in a process of its own, with one bucket; its address."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for attempt in range(300):
            try:
                with urlopen(f"{url}/moto-api/", timeout=5):  # noqa: S310
                    break
            except URLError:
                if process.poll() is not None or attempt == 299:
                    raise
                time.sleep(0.1)
        with urlopen(Request(f"{url}/{BUCKET}", method="PUT", data=b""), timeout=5):  # noqa: S310
            pass
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The server's address; it and credentials are in the environment, also of processes that the test starts."""
    for name, value in (ENVIRONMENT | {"AWS_ENDPOINT_URL": s3_server}).items():
        monkeypatch.setenv(name, value)
    return s3_server


def put_raw(url: str, name: str, data: bytes) -> None:
    """Change what lies in a place, behind the store's back."""
    open_place(url).publish(name, data)


def kill(process: subprocess.Popen[str]) -> None:
    """End a process group that a test started."""
    if process.poll() is None:
        os.killpg(process.pid, 9)
    process.wait()
