"""Waits for what a run gives, and looks around for reasons to end it: a lost lease, a signal.

Knows nothing of Ray or of what is being run.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from glm_batch.pipelines.output.lease import Lease
from glm_batch.pipelines.runs.stop import Stop

LOOK_S = 0.25

T = TypeVar("T")


def watched(items: Iterable[T], is_over: Callable[[], bool]) -> Iterator[T]:
    """Gives the items as they come, from a thread of their own; ends when they do, or as soon as
    `is_over` says so.

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


@dataclass(slots=True, kw_only=True)
class Watch:
    """Reasons to end a run early: a lost lease, and a signal once what the engines were at is
    committed.
    """

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
