"""Seconds are counted once, travel with their unit, and name the stage that holds a job up."""

import time

import pyarrow as pa
import pytest

from glm_batch.glm_actors.engines.engine_loop import EngineLoop
from glm_batch.glm_actors.faults.spent import (
    ENGINE_BUSY,
    ENGINE_IDLE,
    MEDIA,
    Stopwatch,
    spent_on,
    timed,
    with_spent,
)
from glm_batch.glm_actors.units.row_worker import RowWorker
from glm_batch.models.engine.api.request import Generate, Request, SamplingParams
from glm_batch.models.engine.echo import EchoEngine
from glm_batch.models.errors import RowError
from glm_batch.models.processing.tokenizer import Tokenizer
from glm_batch.pipelines.metrics.counts import (
    COMMITTING,
    ENGINE,
    PREPARING,
    READING,
    bottleneck,
    summed,
)

TINY = "examples/tiny_glm"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock whose only second hand is the test: now is the list's one number."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_each_second_counts_once_for_the_innermost_name(clock: list[float]):
    stopwatch = Stopwatch({PREPARING: 1.0})
    with stopwatch.on(PREPARING):
        clock[0] += 2
        with timed(MEDIA):
            clock[0] += 5
            with timed("fetching"):
                clock[0] += 7
        clock[0] += 3
        with timed(MEDIA):
            clock[0] += 1
    with timed(MEDIA):  # nobody times this
        clock[0] += 100
    assert stopwatch.seconds == {PREPARING: 6.0, MEDIA: 6.0, "fetching": 7.0}


def test_what_fails_has_taken_its_time(clock: list[float]):
    stopwatch = Stopwatch()

    def fail() -> None:
        with stopwatch.on(READING):
            clock[0] += 4
            raise ValueError("late")

    with pytest.raises(ValueError, match="late"):
        fail()
    with stopwatch.on(READING):
        clock[0] += 1
    assert stopwatch.seconds == {READING: 5.0}


def test_seconds_travel_with_a_unit_through_its_steps():
    class Step:
        def __init__(self, name: str, seconds: float) -> None:
            self.name, self._seconds = name, seconds

        def num_rows(self, table: pa.Table) -> int:
            return table.num_rows

        def __call__(
            self, table: pa.Table, start: int, stop: int, lost: RowError | None = None
        ) -> pa.Table:
            time.sleep(self._seconds)
            # as steps do: a table of their own
            return pa.table({"row": table["row"].slice(start, stop - start)})

    given = with_spent(pa.table({"row": [1, 2, 3]}), {"queue": 9.0})
    once = RowWorker(lambda: [Step(READING, 0.02), Step(PREPARING, 0.01)])(given)
    twice = RowWorker(lambda: [Step(READING, 0.02)])(once)
    assert twice["row"].to_pylist() == [1, 2, 3]
    assert spent_on(once)["queue"] == spent_on(twice)["queue"] == 9.0
    assert 0.02 <= spent_on(once)[READING] < spent_on(twice)[READING]
    assert 0.04 <= spent_on(twice)[READING] <= 1.0
    assert spent_on(twice)[PREPARING] == spent_on(once)[PREPARING] >= 0.01
    assert spent_on(pa.table({"row": [1]})) == {}
    assert spent_on(given.slice(0, 0)) == {}


def test_an_engine_says_how_long_it_worked_and_waited():
    tokenizer = Tokenizer.from_dir(TINY)
    loop = EngineLoop(
        lambda: EchoEngine(tokenizer=tokenizer, hidden_size=8, num_labels=2, merge_size=None)
    )
    try:
        time.sleep(0.05)
        before = loop.take_usage()
        assert before.busy_s == before.idle_s == 0.0  # starting up is nobody's waiting
        begun = time.monotonic()
        for number in range(2):
            request = Request(
                id=str(number),
                input_ids=(1, 2),
                work=Generate(sampling=SamplingParams(max_tokens=2)),
            )
            loop.submit([request]).result(timeout=10)
            time.sleep(0.05)
        loop.submit([Request(id="last", input_ids=(1,), work=request.work)]).result(timeout=10)
        usage, took = loop.take_usage(), time.monotonic() - begun
    finally:
        loop.close()
    assert usage.idle_s >= 0.1
    assert usage.busy_s > 0
    assert usage.busy_s + usage.idle_s <= took


@pytest.mark.parametrize(
    ("seconds", "stage"),
    [
        ({ENGINE_BUSY: 9.5, ENGINE_IDLE: 0.5, MEDIA: 100.0}, ENGINE),
        ({ENGINE_BUSY: 5.0, ENGINE_IDLE: 5.0, MEDIA: 10.0, READING: 1.0}, MEDIA),
        ({ENGINE_BUSY: 5.0, ENGINE_IDLE: 5.0, MEDIA: 1.0, READING: 9.0}, READING),
        ({ENGINE_BUSY: 5.0, ENGINE_IDLE: 5.0, READING: 1.0, COMMITTING: 3.0}, COMMITTING),
        ({ENGINE_BUSY: 5.0, ENGINE_IDLE: 5.0}, ENGINE),
    ],
)
def test_the_bottleneck_is_what_rows_wait_for(seconds: dict[str, float], stage: str):
    found = bottleneck(seconds)
    assert found is not None
    assert found.stage == stage
    assert found.remedy
    assert sum(found.shares.values()) == pytest.approx(1.0 if len(seconds) > 2 else 0.0)


def test_nothing_is_said_of_what_was_not_timed():
    assert bottleneck({}) is None
    assert bottleneck({READING: 3.0}) is None
    assert summed([{READING: 1.0}, {READING: 2.0, MEDIA: 4.0}]) == {READING: 3.0, MEDIA: 4.0}
