"""Watchdog: notices when loading a model or one step of it takes far longer than it should, and
says so once.

Owns how long is too long: `HangLimits`.
"""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

STDERR = 2
POLLS = 10  # within the shortest limit
MAX_POLL_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HangLimits:
    """Seconds. A step hangs after `step_s`, or after `times` the slowest step so far where that is
    longer.

    The first step warms up libraries and has no other to be compared with. To end a process that
    works costs its rows a repetition, so all of these are far from what is usual.
    """

    loading_s: float = 7200.0
    first_step_s: float = 1800.0
    step_s: float = 300.0
    times: float = 30.0


@dataclass(frozen=True, slots=True)
class _Watched:
    what: str
    begun: float
    limit: float


class Watchdog:
    """Watches one piece of work at a time, from a thread that `close` ends.

    Where the work holds Python's interpreter lock, no thread can run: then a timer outside Python
    writes the stack to stderr and ends the process with exit code 1, within about twice the limit.
    """

    def __init__(
        self,
        limits: HangLimits,
        on_hang: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits, self._on_hang, self._clock = limits, on_hang, clock
        self._slowest: float | None = None
        self._watched: _Watched | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine-watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def watch(self, what: Literal["loading", "step"]) -> Iterator[None]:
        """Watches what is done within. A step's time counts for the limit of those that follow."""
        begun = self._clock()
        self._watched = _Watched(what, begun, self._limit(what))
        try:
            yield
        finally:
            self._watched = None
        if what == "step":
            self._slowest = max(self._slowest or 0.0, self._clock() - begun)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _limit(self, what: str) -> float:
        if what == "loading":
            return self._limits.loading_s
        if self._slowest is None:
            return self._limits.first_step_s
        return max(self._limits.step_s, self._limits.times * self._slowest)

    def _run(self) -> None:
        limits = self._limits
        poll = min(MAX_POLL_S, min(limits.step_s, limits.first_step_s, limits.loading_s) / POLLS)
        closed = False
        while not closed:
            watched = self._watched
            # of what may begin any moment
            limit = watched.limit if watched else self._limit("step")
            faulthandler.dump_traceback_later(limit + POLLS * poll, exit=True, file=STDERR)
            closed = self._closed.wait(poll)
            if (
                watched is self._watched
                and watched
                and self._clock() - watched.begun > watched.limit
            ):
                faulthandler.cancel_dump_traceback_later()
                self._on_hang(self._reason(watched))
                return
        faulthandler.cancel_dump_traceback_later()

    def _reason(self, watched: _Watched) -> str:
        if watched.what == "loading":
            return f"loading the model has taken more than {watched.limit:.0f} s"
        known = (
            "it is the first"
            if self._slowest is None
            else f"the slowest before took {self._slowest:.1f} s"
        )
        return f"a step of the engine hangs: it has taken more than {watched.limit:.1f} s ({known})"
