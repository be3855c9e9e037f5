"""Stores in buckets: `s3://`, `az://` and `gs://`, through obstore.

Every file is one put to its final key, which an object store shows whole or not at all. The connection is opened when
it is first used. obstore runs threads, which a fork does not copy: processes that read buckets are to be spawned.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

from olaschema.errors import StoreError
from olaschema.lease import Lease, hold
from olaschema.place import Place

Result = TypeVar("Result")
SCHEMES = ("s3", "az", "gs")
_TRIES = 5
_CUT_SHORT = "response body"
_NOT_LOGS = {"tmp", "locks", "leases", "withdrawn"}
_WITHDRAWN = "_log/withdrawn"
_used_by: int | None = None
"""The process in which obstore has started its threads."""


class BucketPlace(Place):
    """A prefix of a bucket. Credentials and endpoint come from the environment, as for other tools of that provider."""

    remote = True

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.username or parts.password or parts.query or parts.fragment:
            shown = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
            raise StoreError(
                f"{shown}: the address holds more than bucket and prefix",
                "Give SCHEME://BUCKET/PREFIX, and credentials by environment variables.",
            )
        if not parts.netloc:
            raise StoreError(f"{url} names no bucket", "Give SCHEME://BUCKET/PREFIX.")
        self.url = url.rstrip("/")
        self.requests = Counter()
        self._scheme = parts.scheme
        self._bucket = parts.netloc
        self._opened: Any = None
        self._leases: list[Lease] = []
        self._guard = threading.Lock()

    def __reduce__(self) -> tuple[type[BucketPlace], tuple[str]]:
        return BucketPlace, (self.url,)  # another process opens it for itself

    # ---- reading

    def present(self) -> bool:
        """Whether there is any object under the prefix."""
        return self._any("")

    def vacant(self) -> bool:
        """Whether a new store can be made here."""
        listed = self._listed("")
        return not listed["objects"] and all(_last(path) == "_log" for path in listed["common_prefixes"])

    def exists(self, name: str) -> bool:
        """Whether the object is there."""
        return self._missing_is_none("head", name, lambda store: self._obstore.head(store, name)) is not None

    def holds(self, folder: str) -> bool:
        """Whether there are objects in the folder, and it is not being withdrawn."""
        return not self._is_withdrawn(folder) and self._any(folder)

    def size(self, name: str) -> int:
        """Return an object's size in bytes; raises StoreError if it is missing."""
        found = self._missing_is_none("head", name, lambda store: self._obstore.head(store, name))
        return int(self._there(name, found)["size"])

    def find(self, name: str) -> bytes | None:
        """Return an object's bytes, None if it is missing."""
        found = self._get(name)
        return None if found is None else found[0]

    def read(self, name: str) -> bytes:
        """Return an object's bytes; raises StoreError naming it if it is missing or cannot be read."""
        return self._there(name, self.find(name))

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on, fewer where the object ends before."""
        if offset < 0 or length <= 0 or offset + length > 1 << 62:
            if length == 0:
                return b""
            raise StoreError(f"{self.locate(name)} cannot be read: {length} bytes at {offset}")

        def ranged(store: Any) -> bytes:
            return bytes(self._obstore.get_range(store, name, start=offset, length=length))

        return self._there(name, self._missing_is_none("read", name, ranged))

    def read_tail(self, name: str, length: int) -> tuple[bytes, int]:
        """Return the last `length` bytes (all of a shorter object) and the object's size."""
        if self._scheme == "az":  # which knows no ranges that count from the end
            size = self.size(name)
            return self.read_range(name, max(size - length, 0), min(size, length)), size

        def tail(store: Any) -> tuple[bytes, int]:
            got = self._obstore.get(store, name, options={"range": {"suffix": length}})
            return bytes(got.bytes()), int(got.meta["size"])

        return self._there(name, self._missing_is_none("read", name, tail))

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of the objects directly in `folder`; empty while it is being withdrawn."""
        if self._is_withdrawn(folder):
            return []
        return sorted(_last(found["path"]) for found in self._listed(folder)["objects"])

    def stamps(self, folder: str) -> dict[str, str]:
        """Return the objects directly in `folder`, each with the version that the bucket gives it."""
        if self._is_withdrawn(folder):
            return {}
        found = {_last(one["path"]): str(one["e_tag"] or "") for one in self._listed(folder)["objects"]}
        return dict(sorted(found.items()))

    def folders(self, folder: str) -> list[str]:
        """Return the sorted names of the folders directly in `folder` (`""`: the root)."""
        return sorted(_last(path) for path in self._listed(folder)["common_prefixes"])

    def walk(self) -> Iterator[str]:
        """Yield the names of all objects outside `_log/`, sorted."""
        yield from (name for name in self._all("") if not name.startswith("_log/"))

    # ---- writing

    def publish(self, name: str, data: bytes) -> None:
        """Put `data` at `name` in one request; raises StoreError, then the old object or none is there."""
        self._require_leases(name)
        self._call("write", name, lambda store: self._obstore.put(store, name, data, use_multipart=False))

    def publish_if_absent(self, name: str, data: bytes) -> bool:
        """Put `data` with `If-None-Match: *`; says whether it was put."""
        self._require_leases(name)
        return self._put_if(name, data, "create")

    def swap(self, name: str, old: bytes | None, new: bytes) -> bool:
        """Put `new` if the object holds exactly `old` (None: if there is none), by `If-Match`; says whether."""
        if old is None:
            return self._put_if(name, new, "create")
        found = self._get(name)
        if found is None or found[0] != old:
            return False
        return self._put_if(name, new, {"e_tag": found[1]})

    def _put_if(self, name: str, data: bytes, mode: Any) -> bool:
        # A reply that got lost leaves open whether the object was put, and a second try would find our own: so whoever
        # is refused looks. Such puts are not retried by obstore, and are here.
        def put(store: Any) -> bool:
            try:
                self._obstore.put(store, name, data, mode=mode, use_multipart=False)
            except (self._errors.AlreadyExistsError, self._errors.PreconditionError):
                return self.find(name) == data
            except (self._errors.BaseError, OSError):
                if self.find(name) != data:
                    raise
            return True

        return self._call("write", name, put, again=_passing)

    def remove(self, name: str) -> None:
        """Delete an object; one that is not there is no error."""
        self._require_leases(name)
        self._missing_is_none("delete", name, lambda store: self._obstore.delete(store, name))

    def withdraw(self, folder: str) -> None:
        """Mark the folder as gone in one put, then delete its objects: no rename exists here."""
        if not self._any(folder):
            return
        self.publish(f"{_WITHDRAWN}/{folder.replace('/', '%2F')}", folder.encode())
        self._delete_all(folder)

    def clear_withdrawn(self) -> bool:
        """Delete what was withdrawn, to the end; says whether there was anything."""
        marks = self._all(_WITHDRAWN)
        for mark in marks:
            self._delete_all(self.read(mark).decode())
            self.remove(mark)
        return bool(marks)

    def _delete_all(self, folder: str) -> None:
        # its document goes first: without it the rest is no group
        for name in sorted(self._all(folder), key=lambda name: (name != f"{folder}/zarr.json", name)):
            self.remove(name)

    def _is_withdrawn(self, folder: str) -> bool:
        return folder.startswith("receipts/") and self.exists(f"{_WITHDRAWN}/{folder.replace('/', '%2F')}")

    # ---- locks and logs

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold an exclusive lock on `name`: a lease, since nobody here sees that a process has died."""
        with hold(self, f"_log/locks/{name}") as lease:
            with self._guard:
                self._leases.append(lease)
            try:
                yield
            finally:
                with self._guard:
                    self._leases.remove(lease)

    def _require_leases(self, name: str) -> None:
        """Write nothing under a lock that may have been taken over: this process was stopped, or cut off, for long."""
        if any(lease.lost for lease in self._leases):
            raise StoreError(
                f"{self.locate(name)} was not written: this process was cut off for so long that its lock has expired",
                "Run the same command again: finished shards are kept.",
            )

    def append_log(self, name: str, line: str) -> None:
        """Add one line to a log: an object of its own, because objects cannot grow."""
        key = f"_log/{name}/{time.time_ns():020d}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        data = (line + "\n").encode("utf-8", "backslashreplace")
        self._call("write", key, lambda store: self._obstore.put(store, key, data, use_multipart=False))

    def logs(self) -> list[str]:
        """Return the sorted names of the logs."""
        return [name for name in self.folders("_log") if name not in _NOT_LOGS]

    def read_log(self, name: str) -> bytes:
        """Return all lines of a log in the order of their times."""
        return b"".join(self.read(key) for key in self._all(f"_log/{name}"))

    def sweep(self) -> None:
        """Do nothing: a put that breaks off leaves nothing behind."""

    # ---- obstore

    @property
    def _obstore(self) -> Any:
        try:
            import obstore
        except ImportError as error:
            raise StoreError(
                f"{self.url}: buckets need the package obstore", "Install it: pip install 'ola-distill[buckets]'."
            ) from error
        return obstore

    @property
    def _errors(self) -> Any:
        from obstore import exceptions

        return exceptions

    def _store(self) -> Any:
        global _used_by
        if _used_by not in (None, os.getpid()):
            raise StoreError(
                f"{self.url}: a bucket was used before this process was forked, which its connections do not survive",
                "Start processes that read a bucket by `spawn`.",
            )
        if self._opened is None:
            obstore = self._obstore
            _used_by = os.getpid()
            options = {"client_options": {"timeout": "60s", "connect_timeout": "10s", "allow_http": _plain_http()}}
            backoff = {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=10), "base": 2}
            retry = {"max_retries": 6, "retry_timeout": timedelta(seconds=120), "backoff": backoff}
            try:
                self._opened = obstore.store.from_url(self.url, retry_config=retry, **options)
            except (self._errors.BaseError, ValueError, OSError) as error:
                raise self._explain("", error) from None
        return self._opened

    def _call(
        self, kind: str, name: str, act: Callable[[Any], Result], *, again: Callable[[Exception], bool] | None = None
    ) -> Result:
        """Return what `act` does, tried again after the errors that `again` answers for; the library tries others.

        Without `again` that is an answer that arrived in part, which may be the answer that nothing is there.
        """
        again = again or _cut_short
        store = self._store()
        tries = 0
        while True:
            tries += 1
            self.requests[kind] += 1
            try:
                return act(store)
            except FileNotFoundError as error:
                if _no_bucket(error):
                    raise self._explain(name, error) from None
                raise
            except (self._errors.BaseError, OSError) as error:
                if not again(error) or tries == _TRIES:
                    raise self._explain(name, error) from None
                time.sleep(0.1 * 2**tries)

    def _missing_is_none(self, kind: str, name: str, act: Callable[[Any], Result]) -> Result | None:
        try:
            return self._call(kind, name, act)
        except FileNotFoundError:
            return None

    def _there(self, name: str, found: Result | None) -> Result:
        if found is None:
            raise StoreError(f"{self.locate(name)} is missing", "Is this the address of a feature store?")
        return found

    def _get(self, name: str) -> tuple[bytes, str] | None:
        def get(store: Any) -> tuple[bytes, str]:
            got = self._obstore.get(store, name)
            return bytes(got.bytes()), got.meta["e_tag"]

        return self._missing_is_none("read", name, get)

    def _listed(self, folder: str) -> Any:
        return self._call("list", folder, lambda store: self._obstore.list_with_delimiter(store, folder or None))

    def _all(self, folder: str) -> list[str]:
        def names(store: Any) -> list[str]:
            return sorted(found["path"] for chunk in self._obstore.list(store, folder or None) for found in chunk)

        return self._call("list", folder, names)

    def _any(self, folder: str) -> bool:
        def first(store: Any) -> bool:
            return any(chunk for chunk in self._obstore.list(store, folder or None, chunk_size=1))

        return self._call("list", folder, first)

    def _explain(self, name: str, error: Exception) -> StoreError:
        """Say what is wrong in our words: messages of the library may hold signed addresses."""
        text = str(error)
        where = self.locate(name) if name else self.url
        status = re.search(r"status code: (\d+)", text)
        if _no_bucket(error):
            return StoreError(f"{where}: there is no bucket {self._bucket!r}", "Check the address, and the endpoint.")
        if "169.254.169.254" in text or "metadata" in text.lower() or "MissingAccount" in text:
            return StoreError(f"{where}: no credentials were found", f"Set {_VARIABLES[self._scheme]}.")
        if (status and status[1] in ("401", "403")) or isinstance(error, PermissionError):
            return StoreError(
                f"{where}: access was refused",
                f"Check that {_VARIABLES[self._scheme]} are right and may read and write this bucket.",
            )
        if any(
            words in text for words in ("error sending request", "timed out", "error decoding response", _CUT_SHORT)
        ):
            host = re.search(r"https?://[^/\s)]+", text)
            return StoreError(
                f"{where}: the connection to {host[0] if host else 'the endpoint'} fails or stalls",
                "Check the network and the endpoint, then run the same command again: finished shards are kept.",
            )
        said = f"status {status[1]}" if status else re.sub(r"\?\S*", "", text.splitlines()[0])
        return StoreError(f"{where}: the object store answered: {said}", "Run the same command again later.")


_VARIABLES = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_REGION, AWS_ENDPOINT_URL where needed)",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
}


def _plain_http() -> bool:
    """Whether the endpoint that the user has set is not encrypted, as that of a server on the same machine."""
    names = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
    return any(os.environ.get(name, "").startswith("http://") for name in names)


def _no_bucket(error: Exception) -> bool:
    return any(code in str(error) for code in ("NoSuchBucket", "ContainerNotFound"))


def _passing(error: Exception) -> bool:
    """Whether a second try may do better: a broken connection, or trouble of the server."""
    status = re.search(r"status code: (\d+)", str(error))
    return status is None or status[1] in ("409", "429") or status[1].startswith("5")


def _cut_short(error: Exception) -> bool:
    """Whether only a part of an answer arrived; the library tries objects that are there again, and nothing else."""
    return _CUT_SHORT in str(error)


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
