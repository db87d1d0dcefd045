"""ModelActor: owns one engine; tables of requests in, tables of completions out.

Built on a worker from a frozen description, it is the callable class of a Ray Data stage whose
calls arrive on several threads: that is how many units are in flight at once. A dead engine is this
process's end: Ray starts another, and the guard finds out which rows it must not be given.
"""

from __future__ import annotations

import faulthandler
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import pyarrow as pa

from glm_batch.glm_actors.engines.engine_loop import EngineLoop, Submission
from glm_batch.glm_actors.engines.worker_group import WorkerGroup, needs_ranks
from glm_batch.glm_actors.faults.spent import (
    ENGINE_BUSY,
    ENGINE_IDLE,
    IN_ENGINE,
    spent_on,
    with_spent,
)
from glm_batch.glm_actors.faults.startup import loading
from glm_batch.glm_actors.faults.suspects import Answer, Guard, NoRestartError, RayBook
from glm_batch.glm_actors.faults.watchdog import STDERR, HangLimits, Watchdog
from glm_batch.glm_actors.units.batches import (
    completion_table,
    to_completions,
    to_requests,
    with_completions,
)
from glm_batch.models.engine import Completion, Engine, EngineConfig, Request, build_engine
from glm_batch.models.errors import EngineError, GlmBatchError, RowError

# Read by torch's CPU libraries when they are loaded; a user's own values stay.
CPU_SETTINGS = {
    # Both libraries keep 1,024 prepared matrix products, one for each shape, a quarter of a
    # megabyte each.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "LRU_CACHE_CAPACITY": "128",
}
# Threads that wait for each other spin for microseconds, not milliseconds: preprocessors want these
# cores too. Online there are none, and threads that go to sleep between two operators cost a decode
# step a tenth of its time.
BATCH_SETTINGS = CPU_SETTINGS | {"GOMP_SPINCOUNT": "1000"}


PROMPTNESS = 0.8  # of the time within which things must be durable: writing takes some, too


class EngineSource(Protocol):
    """Builds another engine than EngineConfig names: glm_actors.shared's."""

    def build_engine(self) -> Engine: ...


class ModelActor:
    """One engine, fed by an EngineLoop. `num_threads` is the share of the machine's cores for its
    matrix products.

    `ledger` is the Ray actor of a glm_actors.faults.suspects.Ledger, to which a unit is named by
    the table's `unit_column`. Without one a row that kills the process is given to the next one
    again and again. With a `journal`, units that stay in the engine for long can be taken up where
    a dead process left them.
    """

    def __init__(
        self,
        engine: EngineConfig | EngineSource,
        num_threads: int,
        ledger: Any = None,
        unit_column: str | None = None,
        hang_limits: HangLimits | None = None,
        journal: Journal | None = None,
    ) -> None:
        # Ray limits a worker to as many threads as its logical CPUs; this must be set before torch
        # is imported.
        os.environ["OMP_NUM_THREADS"] = str(num_threads)
        for name, value in BATCH_SETTINGS.items():
            os.environ.setdefault(name, value)
        self._unit_column, self._journal = unit_column, journal
        self._guard = Guard(RayBook(ledger) if ledger is not None else None, "the model's worker")
        self._loop: EngineLoop | None = None
        # Raised from the first call: Ray would wrap it here into the death of an actor.
        self._refusal: GlmBatchError | None = self._guard.refusal
        if not self._refusal:
            self._load(engine, Watchdog(hang_limits or HangLimits(), self._end_hanging))

    def __call__(self, table: pa.Table) -> pa.Table:
        """Completes a unit's requests: see glm_actors.units.batches for both tables, to which this
        adds what was spent.
        """
        if self._refusal:
            raise self._refusal
        begun = time.monotonic()
        requests = to_requests(table)
        first = list(
            accumulate(table["work"].is_valid().to_pylist(), initial=0)
        )  # request of each row
        unit = table[self._unit_column][0].as_py() if self._unit_column and table.num_rows else ""
        journal = UnitJournal(self._journal, int(unit)) if unit != "" else UnitJournal(None)

        def complete(start: int, stop: int) -> list[Completion]:
            return self._complete(journal, requests[first[start] : first[stop]])

        answers = self._guard.run(f"unit {unit}", table.num_rows, complete)
        completions = [
            done
            for answer in answers
            for done in _completions(answer, requests[first[answer.start] : first[answer.stop]])
        ]
        seconds = spent_on(table) | {IN_ENGINE: time.monotonic() - begun} | self._usage()
        return with_spent(with_completions(table, completions), seconds)

    def _usage(self) -> dict[str, float]:
        assert self._loop is not None
        usage = self._loop.take_usage()
        return {ENGINE_BUSY: usage.busy_s, ENGINE_IDLE: usage.idle_s}

    def _load(self, engine: EngineConfig | EngineSource, watchdog: Watchdog) -> None:
        try:
            with loading():
                self._loop = EngineLoop(self._builder(engine), watchdog)
        except GlmBatchError as error:
            self._refusal = error
        except Exception as error:  # a process's border: the job's user must see what it was
            if self._guard.is_restart:
                # it has been loaded here before: what is missing may come back
                self._guard.die(error)
            traceback.print_exception(error)
            self._refusal = EngineError(
                f"the model cannot be loaded: {type(error).__name__}: {error}"
            )

    def _builder(self, engine: EngineConfig | EngineSource) -> Callable[[], Engine]:
        if not isinstance(engine, EngineConfig):
            return engine.build_engine
        if needs_ranks(engine):
            return WorkerGroup(engine, self._lose_rank).build_engine
        return partial(build_engine, engine)

    def _complete(self, journal: UnitJournal, requests: Sequence[Request]) -> list[Completion]:
        assert self._loop is not None
        try:
            return journal.complete(self._loop, requests)
        except NoRestartError:
            raise
        except EngineError as error:
            traceback.print_exception(error)
            self._guard.die(error)

    def _end_hanging(self, reason: str) -> None:
        faulthandler.dump_traceback(STDERR, all_threads=True)
        self._guard.die(reason)

    def _lose_rank(self, reason: str) -> None:
        self._guard.die(f"its group of ranks is broken: {reason}")


def _completions(
    answer: Answer[list[Completion]], requests: Sequence[Request]
) -> Iterator[Completion]:
    """The answer's completions; `requests` are those of its rows."""
    if not isinstance(answer.result, RowError):
        yield from answer.result
        return
    for request in requests:
        tokens = len(request.input_ids)
        yield Completion(
            id=request.id, finish_reason="error", prompt_tokens=tokens, error=answer.result
        )


class Journal(Protocol):
    """A durable place for tables of completions, by the number of their unit."""

    @property
    def every_seconds(self) -> float: ...
    def write(self, unit: int, table: pa.Table) -> None: ...
    def read(self, unit: int) -> Sequence[pa.Table]: ...


class UnitJournal:
    """The journal of one unit; without a Journal nothing is kept."""

    def __init__(self, journal: Journal | None, unit: int = 0) -> None:
        self._journal, self._unit = journal, unit
        schema = completion_table([]).schema  # another version's: its rows are computed again
        tables = [each for each in journal.read(unit) if each.schema == schema] if journal else ()
        found = [completion for table in tables for completion in to_completions(table)]
        self._known = {each.id: each for each in found if isinstance(each, Completion)}
        self._unwritten: list[Completion] = []
        self._written_at = time.monotonic()

    def complete(self, loop: EngineLoop, requests: Sequence[Request]) -> list[Completion]:
        """A completion for each request: what an earlier attempt has left, or the loop's."""
        submission = loop.submit([request for request in requests if request.id not in self._known])
        taken = 0
        while not self._wait(submission):
            taken = self._take(submission, taken)
            self._write()
        self._take(submission, taken)
        new = {completion.id: completion for completion in submission.result()}
        return [self._known.get(request.id) or new[request.id] for request in requests]

    def _wait(self, submission: Submission) -> bool:
        """Whether everything is finished; False when it is time to write."""
        if self._journal is None:
            submission.result()
            return True
        due = self._written_at + PROMPTNESS * self._journal.every_seconds
        try:
            submission.result(timeout=max(due - time.monotonic(), 0.0))
        except TimeoutError:
            return False
        return True

    def _take(self, submission: Submission, taken: int) -> int:
        """Takes over what came after the first `taken`; returns how many there are now."""
        finished = submission.finished()
        # An error is not kept: what was in its way may be gone when the row is tried again.
        self._unwritten += [completion for completion in finished[taken:] if not completion.error]
        return len(finished)

    def _write(self) -> None:
        assert self._journal is not None
        if self._unwritten:
            self._journal.write(self._unit, completion_table(self._unwritten))
            self._unwritten = []
        self._written_at = time.monotonic()
