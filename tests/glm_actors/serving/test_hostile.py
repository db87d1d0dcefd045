"""A running server among hostile clients: some 550 requests, each refused in OpenAI's form or its
connection closed.

After each group a good request gets the tokens that it got at first. At the end nothing is left
behind: no block, no thread, no process, no memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import hypothesis
import psutil
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.glm_actors.serving import hostile_requests as hostile
from tests.glm_actors.serving.conftest import MODEL, ROOT, TOKEN, Server

HEADERS = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
GOOD: dict[str, Any] = {
    "model": MODEL, "messages": [{"role": "user", "content": "Where is my parcel? It is late."}],
    "temperature": 0, "max_tokens": 12, "return_token_ids": True,
}  # fmt: skip
LONG: dict[str, Any] = {"model": MODEL, "prompt": "Where", "max_tokens": 900, "ignore_eos": True}
AT_ONCE = 6
EXAMPLES = 10  # of each route and kind that schemathesis makes up
# of three replicas together, with bodies of 32 MiB; a second siege took 40 MiB more
GROWTH_BYTES = 160 << 20
THREADS = 16  # of two replicas' pools, which begin small
CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@dataclass
class Siege:
    """The server, and what it was before anything hostile came."""

    server: Server
    good: list[int]
    tree: dict[str, list[int]]
    num_requests: int = 0

    def post(
        self, body: bytes | Iterable[bytes], path: str = "/v1/chat/completions"
    ) -> httpx.Response:
        return httpx.post(self.server.url + path, content=body, headers=HEADERS, timeout=60.0)

    def raw(self, data: bytes, seconds: float = 20.0) -> bytes:
        """All that comes until the server closes, or an answer is whole."""
        with self.connected(seconds) as connection:
            with contextlib.suppress(OSError):  # closed while we write: an answer may be there
                connection.sendall(data)
            return received(connection)

    def connected(self, seconds: float = 20.0) -> socket.socket:
        host, port = self.server.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=seconds)

    def assert_refused(
        self, group: Iterable[tuple[str, Any]], send: Callable[[Any], httpx.Response]
    ) -> None:
        """All of them, some at a time; then asks whether the server still works."""
        cases = list(group)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = list(pool.map(lambda case: send(case[1]), cases))
        self.num_requests += len(cases)
        wrong = {
            name: f"{answer.status_code} {answer.text[:200]}"
            for (name, _), answer in zip(cases, answers, strict=True)
            if not is_refusal(answer)
        }
        assert wrong == {}
        self.assert_works()

    def assert_works(self) -> None:
        assert self.ask() == self.good

    def ask(self) -> list[int]:
        answer = httpx.post(
            f"{self.server.url}/v1/chat/completions", json=GOOD, headers=HEADERS, timeout=60.0
        )
        assert answer.status_code == 200, answer.text
        tokens: list[int] = answer.json()["choices"][0]["token_ids"]
        return tokens


def is_refusal(answer: httpx.Response) -> bool:
    if not 400 <= answer.status_code < 500 or answer.headers["Content-Type"] != "application/json":
        return False
    body = answer.json()
    error = body.get("error", {})
    told = isinstance(error.get("message"), str) and 0 < len(error["message"]) < 1000
    return (
        body.keys() == {"error"} and error.keys() == {"message", "type", "param", "code"} and told
    )


def received(connection: socket.socket) -> bytes:
    parts = []
    with contextlib.suppress(OSError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def processes(server: Server) -> list[psutil.Process]:
    root = psutil.Process(server.process.pid)
    return [root, *root.children(recursive=True)]


def tree(server: Server) -> dict[str, list[int]]:
    """Of the processes with the model or HTTP in them: [how many, threads, open files, resident
    bytes].
    """
    found: dict[str, list[int]] = {}
    for process in processes(server):
        name = " ".join(process.cmdline())
        kind = next(
            (each for each in ("ServeReplica", "media.decoder", "schema_check") if each in name),
            None,
        )
        if kind is not None:
            numbers = [1, process.num_threads(), process.num_fds(), process.memory_info().rss]
            found[kind] = [
                sum(pair) for pair in zip(found.get(kind, [0, 0, 0, 0]), numbers, strict=True)
            ]
    return found


@pytest.fixture(scope="module")
def siege(server: Server) -> Siege:
    """What the first request of each kind costs once is there before anything is measured."""
    yet = Siege(server, [], {})
    yet.good = yet.ask()
    once = [
        *hostile.ODD.values(),
        *(body for _, body in hostile.bodies()),
        *[b" " * (31 << 20)] * AT_ONCE,
    ]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(yet.post, once))
    server.wait_until_idle()
    yet.tree = tree(server)
    return yet


# What is sent


def test_bodies_that_are_no_requests(siege: Siege) -> None:
    siege.assert_refused(hostile.bodies(), siege.post)


def test_fields_that_cannot_be(siege: Siege) -> None:
    siege.assert_refused(hostile.fields(), siege.post)


def test_schemas_that_nobody_can_follow(siege: Siege) -> None:
    siege.assert_refused(hostile.schemas(), siege.post)


def test_media_that_are_none_or_too_much(siege: Siege) -> None:
    siege.assert_refused(hostile.pictures(), siege.post)


def test_what_is_merely_odd_is_answered_or_refused(siege: Siege) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = dict(zip(hostile.ODD, pool.map(siege.post, hostile.ODD.values()), strict=True))
    siege.num_requests += len(answers)
    assert {
        name: each.text
        for name, each in answers.items()
        if each.status_code != 200 and not is_refusal(each)
    } == {}
    assert sum(each.status_code == 200 for each in answers.values()) >= 8
    siege.assert_works()


def test_tokens_that_open_nothing(siege: Siege) -> None:
    def send(token: str | None) -> httpx.Response:
        header = "" if token is None else f"Authorization: {token}\r\n"
        asked = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{header}\r\n"
        return answered(siege.raw(asked.encode("latin-1")))

    siege.assert_refused([(repr(token)[:30], token) for token in hostile.TOKENS], send)


def test_ways_that_lead_nowhere(siege: Siege) -> None:
    def send(path: str) -> httpx.Response:
        return answered(
            siege.raw(hostile.request("Connection: close\r\n", method="GET", path=path, body=""))
        )

    siege.assert_refused([(path, path) for path in hostile.PATHS], send)


def answered(data: bytes) -> httpx.Response:
    """A raw answer as httpx would give it; a connection closed without one is no answer, which 499
    stands for.
    """
    if not data:
        error = {"error": {"message": "closed", "type": "", "param": None, "code": None}}
        return httpx.Response(499, json=error)
    head, _, body = data.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = [(name, value) for name, _, value in (line.partition(": ") for line in lines)]
    return httpx.Response(int(status.split()[1]), headers=headers, content=body)


def test_what_is_no_http(siege: Siege) -> None:
    """Ours ends with `Connection: close` in front, so that each answer has an end."""

    def send(data: bytes) -> httpx.Response:
        return answered(
            siege.raw(data.replace(b"Host: x\r\n", b"Host: x\r\nConnection: close\r\n", 1))
        )

    siege.assert_refused(hostile.WIRE.items(), send)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/nowhere"])
def test_bodies_without_end(siege: Siege, path: str) -> None:
    """Declared, in chunks, and with nobody's token."""
    assert is_refusal(siege.post(b" " * (33 << 20), path))

    def chunks() -> Iterator[bytes]:
        for _ in range(10_000):
            yield b" " * (1 << 20)

    begun = time.monotonic()
    for headers in (HEADERS, {}):
        try:
            answer = httpx.post(
                siege.server.url + path, content=chunks(), headers=headers, timeout=60.0
            )
        except httpx.TransportError:  # closed while it was sending
            continue
        assert is_refusal(answer)
    assert time.monotonic() - begun < 20.0
    siege.num_requests += 3
    siege.assert_works()


# Clients that leave


STAGES: dict[str, Callable[[Any], bytes]] = {
    "before anything": lambda _: b"",
    "in the head": lambda _: hostile.request()[:60],
    "before the body": lambda _: hostile.request().partition(b"\r\n\r\n")[0] + b"\r\n\r\n",
    "in the body": lambda _: hostile.request()[:-9],
    "in a chunk": lambda _: hostile.request(
        "Transfer-Encoding: chunked\r\n", length=False, body="ff\r\nabc"
    ),
    "before the first token": lambda stream: hostile.request(
        body=json.dumps(LONG | {"stream": stream})
    ),
    "while it is read": lambda stream: hostile.request(
        body=json.dumps(LONG | {"stream": stream, "n": 4})
    ),
}


@pytest.mark.parametrize("way", ["closed", "reset"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_client_that_leaves(siege: Siege, stage: str, way: str) -> None:
    for stream in (False, True):
        with siege.connected() as connection:
            if way == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.sendall(STAGES[stage](stream))
            if stage == "while it is read" and stream:
                assert connection.recv(100)
    siege.num_requests += 2
    siege.assert_works()


def test_clients_that_leave_the_queue(siege: Siege) -> None:
    """More than are taken at once, some refused, all of them gone before they are answered."""
    crowd = [siege.connected() for _ in range(24)]
    for connection in crowd:
        connection.sendall(hostile.request(body=json.dumps(LONG | {"stream": True, "n": 2})))
    for connection in crowd:
        connection.close()
    siege.num_requests += len(crowd)
    found = siege.server.wait_until_idle()
    assert found["glm_engine_free_blocks"] == found["glm_engine_blocks"]
    siege.assert_works()


def test_heads_that_do_not_come_and_bodies_that_dawdle(siege: Siege) -> None:
    """Each holds no more than a connection. The first ends within its 15 s, after which others
    still come through.
    """
    slow = [siege.connected(30.0) for _ in range(40)]
    for number, connection in enumerate(slow):
        connection.sendall(
            hostile.request()[: 50 + number] if number % 2 else hostile.request()[:-5]
        )
    siege.num_requests += len(slow)
    siege.assert_works()
    answer = answered(received(slow[1]))
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "timeout")
    for connection in slow:
        connection.close()


# What schemathesis makes up


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_requests_made_up_from_the_openapi_page(siege: Siege, mode: str) -> None:
    """Statuses, content types and bodies of errors are what the page says; what breaks a schema is
    refused.
    """
    page = httpx.get(f"{siege.server.url}/openapi.json", headers=HEADERS, timeout=60.0).json()
    for methods in page["paths"].values():
        for described in methods.values():
            # tokens have a test of their own; here each request gets past the border
            described["security"] = []
    for found in schemathesis.openapi.from_dict(page).get_all_operations():
        operation: Any = found.ok()
        if mode == "negative" and operation.method.lower() == "get":
            continue  # there is nothing to break in them
        generation = schemathesis.GenerationMode(mode)
        strategy = operation.as_strategy(generation_mode=generation)
        made_up(siege, strategy, mode == "negative")
    siege.assert_works()


def made_up(siege: Siege, strategy: Any, is_hostile: bool) -> None:
    @hypothesis.given(case=strategy)
    @hypothesis.settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
        phases=[hypothesis.Phase.generate], suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    def send(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = MODEL if 0 < len(case.body["model"]) <= 256 else case.body["model"]
            if not is_hostile and "n" in case.body:
                case.body |= {"n": 1, "max_tokens": 4, "min_tokens": 0}
        answer = case.call(
            base_url=siege.server.url,
            headers={"Authorization": HEADERS["Authorization"]},
            timeout=60,
        )
        siege.num_requests += 1
        case.validate_response(answer, checks=CHECKS)
        assert answer.status_code < 500
        assert not is_hostile or answer.status_code >= 400, (case.body, answer.text)

    send()


# What is left


def test_at_least_300_came(siege: Siege) -> None:
    assert siege.num_requests >= 300


def test_nothing_is_left_behind(siege: Siege) -> None:
    found = siege.server.wait_until_idle()
    assert found["glm_engine_free_blocks"] == found["glm_engine_blocks"]
    now = tree(siege.server)
    for kind, before in siege.tree.items():
        assert now[kind][0] <= before[0], (kind, "processes")
        assert now[kind][1] <= before[1] + THREADS, (kind, "threads")
        assert now[kind][2] <= before[2] + 8, (kind, "open files")
    grown = now["ServeReplica"][3] - siege.tree["ServeReplica"][3]
    assert grown <= GROWTH_BYTES, f"{grown >> 20} MiB"


def test_the_books_of_the_cache_agree(siege: Siege) -> None:
    """Asked by one who has Ray's token, as an operator would."""
    gcs = next(each for each in processes(siege.server) if each.name() == "gcs_server")
    port = next(
        each.laddr.port for each in gcs.net_connections("inet") if each.status == psutil.CONN_LISTEN
    )
    lines = [
        "import ray",
        "from ray import serve",
        f"ray.init('127.0.0.1:{port}', log_to_driver=False)",
        "serve.get_deployment_handle('model-tiny-glm', 'glm-batch').check_blocks.remote().result(timeout_s=60)",
        "print('agree')",
    ]
    environment = os.environ | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "agree" in done.stdout, done.stderr
