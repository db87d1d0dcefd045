"""What a run tells of itself while it works, and what ends it before its last row: a lost lease, a
signal, the time, too many failed rows. All of these can be resumed.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

from glm_batch.glm_actors.faults.spent import IN_ENGINE
from glm_batch.models.errors import GlmBatchError
from glm_batch.pipelines.metrics.counts import Counts, Phase, Progress, Summary
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.lease import Lease
from glm_batch.pipelines.planning.plan import Plan, Unit

GRACE_S = 20.0
LOOK_S = 0.25

OnProgress = Callable[[Progress], None]
T = TypeVar("T")


class InterruptedRunError(GlmBatchError):
    """A signal ended the run after what was finished had been committed. `signum` is its number."""

    def __init__(self, message: str, signum: int = signal.SIGINT) -> None:
        super().__init__(message, signum)
        self.signum = signum

    def __str__(self) -> str:
        return str(self.args[0])


class TooManyErrorsError(GlmBatchError):
    """`fail_fast` ended the run: more rows failed than max_error_rate allows."""


class Stop:
    """Whether someone asked the run to stop. A second signal ends the process at once.

    With `seconds`, the time asks, too, once they are over.
    """

    def __init__(self, grace_s: float = GRACE_S, seconds: float | None = None) -> None:
        self.grace_s = grace_s
        self._ends_at = None if seconds is None else time.monotonic() + seconds
        self.signum: int | None = None
        self._asked_at = 0.0

    def ask(self, signum: int) -> None:
        self.signum, self._asked_at = signum, time.monotonic()

    @property
    def is_asked(self) -> bool:
        return self.signum is not None or self._is_over(0.0)

    @property
    def is_due(self) -> bool:
        """Whether the grace period is over."""
        if self.signum is None:
            return self._is_over(self.grace_s)
        return time.monotonic() - self._asked_at >= self.grace_s

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes SIGINT and SIGTERM meanwhile; nothing on another than the main thread."""
        with _handling(self._handle):
            yield

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Makes SIGTERM a KeyboardInterrupt, too, where `listening` does not take it."""

        def interrupt(signum: int, frame: FrameType | None) -> None:
            self.ask(signum)
            raise KeyboardInterrupt

        with _handling(interrupt):
            yield

    def _is_over(self, grace_s: float) -> bool:
        return self._ends_at is not None and time.monotonic() >= self._ends_at + grace_s

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            os._exit(128 + signum)
        self.ask(signum)
        print(
            f"\nstopping: committing what is finished, for {self.grace_s:.0f} s at most; once more "
            "ends at once",
            file=sys.stderr,
        )


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, handler) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler_before in before.items():
            signal.signal(signum, handler_before)


@dataclass(slots=True, kw_only=True)
class Watch:
    """Ends a run: when the lease is lost, or on a signal once the engines' units are committed."""

    lease: Lease
    stop: Stop
    _in_work: int = 0
    _done: int = 0
    _done_before: int | None = None

    def expect(self, in_work: int) -> None:
        """Says how many units may be in the engines at a time."""
        self._in_work = in_work

    def count(self) -> None:
        self._done += 1

    def is_over(self) -> bool:
        """Raises LeaseLostError."""
        self.lease.check()
        if not self.stop.is_asked:
            return False
        if self._done_before is None:
            self._done_before = self._done
        return self.stop.is_due or self._done - self._done_before >= self._in_work


def watched(items: Iterable[T], is_over: Callable[[], bool]) -> Iterator[T]:
    """Gives the items as they come from a thread of their own, until `is_over` says so.

    `is_over` is asked at least every LOOK_S seconds and after every item. What it raises, and what
    the items raise, comes out here.
    """
    results: queue.SimpleQueue[tuple[str, T | BaseException | None]] = queue.SimpleQueue()
    abandoned = threading.Event()

    def work() -> None:
        try:
            for item in items:
                results.put(("item", item))
                if abandoned.is_set():
                    return
            results.put(("end", None))
        except BaseException as error:  # of another thread: raised again where it is waited for
            results.put(("error", error))

    threading.Thread(target=work, name="records", daemon=True).start()
    try:
        while not is_over():
            try:
                kind, value = results.get(timeout=LOOK_S)
            except queue.Empty:
                continue
            if kind == "end":
                return
            if isinstance(value, BaseException):
                raise value
            yield value  # type: ignore[misc]  # an item, by its kind
    finally:
        abandoned.set()


class Tally:
    """Adds up what is committed of one output or several, and tells it.

    With `most_errors`, more failed rows than this fraction of all end the run. `whose` follows the
    word "rows" where a run that ended early says how far it came.
    """

    def __init__(
        self, on_progress: OnProgress | None, most_errors: float | None = None, whose: str = ""
    ) -> None:
        self._on_progress, self._most_errors, self._whose = on_progress, most_errors, whose
        self._begun = time.monotonic()
        self._started: float | None = None
        self._latest = self._begun
        self._resumed = self.counts = Counts()
        self._spent: Counter[str] = Counter()
        self._num_rows = self._num_units = self._units_done = self._units_resumed = 0

    def resume(self, plan: Plan, output: Output) -> list[Unit]:
        """Counts what earlier runs have committed; gives the units that are left."""
        done = set()
        for record in output.records(plan):
            done.add(record.unit)
            self._resumed += record.counts
        self.expect(plan.num_rows, plan.num_units)
        self.counts = self._resumed
        self._units_resumed += len(done)
        self._units_done = self._units_resumed
        return [unit for unit in plan.units() if unit.index not in done]

    def expect(self, num_rows: int, num_units: int) -> None:
        """Counts on so many more, committed or not."""
        self._num_rows += num_rows
        self._num_units += num_units

    def add(self, counts: Counts, spent: Mapping[str, float]) -> None:
        """Counts a unit. The first one to come says when the engine began to work: what was before
        is start-up. Raises TooManyErrorsError.
        """
        self._latest = time.monotonic()
        if self._started is None:
            self._started = self._latest - spent.get(IN_ENGINE, 0.0)
        self.counts += counts
        self._spent.update(spent)
        self._units_done += 1
        self.tell("running")
        self.refuse_errors()

    def refuse_errors(self) -> None:
        """Raises TooManyErrorsError as soon as more rows failed than may fail of all of them."""
        failed, most = self.counts.error_rows, self._most_errors
        if most is None or failed <= most * self._num_rows or self.is_complete:
            return
        codes = ", ".join(f"{code} {rows:,}" for code, rows in self.counts.errors.items())
        raise TooManyErrorsError(
            f"{failed:,} rows failed ({codes}), and max_error_rate allows {most:.2%} of "
            f"{self._num_rows:,}: {self._how_far()} without fail_fast"
        )

    def refuse_signal(self, stop: Stop) -> None:
        """Raises InterruptedRunError where a signal ended the run early."""
        if stop.signum is not None and not self.is_complete:
            raise InterruptedRunError(self._how_far(), stop.signum)

    def tell(self, phase: Phase) -> None:
        if self._on_progress is None:
            return
        self._on_progress(
            Progress(
                phase=phase,
                units_total=self._num_units,
                units_done=self._units_done,
                rows_total=self._num_rows,
                counts=self.counts,
                resumed=self._resumed,
                spent=dict(self._spent),
                elapsed_s=time.monotonic() - self._begun,
                working_s=self._working_s,
            )
        )

    def summary(self, output: Output) -> Summary:
        return Summary(
            output=output.place,
            counts=self.counts,
            resumed_rows=self._resumed.rows,
            spent=dict(self._spent),
            elapsed_s=time.monotonic() - self._begun,
            working_s=self._working_s,
        )

    @property
    def is_complete(self) -> bool:
        return self._units_done == self._num_units

    @property
    def units_left(self) -> int:
        return self._num_units - self._units_done

    @property
    def new_units(self) -> int:
        """Units that this run has committed, beside those that `resume` found."""
        return self._units_done - self._units_resumed

    @property
    def new_rows(self) -> int:
        return self.counts.rows - self._resumed.rows

    @property
    def _working_s(self) -> float:
        """Until the latest unit: what comes after it is no engine's time."""
        return self._latest - self._started if self._started is not None else 0.0

    def _how_far(self) -> str:
        return (
            f"stopped with {self._units_done:,} of {self._num_units:,} units "
            f"({self.counts.rows:,} of {self._num_rows:,} rows{self._whose}) committed; the same "
            "command goes on from there"
        )
