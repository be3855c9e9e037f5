"""Stores on the Hugging Face Hub, to be read: `hf://datasets/OWNER/NAME[@REVISION][/FOLDER]`, or without `datasets/`.

The revision is resolved to its commit when the place is first used, so what is read belongs together even while the
repository is written to, and listings of a commit can be kept. Token and endpoint come from the environment, as for
other tools of the Hub (HF_TOKEN, HF_ENDPOINT); requests that fail for a while are retried by its client.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from olaschema.errors import StoreError
from olaschema.place import Place

_ADDRESS = re.compile(
    r"hf://(?P<kind>datasets/|models/)?(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/]+))?(?P<folder>/.*)?"
)
_PARTIAL, _MISSING, _BEYOND = 206, 404, 416
_OFFLINE, _OURS = "HF_HUB_OFFLINE", "OLA_HUB_OFFLINE_BY_DEFAULT"


def keep_libraries_off() -> None:
    """Keep libraries from asking the Hub on their own; to be called before they are imported.

    Stores at `hf://` are read all the same, here and in processes started from here. What the user has set stands.
    """
    if _OFFLINE not in os.environ:
        os.environ[_OFFLINE] = os.environ[_OURS] = "1"


class HubPlace(Place):
    """A folder of a repository on the Hub. Whatever would write raises StoreError."""

    remote = True

    def __init__(self, url: str) -> None:
        found = _ADDRESS.fullmatch(url)
        if found is None:
            raise StoreError(f"{url} names no repository", "Give hf://datasets/OWNER/NAME[@REVISION][/FOLDER].")
        self.url = url.rstrip("/")
        self.requests = Counter()
        self._kind = "dataset" if found["kind"] == "datasets/" else "model"
        self._repo = found["repo"]
        self._asked = found["revision"]
        self._root = (found["folder"] or "").strip("/")
        self._commit: str | None = None
        self._listings: dict[str, dict[str, int | None]] = {}

    def __reduce__(self) -> tuple[type[HubPlace], tuple[str]]:
        return HubPlace, (self.url,)  # another process opens it for itself

    def present(self) -> bool:
        """Whether the folder holds anything."""
        return bool(self._entries(""))

    def vacant(self) -> bool:
        """Whether a new store can be made here, which it never can."""
        return False

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        return self._sizes(name) is not None

    def holds(self, folder: str) -> bool:
        """Whether the folder is there."""
        return bool(self._entries(folder))

    def size(self, name: str) -> int:
        """Return a file's size in bytes; raises StoreError if it is missing."""
        size = self._sizes(name)
        if size is None:
            raise self._missing(name)
        return size

    def read(self, name: str) -> bytes:
        """Return a file's bytes; raises StoreError naming it if it is missing or cannot be read."""
        data = self.find(name)
        if data is None:
            raise self._missing(name)
        return data

    def find(self, name: str) -> bytes | None:
        """Return a file's bytes, None if it is missing."""
        return self._get(name, {})

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on, fewer where the file ends before; raises as `read` does."""
        if offset < 0 or length < 0:
            raise StoreError(f"{self.locate(name)} cannot be read: {length} bytes at {offset}")
        if length == 0:
            return b""
        data = self._get(name, {"Range": f"bytes={offset}-{offset + length - 1}"}, skipped=offset)
        if data is None:
            raise self._missing(name)
        return data[:length]

    def read_tail(self, name: str, length: int) -> tuple[bytes, int]:
        """Return the last `length` bytes (all of a shorter file) and the size of the file; raises as `read` does."""
        size = self.size(name)
        return self.read_range(name, max(size - length, 0), min(size, length)), size

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of the files directly in `folder`; empty if it does not exist."""
        return sorted(name for name, size in self._entries(folder).items() if size is not None)

    def folders(self, folder: str) -> list[str]:
        """Return the sorted names of the folders directly in `folder` (`""`: the root); empty if it does not exist."""
        return sorted(name for name, size in self._entries(folder).items() if size is None)

    def walk(self) -> Iterator[str]:
        """Yield the names of all files outside `_log/`, in a fixed order."""
        waiting = [""]
        while waiting:
            folder = waiting.pop()
            base = f"{folder}/" if folder else ""
            yield from (base + name for name in self.names(folder))
            waiting.extend(base + name for name in reversed(self.folders(folder)) if base + name != "_log")

    def publish(self, name: str, data: bytes) -> None:
        """Raise StoreError."""
        self._refuse(name)

    def publish_if_absent(self, name: str, data: bytes) -> bool:
        """Raise StoreError."""
        self._refuse(name)

    def swap(self, name: str, old: bytes | None, new: bytes) -> bool:
        """Raise StoreError."""
        self._refuse(name)

    def remove(self, name: str) -> None:
        """Raise StoreError."""
        self._refuse(name)

    def withdraw(self, folder: str) -> None:
        """Raise StoreError."""
        self._refuse(folder)

    def clear_withdrawn(self) -> bool:
        """Say that nothing was withdrawn."""
        return False

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Raise StoreError: locks are for those who write."""
        self._refuse(name)
        yield

    def append_log(self, name: str, line: str) -> None:
        """Raise StoreError."""
        self._refuse(f"_log/{name}")

    def logs(self) -> list[str]:
        """Return the sorted names of the logs that were uploaded."""
        return self.names("_log")

    def read_log(self, name: str) -> bytes:
        """Return all lines of a log, nothing where there is none."""
        return self.find(f"_log/{name}") or b""

    def sweep(self) -> None:
        """Do nothing: nothing unfinished can be left here."""

    # ---- the Hub's client

    def _refuse(self, name: str) -> NoReturn:
        raise StoreError(
            f"{self.locate(name)} was not written: stores on the Hub are read, not changed",
            f"Make a copy that can be changed: olapipe copy {self.url} FOLDER",
        )

    def _missing(self, name: str) -> StoreError:
        return StoreError(f"{self.locate(name)} is missing", "Is this the address of a feature store?")

    def _path(self, name: str) -> str:
        return "/".join(part for part in (self._root, name) if part)

    def _sizes(self, name: str) -> int | None:
        folder, _, last = name.rpartition("/")
        return self._entries(folder).get(last)

    def _entries(self, folder: str) -> dict[str, int | None]:
        """Return what is directly in a folder: a file's size by its name, None for a folder."""
        if folder not in self._listings:
            from huggingface_hub import RepoFile
            from huggingface_hub.errors import EntryNotFoundError

            path = self._path(folder)
            commit = self._revision()
            self.requests["list"] += 1
            with self._explained(folder):
                try:
                    tree = self._api().list_repo_tree(
                        self._repo, path or None, revision=commit, repo_type=self._kind, recursive=False
                    )
                    found = {
                        entry.path.rpartition("/")[2]: entry.size if isinstance(entry, RepoFile) else None
                        for entry in tree
                    }
                except EntryNotFoundError:
                    found = {}
            self._listings[folder] = found
        return self._listings[folder]

    def _get(self, name: str, headers: dict[str, str], *, skipped: int = 0) -> bytes | None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented there, exported without saying so
            build_hf_headers,
            hf_raise_for_status,
            http_backoff,
        )

        url = hf_hub_url(self._repo, self._path(name), repo_type=self._kind, revision=self._revision())
        self.requests["read"] += 1
        with self._explained(name):
            reply = http_backoff("GET", url, headers=build_hf_headers() | headers, follow_redirects=True, timeout=60)
            if reply.status_code == _MISSING:
                return None
            if reply.status_code == _BEYOND:
                return b""
            hf_raise_for_status(reply)
            # a server that knows no ranges sends all of it
            return bytes(reply.content[skipped:] if headers and reply.status_code != _PARTIAL else reply.content)

    def _revision(self) -> str:
        if self._commit is None:
            self.requests["list"] += 1
            with self._explained(""):
                info = self._api().repo_info(self._repo, repo_type=self._kind, revision=self._asked)
            if not info.sha:
                raise StoreError(f"{self.url}: the Hub names no commit of it", "Name a revision: …/NAME@REVISION")
            self._commit = info.sha
        return self._commit

    def _api(self) -> Any:
        try:
            from huggingface_hub import HfApi, constants
        except ImportError as error:
            raise StoreError(
                f"{self.url}: the Hub needs the package huggingface_hub", "Install it: pip install huggingface_hub"
            ) from error
        if _OURS in os.environ:  # nobody else has forbidden it
            constants.HF_HUB_OFFLINE = False
        return HfApi()

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        where = self.locate(name) if name else self.url
        http_error: type[Exception] = HfHubHTTPError.__mro__[1]  # of the HTTP library the client is built on
        try:
            yield
        except OfflineModeIsEnabled as error:
            raise StoreError(f"{where}: HF_HUB_OFFLINE forbids requests to the Hub", "Unset it.") from error
        except (GatedRepoError, RepositoryNotFoundError) as error:
            raise StoreError(
                f"{where}: there is no {self._kind} {self._repo}, or it is private",
                "Check the address (data sets begin with hf://datasets/), and HF_TOKEN for a private or gated one.",
            ) from error
        except RevisionNotFoundError as error:
            raise StoreError(
                f"{where}: {self._repo} has no revision {self._asked}", "Name a branch, a tag or a commit."
            ) from error
        except HFValidationError as error:
            raise StoreError(f"{where} names no repository: {error}", "Give hf://datasets/OWNER/NAME.") from error
        except HfHubHTTPError as error:
            raise StoreError(
                f"{where}: the Hub answered with status {error.response.status_code}",
                "Run the same command again later.",
            ) from error
        except (OSError, http_error) as error:
            raise StoreError(
                f"{where}: the connection to the Hub fails or stalls", "Check the network, then run the command again."
            ) from error
