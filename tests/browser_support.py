"""A headless Chromium driven through chromedriver by the WebDriver protocol: JSON over HTTP, no further library."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class Browser:
    """One window."""

    def __init__(self, address: str, session: str) -> None:
        self._base = f"{address}/session/{session}"

    def open(self, page: Path) -> None:
        _call(f"{self._base}/url", {"url": page.as_uri()})

    def run(self, script: str, *arguments: object) -> Any:
        return _call(f"{self._base}/execute/sync", {"script": script, "args": list(arguments)})

    def type(self, selector: str, words: str) -> None:
        element = _call(f"{self._base}/element", {"using": "css selector", "value": selector})
        _call(f"{self._base}/element/{next(iter(element.values()))}/value", {"text": words})

    def console(self) -> list[str]:
        """What the page has written to its console, network errors and violations of its policy included."""
        return [entry["message"] for entry in _call(f"{self._base}/se/log", {"type": "browser"})]

    def screenshot(self, out: Path) -> None:
        out.write_bytes(base64.b64decode(_call(f"{self._base}/screenshot")))


def _call(url: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)  # noqa: S310
    with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
        return json.load(response)["value"]


@contextmanager
def chromium(profile: Path, *, height: int = 900, dark: bool = False) -> Iterator[Browser]:
    """Start a browser with a profile of its own; the test is skipped where there is none."""
    driver, program = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    if driver is None or program is None:
        pytest.skip("no Chromium with chromedriver is installed: tests/install_browser.sh installs them on Debian")
    with subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = next(m[1] for line in process.stdout if (m := re.search(r"successfully on port (\d+)", line)))
            arguments = [
                "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                f"--user-data-dir={profile}", f"--window-size=1280,{height}",
            ]  # fmt: skip
            if dark:
                arguments.append("--force-dark-mode")
            options = {"binary": program, "args": arguments}
            wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            address = f"http://127.0.0.1:{port}"
            made = _call(f"{address}/session", {"capabilities": {"alwaysMatch": wanted}})
            try:
                yield Browser(address, made["sessionId"])
            finally:
                _call(f"{address}/session/{made['sessionId']}", method="DELETE")
        finally:
            process.terminate()
