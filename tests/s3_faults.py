"""A proxy before an S3 store that fails one request in ten, as stores and networks do; and buckets
to try it on.

The faults: an internal error, a request to slow down, a connection reset before the request arrives
or after it was carried out (its reply is lost), a body cut short, a stall. Which request gets which
is drawn from a seed.
"""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
import urllib.parse
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("500", "503", "reset", "lost reply", "cut", "stall")


def new_bucket(endpoint: str) -> str:
    """The name of a new, empty bucket."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    address = urllib.parse.urlsplit(endpoint)
    connection = http.client.HTTPConnection(address.hostname or "", address.port)
    connection.request("PUT", f"/{name}")
    assert connection.getresponse().status == 200
    connection.close()
    return name


class Proxy(ThreadingHTTPServer):
    """Passes requests on to the store, but for one in `one_in`. `faults` counts what it did
    instead.
    """

    daemon_threads = True

    def __init__(
        self,
        store: str,
        seed: int,
        one_in: int = 10,
        stall_s: float = 2.0,
        conditional: bool = True,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.store = urllib.parse.urlsplit(store).netloc
        self.one_in, self.stall_s, self.conditional = one_in, stall_s, conditional
        self.faults: Counter[str] = Counter()
        self.requests = 0
        self._random, self._lock = random.Random(seed), threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def draw(self) -> str:
        with self._lock:
            self.requests += 1
            fault = self._random.choice(FAULTS) if self._random.random() < 1 / self.one_in else ""
            self.faults[fault] += bool(fault)
            return fault

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news here."""


@contextmanager
def proxy(
    store: str, seed: int = 0, one_in: int = 10, stall_s: float = 2.0, *, conditional: bool = True
) -> Iterator[Proxy]:
    """Without `conditional`, the proxy makes the store one that has no conditional writes."""
    server = Proxy(store, seed, one_in, stall_s, conditional)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def handle_any(self) -> None:
        fault = self.server.draw()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault == "stall":
            time.sleep(self.server.stall_s)
        if fault in ("500", "503"):
            self._answer_error(int(fault))
        elif fault == "reset":
            self._reset()
        else:
            self._pass_on(body, fault)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_any

    def _pass_on(self, body: bytes, fault: str) -> None:
        connection = http.client.HTTPConnection(self.server.store, timeout=60)
        headers = dict(self.headers.items())
        if not self.server.conditional:
            headers = {
                name: value for name, value in headers.items() if name.lower() != "if-none-match"
            }
        connection.request(self.command, self.path, body or None, headers)
        reply = connection.getresponse()
        data = reply.read()
        connection.close()
        if fault == "lost reply":
            self._reset()
            return
        self.send_response(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in (
                "transfer-encoding",
                "connection",
                "content-length",
                "server",
                "date",
            ):
                self.send_header(name, value)
        length = reply.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self._reset()
        else:
            self.wfile.write(data)

    def _answer_error(self, status: int) -> None:
        code = {500: "InternalError", 503: "SlowDown"}[status]
        data = f"<Error><Code>{code}</Code><Message>please wait</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _reset(self) -> None:
        """Closes the connection with RST."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, format: str, *arguments: object) -> None:
        pass
