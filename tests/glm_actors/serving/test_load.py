"""Many clients at once, for a while: nothing leaks, a replica that is killed comes back, a longer
queue gets more.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest

from glm_batch.glm_actors.serving.openai.serve_settings import ServedModel, ServeSettings
from glm_batch.glm_actors.serving.replicas.deployment import APP_NAME, deployment_name
from glm_batch.jobs.serving.serve import start
from glm_batch.models.engine.api.interface import EngineOptions
from glm_batch.models.request_limits import RequestLimits
from tests.glm_actors.serving.conftest import TINY
from tests.ray_processes import ray_processes

PAIR, GROWING = "pair", "growing"
MAX_QUEUE = 24
RSS_GROWTH = 24 << 20  # bytes that a replica may gain after its warm-up
EVENT = b"data: {"


@dataclass(frozen=True)
class Answer:
    """What a client read until the server closed the connection, or until it left."""

    status: int
    body: bytes

    @property
    def events(self) -> list[bytes]:
        return [
            line.removeprefix(b"data: ")
            for line in self.body.split(b"\n")
            if line.startswith(b"data: ")
        ]

    @property
    def tokens(self) -> int | None:
        """By the usage at the end of a whole stream."""
        if self.status != 200 or self.events[-1:] != [b"[DONE]"]:
            return None
        usage = json.loads(self.events[-2]).get("usage")
        return usage["completion_tokens"] if usage else None

    @property
    def error(self) -> dict[str, Any]:
        """In OpenAI's form: the body, or the last event of a stream."""
        if self.status == 200:
            assert self.events[-1] == b"[DONE]", self.body[-500:]
        text = self.events[-2] if self.status == 200 else self.body
        error: dict[str, Any] = json.loads(text)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        return error


async def ask(port: int, model: str, num_tokens: int, leave_after: int | None = None) -> Answer:
    """Streams `num_tokens`; leaves after so many events, 0 being right after it was sent."""
    asked = {
        "model": model, "prompt": "Where is my parcel?", "max_tokens": num_tokens, "ignore_eos": True,
        "stream": True, "return_token_ids": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    body = json.dumps(asked).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = [
        "POST /v1/completions HTTP/1.1",
        "Host: localhost",
        "Connection: close",
        "Content-Type: application/json",
    ]
    writer.write("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)
    read = b""
    try:
        while leave_after is None or read.count(EVENT) < leave_after:
            if not (data := await reader.read(1 << 16)):
                break
            read += data
    finally:
        writer.close()
    head_, _, rest = read.partition(b"\r\n\r\n")
    return Answer(int(head_.split()[1]) if head_ else 0, rest)


async def crowd(num_clients: int, num_requests: int, request: Callable[[int], Any]) -> list[Answer]:
    """So many requests, `num_clients` of them at a time."""
    numbers, answers = iter(range(num_requests)), []

    async def client() -> None:
        for number in numbers:
            answers.append(await request(number))

    await asyncio.gather(*(client() for _ in range(num_clients)))
    return answers


@pytest.fixture(scope="module")
def port(ray_cluster: None) -> Iterator[int]:
    """A server in this session's Ray, so that its replicas can be asked and killed."""
    from ray import serve as ray_serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]
    engine = EngineOptions(dtype="float32", kv_cache_tokens=1 << 14)
    models = {
        PAIR: ServedModel(model=TINY, engine=engine, replicas=2),
        GROWING: ServedModel(model=TINY, engine=engine, replicas=[1, 2]),
    }
    start(
        ServeSettings(models=models, port=number, limits=RequestLimits(max_queue=MAX_QUEUE)), None
    )
    yield number
    ray_serve.shutdown()


def replicas(model: str) -> list[psutil.Process]:
    return ray_processes(f"ray::ServeReplica:{APP_NAME}:{deployment_name(model)}")


def wait_for(what: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def stats_of_both(model: str) -> list[dict[str, Any]]:
    """What each of the two replicas says after its own check of its blocks."""
    from ray import serve as ray_serve

    handle = ray_serve.get_deployment_handle(deployment_name(model), APP_NAME)
    found: dict[str, dict[str, Any]] = {}
    deadline = time.monotonic() + 60.0
    while len(found) < 2:  # the router picks
        assert time.monotonic() < deadline
        asked = [(handle.check_blocks.remote(), handle.stats.remote()) for _ in range(8)]
        for check, stats in asked:
            check.result(timeout_s=60)
            numbers = stats.result(timeout_s=60)
            found[numbers["replica"]] = numbers
    return list(found.values())


def is_idle(model: str) -> bool:
    """Whether nobody is about in either replica; then all blocks must be free."""
    both = stats_of_both(model)
    if any(numbers["requests"] for numbers in both):
        return False
    for numbers in both:
        assert (numbers["running"], numbers["waiting"]) == (0, 0)
        assert numbers["free_blocks"] == numbers["blocks"]
    return True


def test_hundreds_of_clients_leave_nothing_behind(port: int) -> None:
    """Every fifth leaves: before an answer, after a first word, in the middle."""

    async def request(number: int) -> Answer:
        leaves = {0: 0, 5: 1, 10: 6}.get(number % 15)
        answer = await ask(port, PAIR, 8 if leaves is None else 400, leaves)
        if leaves is None:
            assert (answer.status, answer.tokens) == (200, 8), answer
        return answer

    assert len(asyncio.run(crowd(20, 150, request))) == 150
    before = {process.pid: process.memory_info().rss for process in replicas(PAIR)}
    assert len(before) == 2
    assert len(asyncio.run(crowd(20, 450, request))) == 450
    wait_for(lambda: is_idle(PAIR), 30.0)
    growth = {
        process.pid: process.memory_info().rss - before[process.pid] for process in replicas(PAIR)
    }
    assert len(growth) == 2
    assert max(growth.values()) < RSS_GROWTH, growth


def test_a_replica_killed_under_load_costs_its_own_requests_alone(port: int) -> None:
    victim = replicas(PAIR)[0]
    count = itertools.count()

    async def request(number: int) -> Answer:
        answer = await ask(port, PAIR, 60)
        if next(count) == 40:  # now both replicas work for others
            victim.kill()
        return answer

    answers = asyncio.run(crowd(16, 160, request))
    good = [answer for answer in answers if answer.tokens == 60]
    errors = [answer.error for answer in answers if answer.tokens != 60]
    assert len(good) >= 100
    assert errors
    assert {error["code"] for error in errors} == {"unavailable"}
    wait_for(
        lambda: (
            len(replicas(PAIR)) == 2 and victim.pid not in {each.pid for each in replicas(PAIR)}
        ),
        60.0,
    )
    wait_for(lambda: is_idle(PAIR), 30.0)
    assert [answer.tokens for answer in asyncio.run(crowd(8, 24, request))] == [60] * 24
    wait_for(lambda: is_idle(PAIR), 30.0)


def test_a_long_queue_gets_another_replica(port: int) -> None:
    """More than TARGET_SHARE of MAX_QUEUE are about, until a second one has started."""
    assert len(replicas(GROWING)) == 1
    grown = asyncio.Event()

    async def watch() -> None:
        async with asyncio.timeout(60.0):
            while len(replicas(GROWING)) < 2:
                await asyncio.sleep(0.2)
        grown.set()

    async def client() -> int:
        count = 0
        while not grown.is_set():
            answer = await ask(port, GROWING, 100)
            assert answer.tokens == 100, answer
            count += 1
        return count

    async def load() -> list[int]:
        watching = asyncio.ensure_future(watch())
        counts = await asyncio.gather(*(client() for _ in range(MAX_QUEUE - 4)))
        await watching
        return counts

    assert min(asyncio.run(load())) >= 1
