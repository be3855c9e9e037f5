"""Places for stores that tests run over: a folder, and a bucket of a real S3 server process on the loopback address."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
from free_ports import free_port

BUCKET = "features"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "not-a-secret",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


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


# the account that every azurite has, published in its manual
_AZURE_ACCOUNT = "devstoreaccount1"
_AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@pytest.fixture(scope="session")
def azure_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An azurite process with one container; the address of its account."""
    command = Path(__file__).parent / "azurite" / "node_modules" / ".bin" / "azurite-blob"
    if shutil.which("node") is None or not command.exists():
        pytest.skip("azurite is not installed: npm install --prefix tests/azurite (needs node)")
    port = free_port()
    folder = str(tmp_path_factory.mktemp("azurite"))
    arguments = ["--silent", "--skipApiVersionCheck", "--location", folder, "--blobPort", str(port)]
    process = subprocess.Popen([command, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
    try:
        for attempt in range(300):
            try:
                status = _make_container(port)
                break
            except ConnectionError:
                if process.poll() is not None or attempt == 299:
                    raise
                time.sleep(0.1)
        assert status == 201
        yield f"http://127.0.0.1:{port}/{_AZURE_ACCOUNT}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def az(azure_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The account's address; it and credentials are in the environment."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", _AZURE_ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", _AZURE_KEY)
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", azure_server)
    return azure_server


def _make_container(port: int) -> int:
    """Ask by the protocol itself: obstore makes no containers."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    path = f"/{_AZURE_ACCOUNT}/{BUCKET}"
    lines = ["PUT", *[""] * 11, *(f"{name}:{value}" for name, value in headers.items())]
    text = "\n".join([*lines, f"/{_AZURE_ACCOUNT}{path}", "restype:container"])
    signature = hmac.new(base64.b64decode(_AZURE_KEY), text.encode(), hashlib.sha256).digest()
    headers["Authorization"] = f"SharedKey {_AZURE_ACCOUNT}:{base64.b64encode(signature).decode()}"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("PUT", f"{path}?restype=container", headers=headers | {"Content-Length": "0"})
        return connection.getresponse().status
    finally:
        connection.close()


def kill(process: subprocess.Popen[str]) -> None:
    """End a process group that a test started."""
    if process.poll() is None:
        os.killpg(process.pid, 9)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
