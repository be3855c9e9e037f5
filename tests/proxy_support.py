"""A proxy in front of an HTTP server (an object store, say) that adds latency and breaks what it is told to break."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Request:
    """What the client asks for. `path` begins with the bucket and has no query."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request.

    `refuse`: the connection is closed, the server never hears of the request. `half-upload`: the server gets half of
    the body, then both connections break. `lose-reply`: the server acts, its reply is lost. `truncate`: half of the
    reply's body arrives. `status`: a reply with this `status`. `stall`: nothing for `seconds`, then the connection
    is closed.
    """

    kind: Literal["refuse", "half-upload", "lose-reply", "truncate", "status", "stall"]
    status: int = 503
    seconds: float = 0.0


class Proxy:
    """A running proxy: `url` to connect to, `latency` seconds before each reply, `fault` decides what breaks.

    `requests` counts by method. Use as a context manager.
    """

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self.upstream = (parts.hostname or "127.0.0.1", parts.port or 80)
        self.latency = 0.0
        self.fault: Callable[[Request], Fault | None] = lambda request: None
        self.requests: Counter[str] = Counter()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def first(count: int, fault: Fault, when: Callable[[Request], bool] = lambda request: True) -> Any:
    """Break the first `count` requests that `when` says yes to."""
    left = [count]
    guard = threading.Lock()

    def decide(request: Request) -> Fault | None:
        with guard:
            if left[0] > 0 and when(request):
                left[0] -= 1
                return fault
            return None

    return decide


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except OSError:  # the client hung up
                self.close_connection = True

        def _pass(self) -> None:
            body = self._body()
            path, _, query = self.path.partition("?")
            proxy.requests[self.command] += 1
            fault = proxy.fault(Request(self.command, path, query, dict(self.headers.items()), body))
            time.sleep(proxy.latency)
            if fault is not None and fault.kind in ("refuse", "stall"):
                time.sleep(fault.seconds)
                return self._cut()
            if fault is not None and fault.kind == "half-upload":
                self._half_upload(body)
                return self._cut()
            if fault is not None and fault.kind == "status":
                return self._reply(fault.status, [], b"")
            status, headers, data = self._forward(body)
            if fault is not None and fault.kind == "lose-reply":
                return self._cut()
            return self._reply(status, headers, data, cut=fault is not None)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            data = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data

        def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            connection = http.client.HTTPConnection(*proxy.upstream, timeout=60)
            try:
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self._headers(body):
                    connection.putheader(name, value)
                connection.endheaders(body)
                response = connection.getresponse()
                return response.status, response.getheaders(), response.read()
            finally:
                connection.close()

        def _headers(self, body: bytes) -> list[tuple[str, str]]:
            dropped = ("content-length", "transfer-encoding", "connection")
            kept = [(name, value) for name, value in self.headers.items() if name.lower() not in dropped]
            return [*kept, ("Content-Length", str(len(body))), ("Connection", "close")]

        def _half_upload(self, body: bytes) -> None:
            with socket.create_connection(proxy.upstream, timeout=10) as upstream:
                lines = [f"{self.command} {self.path} HTTP/1.1"]
                lines += [f"{name}: {value}" for name, value in self._headers(body)]
                upstream.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body[: len(body) // 2])

        def _reply(self, status: int, headers: list[tuple[str, str]], data: bytes, *, cut: bool = False) -> None:
            self.send_response_only(status)
            dropped = ("transfer-encoding", "connection")
            for name, value in headers:
                if name.lower() not in dropped and (name.lower() != "content-length" or self.command == "HEAD"):
                    self.send_header(name, value)
            if self.command != "HEAD":
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[: len(data) // 2] if cut else data)
            if cut:
                self._cut()

        def _cut(self) -> None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    return Handler
