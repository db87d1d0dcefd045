"""SharedEngine against a line that loses replicas, has none for a while, or leads to another model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm_batch.glm_actors.faults.suspects import Patience
from glm_batch.glm_actors.shared.shared_engine import (
    MESSAGE_BYTES,
    MESSAGE_ROWS,
    SharedEngine,
    Waiting,
)
from glm_batch.glm_actors.shared.shared_model import (
    Answer,
    AppFailedError,
    BatchWork,
    ModelIdentity,
    NoReplicaError,
    ReplicaLostError,
    SharedModel,
)
from glm_batch.glm_actors.units.model_actor import ModelActor, UnitJournal
from glm_batch.models.engine.api.interface import EngineConfig
from glm_batch.models.engine.api.request import BATCH, Choose, Completion, Embed, Request
from glm_batch.models.engine.echo import EchoEngine
from glm_batch.models.errors import ConfigError, EngineError
from glm_batch.models.processing.patches import Media, MediaItem

IDENTITY = ModelIdentity(
    checkpoint="c", kind="torch", dtype="float32", max_model_len="auto", version="1.0"
)
MODEL = SharedModel(app="app", deployment="model-x", identity=IDENTITY)
HASTE = Waiting(messages=2, pause_s=0.001, max_pause_s=0.002, absence_s=0.1)


class FakeLine:
    """Answers with an EchoEngine, after the troubles that it is given, one for each call.

    A request with a token of `poison` takes the replica with it, and all that is under way.
    """

    def __init__(
        self,
        *troubles: Exception | ModelIdentity,
        identity: ModelIdentity = IDENTITY,
        poison: Collection[int] = (),
    ) -> None:
        self.troubles = list(troubles)
        self.num_deaths = 0
        self._poison = set(poison)
        self.works: list[BatchWork] = []
        self.hold = threading.Event()
        self.hold.set()
        self.num_under_way = self.most_under_way = self.num_cancelled = 0
        self.closed = False
        self._identity = identity

    async def identity(self) -> ModelIdentity:
        return self._identity

    async def ask(self, work: BatchWork) -> Answer:
        self.works.append(work)
        self.num_under_way += 1
        self.most_under_way = max(self.most_under_way, self.num_under_way)
        replica = self.num_deaths
        try:
            while not self.hold.is_set():
                await asyncio.sleep(0.001)
            await asyncio.sleep(0)
            if replica == self.num_deaths and any(
                self._poison & set(request.input_ids) for request in work.requests
            ):
                self.num_deaths += 1
            await asyncio.sleep(0)
            if replica != self.num_deaths:
                raise ReplicaLostError("killed")
            trouble = self.troubles.pop(0) if self.troubles else None
            if isinstance(trouble, Exception):
                raise trouble
            if trouble is not None:
                return trouble
            engine = EchoEngine(merge_size=2)
            engine.submit(list(work.requests))
            return engine.step()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_under_way -= 1

    def close(self) -> None:
        self.closed = True


Build = Callable[[FakeLine], SharedEngine]


@pytest.fixture
def build() -> Iterator[Build]:
    built: list[SharedEngine] = []

    def make(line: FakeLine) -> SharedEngine:
        built.append(SharedEngine(MODEL, line, HASTE))
        return built[-1]

    yield make
    for engine in built:
        engine.close()


def requests(count: int) -> list[Request]:
    return [
        Request(id=f"r{i}", input_ids=[i, i + 1], work=Choose(choices=((1,), (2,), (3,))))
        for i in range(count)
    ]


def drain(engine: SharedEngine) -> dict[str, Completion]:
    done: dict[str, Completion] = {}
    while engine.has_work():
        for completion in engine.step():
            assert completion.id not in done
            done[completion.id] = completion
    return done


def echoed(wanted: list[Request]) -> dict[str, Completion]:
    engine = EchoEngine()
    engine.submit(wanted)
    return {completion.id: completion for completion in engine.step()}


def same(done: dict[str, Completion], expected: dict[str, Completion]) -> bool:
    return {name: each.choice_logprobs for name, each in done.items()} == {
        name: each.choice_logprobs for name, each in expected.items()
    }


def test_requests_go_in_small_messages_at_batch_priority_and_come_back_under_their_own_names(
    build: Build,
) -> None:
    line = FakeLine()
    engine = build(line)
    wanted = requests(5 * MESSAGE_ROWS + 1)
    line.hold.clear()
    engine.submit(wanted)
    while line.num_under_way < HASTE.messages:
        assert engine.step() == []
    line.hold.set()
    assert same(drain(engine), echoed(wanted))
    assert [len(work.requests) for work in line.works] == [MESSAGE_ROWS] * 5 + [1]
    assert {request.priority for work in line.works for request in work.requests} == {BATCH}
    assert len({request.id for work in line.works for request in work.requests}) == len(wanted)
    assert {work.caller for work in line.works} == {line.works[0].caller}
    assert line.most_under_way == HASTE.messages
    engine.close()
    assert line.closed


def test_what_a_replica_took_with_it_is_sent_again(build: Build) -> None:
    line = FakeLine(
        ReplicaLostError("killed"), NoReplicaError("starting"), ReplicaLostError("killed")
    )
    engine = build(line)
    wanted = requests(3)
    engine.submit(wanted)
    assert same(drain(engine), echoed(wanted))
    assert [len(work.requests) for work in line.works] == [3, 3, 3, 1, 1, 1]


@pytest.mark.parametrize(
    ("bad", "deaths"),
    [
        ((70,), 4),
        ((0,), 4),
        ((33, 34), 6),
        (tuple(range(40, 44)), 10),
        ((5, 70), 8),
        (tuple(range(40, 47)), 16),  # ended the job: six of them one after the other
    ],
)
def test_rows_that_replicas_do_not_survive_fail_alone(
    build: Build, bad: tuple[int, ...], deaths: int
) -> None:
    """At most four deaths for one, and two more for another one in the same message."""
    wanted = [
        replace(each, input_ids=[row, 1000 if row in bad else 0])
        for row, each in enumerate(requests(100))
    ]
    line = FakeLine(poison=[1000])
    engine = build(line)
    engine.submit(wanted)
    done = drain(engine)
    failed = {name: each.error for name, each in done.items() if each.error}
    assert failed.keys() == {f"r{row}" for row in bad}
    for error in failed.values():
        assert error is not None
        assert error.code == "worker_died"
        assert "died 2 times while it had nothing else" in str(error)
    expected = echoed(wanted)
    good = {name: each for name, each in done.items() if name not in failed}
    assert same(good, {name: expected[name] for name in good})
    assert len(done) == len(wanted)
    assert line.num_deaths <= deaths


def test_replicas_that_survive_nothing_end_the_engine_soon(build: Build) -> None:
    line = FakeLine(poison=range(200))
    engine = build(line)
    engine.submit(requests(100))
    with pytest.raises(AppFailedError, match=r"'app' lost 6 replicas in a row.*: killed"):
        drain(engine)
    assert line.num_deaths == 1 + Patience().barren_deaths


def test_an_application_is_waited_for_but_not_for_ever(build: Build) -> None:
    engine = build(FakeLine(*[NoReplicaError("no such deployment")] * 10_000))
    engine.submit(requests(1))
    with pytest.raises(EngineError, match=r"'app' has not been there for 0 s: no such deployment"):
        drain(engine)


def test_another_model_is_refused_at_the_start_and_ends_the_engine_later(build: Build) -> None:
    other = replace(IDENTITY, dtype="bfloat16")
    words = r"'app' no longer serves.*engine\.dtype: float32 in the job, bfloat16 there"
    line = FakeLine(identity=other)
    with pytest.raises(ConfigError, match=words):
        build(line)
    assert line.closed
    engine = build(FakeLine(other))
    engine.submit(requests(1))
    with pytest.raises(EngineError, match=words):
        drain(engine)


def test_an_abort_ends_a_message_that_nobody_wants_any_more(build: Build) -> None:
    line = FakeLine()
    line.hold.clear()
    engine = build(line)
    wanted = requests(2 * MESSAGE_ROWS)
    engine.submit(wanted)
    assert engine.step() == []  # waits for a moment, in which both messages leave
    aborted = [request.id for request in wanted[:MESSAGE_ROWS]]
    engine.abort([*aborted, wanted[-1].id, "nobody"])
    line.hold.set()
    done = drain(engine)
    assert {name for name, each in done.items() if each.finish_reason == "abort"} == {
        *aborted,
        wanted[-1].id,
    }
    assert done.keys() == {request.id for request in wanted}
    assert line.num_cancelled == 1


def test_close_gives_up_what_is_under_way(build: Build) -> None:
    line = FakeLine()
    line.hold.clear()
    engine = build(line)
    engine.submit(requests(1))
    assert engine.step() == []
    engine.close()
    assert line.num_cancelled == 1
    assert not engine.has_work()


def test_messages_with_media_are_bounded_by_their_size(build: Build) -> None:
    line = FakeLine()
    engine = build(line)
    patches = np.zeros((4, MESSAGE_BYTES // 10), np.uint8)  # 0.4 of a message
    item = MediaItem(kind="image", patches=patches, grid_thw=(1, 2, 2), digest=b"0123")
    media = Media(items=(item,), positions=np.zeros((3, 2), np.int64))
    engine.submit(
        [Request(id=str(i), input_ids=[1, 2], work=Embed(), media=media) for i in range(5)]
    )
    assert len(drain(engine)) == 5
    assert sorted(len(work.requests) for work in line.works) == [1, 2, 2]


@pytest.mark.parametrize("wrong", [{"id": "r0"}, {"stream": True}])
def test_what_cannot_be_sent_is_refused(build: Build, wrong: dict[str, Any]) -> None:
    line = FakeLine()
    line.hold.clear()
    engine = build(line)
    (first, second) = requests(2)
    engine.submit([first])
    with pytest.raises(ValueError, match=r"in flight already|cannot stream"):
        engine.submit([replace(second, **wrong)])


def test_an_identity_is_that_of_files_and_settings(echo_checkpoint: Path) -> None:
    path = str(echo_checkpoint)
    mine = ModelIdentity.of(EngineConfig(model=path, dtype="float32"))
    assert mine == ModelIdentity.of(
        EngineConfig(model=path, dtype="float32", kind="torch", device="cpu")
    )
    limited = ModelIdentity.of(EngineConfig(model=path, kind="echo", max_model_len=8))
    assert mine.differences(limited) == [
        "engine.kind: torch in the job, echo there",
        "engine.dtype: float32 in the job, auto there",
        "engine.max_model_len: auto in the job, 8 there",
    ]
    newer = replace(mine, version="9.9", dtype="bfloat16")
    (told,) = mine.differences(newer)
    assert told.startswith(f"it runs glm-batch 9.9, the job {mine.version}: ")


def test_an_application_that_fails_ends_the_job_and_not_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another process of the job would lose as many replicas again."""
    line = FakeLine(poison=range(200))
    monkeypatch.setattr(SharedModel, "build_engine", lambda self: SharedEngine(self, line, HASTE))
    actor = ModelActor(MODEL, 1)
    with pytest.raises(AppFailedError):
        actor._complete(UnitJournal(None), requests(3))
    assert line.num_deaths == 1 + Patience().barren_deaths
