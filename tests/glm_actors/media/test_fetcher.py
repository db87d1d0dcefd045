"""The fetcher against a real server on loopback, and against a resolver that lies."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpcore
import pytest

from glm_batch.glm_actors.media import fetcher
from glm_batch.glm_actors.media.fetcher import FetchAhead, Fetcher, is_global, shown
from glm_batch.glm_actors.media.media_source import MediaRules
from glm_batch.models.errors import ConfigError, RowError

BODY = bytes(range(256)) * 40
PUBLIC = "93.184.215.14"


class Handler(BaseHTTPRequestHandler):
    """Does what the first part of the path names."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers)))
        getattr(self, "do_" + self.path.strip("/").partition("/")[0].partition("?")[0])()

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_file(self) -> None:
        self.answer(200, BODY)

    def do_missing(self) -> None:
        self.answer(404)

    def do_secret(self) -> None:
        self.answer(403)

    def do_zipped(self) -> None:
        self.answer(200, BODY, Content_Encoding="gzip")

    def do_cookie(self) -> None:
        self.answer(302, Location="/file", Set_Cookie="a=b")

    def do_to(self) -> None:
        self.answer(302, Location=self.server.location)

    def do_hops(self) -> None:
        left = int(self.path.rpartition("/")[2])
        self.answer(301, Location=f"/hops/{left - 1}" if left else "/file")

    def do_broken(self) -> None:
        """Fails twice, then answers."""
        number = sum(path == self.path for path, _ in self.server.seen)
        if number == 1:
            self.answer(500)
        elif number == 2:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            self.answer(200, BODY)

    def do_down(self) -> None:
        self.answer(503)

    def do_short(self) -> None:
        self.answer(200, BODY, Content_Length=str(len(BODY) + 1))
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def do_long(self) -> None:
        self.answer(200, BODY + b"more", Content_Length=str(len(BODY)), Connection="close")
        self.close_connection = True

    def do_declared(self) -> None:
        self.answer(200, b"", Content_Length=str(1 << 40))

    def do_slow(self) -> None:
        self.drip(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + bytes(1000), 1)

    def do_slowhead(self) -> None:
        self.drip(b"HTTP/1.1 200 OK\r\nX-Header: " + b"x" * 1000, 1)

    def do_endless(self) -> None:
        self.drip(b"HTTP/1.1 200 OK\r\n\r\n" + bytes(1 << 24), 1 << 16)

    def drip(self, data: bytes, step: int) -> None:
        self.close_connection = True
        for start in range(0, len(data), step):
            try:
                self.connection.sendall(data[start : start + step])
            except OSError:
                return
            if step == 1:
                time.sleep(0.02)

    def log_message(self, *args: Any) -> None:
        """Says nothing."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    location = ""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.rules = MediaRules(
            private_hosts=(f"127.0.0.1:{self.server_port}",), max_bytes=1 << 20, fetch_timeout_s=5.0
        )

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of the tests."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(fetcher, "BACKOFF_S", 0.01)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def make(server: Server) -> Iterator[Callable[..., Fetcher]]:
    """make(**rules): a fetcher for the server."""
    made: list[Fetcher] = []

    def get(**values: Any) -> Fetcher:
        made.append(Fetcher(replace(server.rules, **values)))
        return made[-1]

    yield get
    for one in made:
        one.close()


def error_of(one: Fetcher, url: str) -> RowError:
    with pytest.raises(RowError) as caught:
        one.fetch(url)
    return caught.value


# ---- what arrives ----


def test_a_body_arrives_whole(server: Server, make: Callable[..., Fetcher]) -> None:
    one = make()
    assert one.fetch(server.url("file")) == BODY
    assert one.fetch(server.url("file/über uns?a=%2Fb&c=d e")) == BODY
    assert server.seen[1][0] == "/file/%C3%BCber%20uns?a=%2Fb&c=d%20e"


def test_nothing_of_this_machine_is_told(
    server: Server, make: Callable[..., Fetcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert make().fetch(server.url("cookie")) == BODY
    for _, headers in server.seen:
        assert headers == {
            "Host": f"127.0.0.1:{server.server_port}",
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            "User-Agent": "glm-batch",
        }


def test_a_connection_serves_several_fetches_and_its_name_is_looked_up_once(
    server: Server, make: Callable[..., Fetcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a name that changes its address (DNS rebinding) cannot come between the check and the
    connection.
    """
    asked = []

    def lookup(host: str, port: int, *args: Any, **options: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    one = make(private_hosts=(f"Media.Example.:{server.server_port}",))
    for _ in range(3):
        assert one.fetch(f"http://MEDIA.example:{server.server_port}/file") == BODY
    # The connection itself asks again for what is an address by then.
    assert [host for host in asked if host != "127.0.0.1"] == ["media.example"]


def test_failures_that_may_pass_are_tried_again(
    server: Server, make: Callable[..., Fetcher]
) -> None:
    assert make().fetch(server.url("broken")) == BODY
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    ("path", "code", "says", "requests"),
    [
        ("missing", "media_not_found", "404", 1),
        ("secret", "media_fetch_failed", "403", 1),
        ("down", "media_fetch_failed", "503, 3 times", 3),
        ("short", "media_fetch_failed", "3 times", 3),
        ("zipped", "media_fetch_failed", "compressed", 1),
        ("declared", "media_too_large", "1,048,576", 1),
        ("endless", "media_too_large", "1,048,576", 1),
    ],
)
def test_bad_answers(
    path: str, code: str, says: str, requests: int, server: Server, make: Callable[..., Fetcher]
) -> None:
    error = error_of(make(), server.url(path))
    assert (error.code, says in error.message) == (code, True), error
    assert len(server.seen) == requests


def test_no_more_than_the_declared_length_is_read(
    server: Server, make: Callable[..., Fetcher]
) -> None:
    assert make().fetch(server.url("long")) == BODY


@pytest.mark.parametrize("path", ["slow", "slowhead"])
def test_a_slow_drip_ends_at_the_deadline(
    path: str, server: Server, make: Callable[..., Fetcher]
) -> None:
    begin = time.monotonic()
    error = error_of(make(fetch_timeout_s=0.4), server.url(path))
    assert 0.35 < time.monotonic() - begin < 2
    assert (error.code, "0.4 s" in error.message) == ("media_fetch_failed", True)


def test_nobody_listens(make: Callable[..., Fetcher]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    error = error_of(make(private_hosts=(f"127.0.0.1:{port}",)), f"http://127.0.0.1:{port}/x")
    assert (error.code, "3 times" in error.message) == ("media_fetch_failed", True)


def test_a_look_up_that_hangs_ends_at_the_deadline(
    make: Callable[..., Fetcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: done.wait(20) and [])
    error = error_of(make(hosts=("example.org",), fetch_timeout_s=0.3), "http://example.org/x")
    done.set()
    assert (error.code, "look-up of example.org" in error.message) == ("media_fetch_failed", True)


# ---- what is allowed ----


@pytest.mark.parametrize(
    "url",
    [
        "http://other.example/x",
        "http://127.0.0.1/x",  # another port
        "http://example.org.evil.example/x",
        "http://example.org@evil.example/x",
        "http://evil.example#@example.org/x",
        "http://evil.example\\@example.org/x",
        "http://user:secret@example.org/x",
        "http://example.org:22/x",
        "http://[::1]/x",
        "http:///x",
        "http:example.org/x",
        "gopher://example.org/x",
    ],
)
def test_other_hosts_are_not_even_looked_up(
    url: str, make: Callable[..., Fetcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: pytest.fail("looked up"))
    error = error_of(make(hosts=("example.org",)), url)
    assert error.code == "media_forbidden"
    assert "secret" not in error.message


@pytest.mark.parametrize(
    "url", ["http://[::1/x", "http://example.org:port/x", "http://" + "a" * 70 + ".org/x"]
)
def test_what_is_no_url(url: str, make: Callable[..., Fetcher]) -> None:
    assert error_of(make(hosts=("example.org",)), url).code == "media_fetch_failed"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
        "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1",
        "::1", "::", "fe80::1", "fe80::1%eth0", "fd00::1", "fec0::1", "ff02::1", "2001:db8::1", "64:ff9b:1::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "2002:7f00:1::", "2002:a00:1::", "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe", "2001::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_global(address: str) -> None:
    assert not is_global(address)


@pytest.mark.parametrize(
    "address",
    [
        PUBLIC,
        "8.8.8.8",
        "2606:4700::1111",
        f"::ffff:{PUBLIC}",
        "64:ff9b::808:808",
        "2002:808:808::1",
    ],
)
def test_addresses_that_are_global(address: str) -> None:
    assert is_global(address)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch, server: Server) -> dict[str, Any]:
    """names: what the resolver answers; connected: the addresses that were connected to, all led to
    the server.
    """
    state: dict[str, Any] = {"names": {}, "connected": []}
    connect, look_up = socket.create_connection, socket.getaddrinfo

    def lookup(host: str, port: int, *args: Any, **options: Any) -> list[Any]:
        if host == "127.0.0.1":  # our own connection to the server
            return look_up(host, port, *args, **options)
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in state["names"][host]
        ]

    def connected(address: tuple[str, int], *args: Any, **options: Any) -> socket.socket:
        state["connected"].append(address[0])
        if address[0] in state.get("dead", ()):
            raise ConnectionRefusedError
        return connect(("127.0.0.1", server.server_port), *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(socket, "create_connection", connected)
    return state


@pytest.mark.parametrize(
    "answer", [["10.0.0.1"], [PUBLIC, "127.0.0.1"], ["::1", PUBLIC], ["::ffff:169.254.169.254"]]
)
def test_one_address_that_is_not_global_is_enough(
    answer: list[str], network: dict[str, Any], make: Callable[..., Fetcher]
) -> None:
    network["names"]["example.org"] = answer
    error = error_of(make(hosts=("example.org",)), "http://example.org/file")
    assert (error.code, "private_hosts" in error.message) == ("media_forbidden", True)
    assert network["connected"] == []


def test_refused_connections_and_bodies_leave_room_for_others(
    network: dict[str, Any], make: Callable[..., Fetcher]
) -> None:
    network["names"] = {"inner.example": ["10.0.0.1"], "example.org": [PUBLIC]}
    one = make(hosts=("inner.example", "example.org"), fetch_timeout_s=2.0)
    for _ in range(fetcher.NUM_THREADS + 1):
        assert error_of(one, "http://inner.example/file").code == "media_forbidden"
        assert error_of(one, "http://example.org/declared").code == "media_too_large"
    assert one.fetch("http://example.org/file") == BODY


def test_the_address_checked_is_the_one_connected_to(
    network: dict[str, Any], make: Callable[..., Fetcher]
) -> None:
    network["names"]["example.org"] = [PUBLIC]
    assert make(hosts=("example.org",)).fetch("http://EXAMPLE.org./file") == BODY
    assert network["connected"] == [PUBLIC]


def test_the_next_address_is_taken_where_one_is_dead(
    network: dict[str, Any], make: Callable[..., Fetcher]
) -> None:
    network["names"]["example.org"] = ["8.8.8.8", PUBLIC]
    network["dead"] = ["8.8.8.8"]
    assert make(hosts=("example.org",)).fetch("http://example.org/file") == BODY
    assert network["connected"] == ["8.8.8.8", PUBLIC]


def test_names_beyond_ascii_are_compared_as_dns_has_them(
    network: dict[str, Any], make: Callable[..., Fetcher], server: Server
) -> None:
    network["names"]["xn--bcher-kva.example"] = [PUBLIC]
    assert make(hosts=("Bücher.example",)).fetch("http://bücher.example/file") == BODY
    assert server.seen[0][1]["Host"] == "xn--bcher-kva.example"


@pytest.mark.parametrize(
    "host", ["https://example.org", "*.example.org", "", "a b@c", "example.org/x", "x:port", "a..b"]
)
def test_what_is_no_host_is_refused_before_anything_starts(host: str) -> None:
    with pytest.raises(ConfigError, match="no host"):
        MediaRules(hosts=(host,))


# ---- redirects ----


def test_three_redirects_are_followed_and_no_fourth(
    server: Server, make: Callable[..., Fetcher]
) -> None:
    one = make()
    assert one.fetch(server.url("hops/2")) == BODY
    server.seen.clear()
    error = error_of(one, server.url("hops/3"))
    assert (error.code, "redirects" in error.message) == ("media_fetch_failed", True)
    assert len(server.seen) == 4


def test_a_redirect_in_a_circle_ends(server: Server, make: Callable[..., Fetcher]) -> None:
    server.location = "/to"
    assert error_of(make(), server.url("to")).code == "media_fetch_failed"


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1:1/x",
        "//other.example/x",
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "http://169.254.169.254/",
    ],
)
def test_a_redirect_leads_nowhere_that_a_url_may_not(
    location: str, server: Server, make: Callable[..., Fetcher]
) -> None:
    server.location = location
    assert error_of(make(), server.url("to")).code == "media_forbidden"


def test_a_redirect_to_an_allowed_name_at_a_private_address(
    network: dict[str, Any], make: Callable[..., Fetcher], server: Server
) -> None:
    server.location = "http://inner.example/file"
    network["names"] = {"example.org": [PUBLIC], "inner.example": ["10.0.0.1"]}
    error = error_of(make(hosts=("example.org", "inner.example")), "http://example.org/to")
    assert (error.code, "10.0.0.1" in error.message) == ("media_forbidden", True)


# ---- several at once ----


def test_urls_are_fetched_ahead_but_not_without_bound(
    server: Server, make: Callable[..., Fetcher]
) -> None:
    urls = [server.url(f"file/{number}") for number in range(20)]
    with FetchAhead(make(), urls, ahead=4) as bodies:
        time.sleep(0.3)
        assert len(server.seen) == 4
        assert all(bodies.take(url) == BODY for url in urls)
    assert sorted(path for path, _ in server.seen) == sorted(
        f"/file/{number}" for number in range(20)
    )


def test_an_error_of_one_url_is_its_own(server: Server, make: Callable[..., Fetcher]) -> None:
    with FetchAhead(make(), [server.url("missing"), server.url("file")]) as bodies:
        with pytest.raises(RowError):
            bodies.take(server.url("missing"))
        assert bodies.take(server.url("file")) == BODY


def test_messages_show_neither_query_nor_user() -> None:
    assert shown("https://user:pw@example.org/a?token=secret#x") == "'https://example.org/a'"
    assert len(shown("https://example.org/" + "a" * 1000)) < 120


def test_certificates_are_checked_against_the_name_and_not_the_address(
    network: dict[str, Any], make: Callable[..., Fetcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def start_tls(
        stream: Any, context: ssl.SSLContext, server_hostname: str | None, timeout: float | None
    ) -> None:
        seen.append((server_hostname, context.check_hostname, context.verify_mode))
        raise httpcore.ConnectError("certificate verify failed")

    monkeypatch.setattr("httpcore._backends.sync.SyncStream.start_tls", start_tls)
    network["names"]["example.org"] = [PUBLIC]
    error = error_of(make(hosts=("example.org",)), "https://example.org/file")
    assert (error.code, "certificate" in error.message) == ("media_fetch_failed", True)
    assert set(seen) == {("example.org", True, ssl.CERT_REQUIRED)}
