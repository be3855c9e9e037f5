"""A server on the loopback address that speaks what the Hub's client needs to read a repository.

Replies are those of the Hub's HTTP interface as its documentation and client describe them: commit of a revision, pages
of a tree with a `Link` to the next, files by range, and `X-Error-Code` where something is missing.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants
import pytest

REPOSITORY = "tests/features"
_PAGE = 3
"""Entries on a page of a tree: few, so that there are several pages."""


@dataclass
class Hub:
    """What the server holds: folders by commit, and which commit each revision is."""

    url: str
    commits: dict[str, Path]
    revisions: dict[str, str]
    asked: list[str] = field(default_factory=list)
    """The paths of all requests."""


@contextmanager
def served(folder: Path) -> Iterator[Hub]:
    """Serve a folder as the data set `tests/features`, its branch `main` at the commit `a…a`."""
    hub = Hub("", {"a" * 40: folder}, {"main": "a" * 40})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # headers and body in one packet

        def do_GET(self) -> None:
            hub.asked.append(self.path)
            parts = urlsplit(self.path)
            path = unquote(parts.path)
            for prefix, answer in (
                (f"/api/datasets/{REPOSITORY}/tree/", self._tree),
                (f"/api/datasets/{REPOSITORY}", self._info),
                (f"/datasets/{REPOSITORY}/resolve/", self._file),
            ):
                if path.startswith(prefix):
                    answer(path.removeprefix(prefix), parse_qs(parts.query))
                    return
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})

        def _folder(self, revision: str) -> Path | None:
            commit = hub.revisions.get(revision, revision)
            if commit not in hub.commits:
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                return None
            return hub.commits[commit]

        def _info(self, rest: str, query: dict[str, list[str]]) -> None:
            revision = rest.removeprefix("/revision/") or "main"
            if self._folder(revision) is not None:
                sha = hub.revisions.get(revision, revision)
                self._send(200, json.dumps({"id": REPOSITORY, "sha": sha, "tags": [], "siblings": []}).encode(), {})

        def _tree(self, rest: str, query: dict[str, list[str]]) -> None:
            revision, _, inside = rest.partition("/")
            root = self._folder(revision)
            if root is None:
                return
            if not (root / inside).is_dir():
                self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
                return
            first = int(query.get("cursor", ["0"])[0])
            found = sorted((root / inside).iterdir())
            entries: list[dict[str, object]] = []
            for path in found[first : first + _PAGE]:
                name = path.relative_to(root).as_posix()
                if path.is_dir():
                    entries.append({"type": "directory", "oid": "0", "size": 0, "path": name})
                else:
                    entries.append({"type": "file", "oid": "0", "size": path.stat().st_size, "path": name})
            headers = {}
            if first + _PAGE < len(found):
                headers["Link"] = f'<{hub.url}{urlsplit(self.path).path}?cursor={first + _PAGE}>; rel="next"'
            self._send(200, json.dumps(entries).encode(), headers)

        def _file(self, rest: str, query: dict[str, list[str]]) -> None:
            revision, _, inside = rest.partition("/")
            root = self._folder(revision)
            if root is None:
                return
            if not (root / inside).is_file():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            data = (root / inside).read_bytes()
            wanted = self.headers.get("Range")
            if wanted is None:
                self._send(200, data, {})
                return
            start, end = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            if start >= len(data):
                self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
            last = min(end, len(data) - 1)
            self._send(206, data[start : last + 1], {"Content-Range": f"bytes {start}-{last}/{len(data)}"})

        def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *arguments: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def on_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve a folder, and let this process and those it starts take the server for the Hub."""
    with served(folder) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub
