"""EngineLoop: each caller gets exactly its own completions, and hears of it when the engine dies."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from functools import partial

import pytest

from glm_batch.glm_actors.engines.engine_loop import EngineLoop
from glm_batch.models.engine.api.request import Classify, Completion, Delta, Generate, Request
from glm_batch.models.engine.echo import EchoEngine
from glm_batch.models.errors import ConfigError, EngineError


def requests(*ids: str) -> list[Request]:
    return [Request(id=id, input_ids=[1, 2, len(id)], work=Classify()) for id in ids]


class SlowEngine(EchoEngine):
    """Finishes one request a step, the last submitted first; waits for `gate` before each step."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Semaphore(0)
        self.closed = False

    def step(self) -> list[Completion]:
        assert self.gate.acquire(timeout=10)
        request = self._waiting.popitem()[1]
        return [self._answer(request)]

    def close(self) -> None:
        self.closed = True


class BrokenEngine(EchoEngine):
    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def step(self) -> list[Completion]:
        done = super().step()
        match self.fault:
            case "raise":
                raise MemoryError("no more memory")
            case "raise_engine_error":
                raise EngineError("lost rank 1")
            case "lose":
                return done[1:]
            case _:
                return [*done, done[0]]


def ids(future: Future[list[Completion]]) -> list[str]:
    return [completion.id for completion in future.result(timeout=10)]


def test_many_callers_get_their_own_completions_in_order() -> None:
    loop = EngineLoop(EchoEngine)
    found: dict[int, list[str]] = {}

    def call(number: int) -> None:
        for turn in range(20):
            found[number] = ids(loop.submit(requests(*(f"{number}-{turn}-{n}" for n in range(5)))))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loop.close()
    assert found == {number: [f"{number}-19-{n}" for n in range(5)] for number in range(6)}


def test_a_later_group_may_finish_first() -> None:
    engine = SlowEngine()
    loop = EngineLoop(lambda: engine)
    first, second = loop.submit(requests("a", "b")), loop.submit(requests("c"))
    engine.gate.release()
    engine.gate.release()
    assert ids(second) == ["c"]
    assert not first.done()
    engine.gate.release()
    assert ids(first) == ["a", "b"]
    loop.close()
    assert engine.closed


def test_no_requests_are_answered_at_once() -> None:
    loop = EngineLoop(EchoEngine)
    assert ids(loop.submit([])) == []
    loop.close()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise", "MemoryError: no more memory"),
        ("raise_engine_error", "lost rank 1"),
        ("lose", "lost 1 requests"),
        ("repeat", "which is not in flight"),
    ],
)
def test_a_dead_engine_fails_everyone_now_and_later(fault: str, message: str) -> None:
    loop = EngineLoop(lambda: BrokenEngine(fault))
    future = loop.submit(requests("a", "b"))
    if fault == "repeat":
        assert ids(future) == ["a", "b"]
    else:
        with pytest.raises(EngineError, match=message):
            future.result(timeout=10)
    loop._thread.join(timeout=10)
    assert message in str(loop.failure)
    with pytest.raises(EngineError, match=message):
        loop.submit(requests("c"))


def test_closing_fails_what_is_in_flight() -> None:
    engine = SlowEngine()
    loop = EngineLoop(lambda: engine)
    future = loop.submit(requests("a", "b"))
    closing = threading.Thread(target=loop.close)
    engine.gate.release()
    closing.start()
    engine.gate.release(5)
    closing.join(timeout=10)
    assert future.done()
    with pytest.raises(EngineError, match="closed"):
        loop.submit(requests("c"))


def test_an_id_in_flight_is_refused_and_harms_nobody() -> None:
    engine = SlowEngine()
    loop = EngineLoop(lambda: engine)
    future = loop.submit(requests("a"))
    with pytest.raises(ValueError, match="unique"):
        loop.submit(requests("a"))
    with pytest.raises(ValueError, match="unique"):
        loop.submit(requests("b", "b"))
    engine.gate.release()
    assert ids(future) == ["a"]
    loop.close()


def test_the_engine_is_built_and_stepped_in_one_thread() -> None:
    """Built elsewhere, its OpenMP team of workers was one of two, and a job ran 20 % slower than
    its engine alone.
    """
    threads = set()

    class Watched(EchoEngine):
        def __init__(self) -> None:
            super().__init__()
            threads.add(threading.get_ident())

        def step(self) -> list[Completion]:
            threads.add(threading.get_ident())
            return super().step()

    loop = EngineLoop(Watched)
    assert ids(loop.submit(requests("a"))) == ["a"]
    loop.close()
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_what_building_raises_reaches_the_caller() -> None:
    def build() -> EchoEngine:
        raise ConfigError("no such model")

    with pytest.raises(ConfigError, match="no such model"):
        EngineLoop(build)


class TalkingEngine(EchoEngine):
    """Says one token a step for each request, until it has said three; waits for `gate` before each
    step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Semaphore(0)
        self.said: dict[str, int] = {}

    def step(self) -> list[Completion]:
        assert self.gate.acquire(timeout=10)
        done, self._aborted = self._aborted, []
        for id in list(self._waiting):
            self.said[id] = self.said.get(id, 0) + 1
            self._deltas.append(Delta(id=id, index=0, token_ids=(self.said[id],), text="x"))
            if self.said[id] == 3:
                done.append(self._completion(self._waiting.pop(id), {"finish_reason": "stop"}))
        return done


def test_deltas_come_to_whoever_submitted_before_the_completion_in_one_call_a_step() -> None:
    loop = EngineLoop(TalkingEngine)
    engine = loop.look(lambda engine: engine).result(timeout=10)
    heard: dict[str, list[list[tuple[str, int]]]] = {"together": [], "alone": []}

    def note(name: str, deltas: list[Delta]) -> None:
        heard[name].append([(delta.id, *delta.token_ids) for delta in deltas])

    together, alone = partial(note, "together"), partial(note, "alone")
    streams = [
        loop.submit([Request(id=id, input_ids=[1], work=Generate(), stream=True)], on_deltas)
        for id, on_deltas in (("a", together), ("b", together), ("d", alone))
    ]
    quiet = loop.submit(requests("c"))
    engine.gate.release(5)
    for stream in streams:
        assert [completion.finish_reason for completion in stream.result(timeout=10)] == ["stop"]
    assert [pair for deltas in heard["alone"] for pair in deltas] == [("d", 1), ("d", 2), ("d", 3)]
    assert [pair for deltas in heard["together"] for pair in deltas if pair[0] == "a"] == [
        ("a", 1),
        ("a", 2),
        ("a", 3),
    ]
    # but for a first step before the second came
    assert any(len(deltas) == 2 for deltas in heard["together"])
    assert ids(quiet) == ["c"]
    loop.close()


def test_an_aborted_request_completes_and_nobody_can_cancel_the_future() -> None:
    loop = EngineLoop(TalkingEngine)
    engine = loop.look(lambda engine: engine).result(timeout=10)
    first, second = loop.submit(requests("a")), loop.submit(requests("b"))
    loop.abort(["a", "nobody"])
    assert not first.cancel()
    engine.gate.release(9)
    assert first.result(timeout=10)[0].finish_reason == "abort"
    assert second.result(timeout=10)[0].finish_reason == "stop"
    loop.close()


def test_a_look_fails_alone_or_with_the_engine() -> None:
    loop = EngineLoop(EchoEngine)
    with pytest.raises(ZeroDivisionError):
        loop.look(lambda engine: 1 / 0).result(timeout=10)
    assert loop.look(lambda engine: engine.has_work()).result(timeout=10) is False
    loop.close()
    with pytest.raises(EngineError, match="closed"):
        loop.look(lambda engine: engine.has_work()).result(timeout=10)
