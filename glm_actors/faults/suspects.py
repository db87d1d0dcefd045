"""Ledger: which rows each worker process was at when it died, and what follows from that.

Lives in a process of its own, which outlasts the workers. A death makes all that its process had in
flight suspect. A suspect unit is run with nothing beside it; when its process dies then, the piece
that was in flight is cut into smaller ones, down to single rows. A row that was in flight alone at
two deaths is the culprit: it gets an error and is never run again. Every death cuts a piece or
counts against a row, so the search ends. Knows nothing of Ray, of tables and of what the work is.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass, field

from glm_batch.models.errors import RowError

log = logging.getLogger(__name__)

NO_WORDS = (
    "it was killed without a word: by SIGKILL, as the kernel does when the machine's memory runs out, or by native "
    "code that ended the process"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How often what is tried again.

    `row_deaths` of a row alone make it the culprit. `barren_deaths` of a worker in a row, nothing
    finished between them, mean that the worker is broken. `pieces` is into how many a suspect piece
    is cut. From the second barren death on a worker waits before it starts, `backoff_s` at first
    and twice as long each time.
    """

    row_deaths: int = 2
    barren_deaths: int = 6
    pieces: int = 32
    backoff_s: float = 0.5
    max_backoff_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """What a starting worker is told: how long to wait first, and why not to start at all, if it
    should not.
    """

    wait_s: float = 0.0
    refusal: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Rows [start, stop) of a suspect unit: to be run by themselves, or a single row with its
    error.
    """

    start: int
    stop: int
    error: RowError | None = None


@dataclass(slots=True)
class _Rows:
    """One piece in the ledger: how often a worker died over it, and whether it has been finished
    since.
    """

    deaths: int = 0
    cleared: bool = False
    error: RowError | None = None


@dataclass(slots=True)
class _Worker:
    in_flight: set[tuple[str, int, int]] = field(default_factory=set)
    deaths: int = 0
    barren: int = 0
    last_words: str | None = None


class Ledger:
    """What workers tell of themselves. A worker keeps its name when it is started again."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._workers: dict[str, _Worker] = {}
        self._suspects: dict[str, dict[tuple[int, int], _Rows]] = {}

    def arrive(self, name: str, last_words: str | None = None) -> Arrival:
        """A worker starts. If it is known it has died; `last_words` is what it has left behind."""
        if name not in self._workers:
            self._workers[name] = _Worker()
            return Arrival()
        worker = self._workers[name]
        worker.deaths += 1
        worker.barren += 1
        reason = worker.last_words or last_words or NO_WORDS
        worker.last_words = None
        in_flight, worker.in_flight = sorted(worker.in_flight), set()
        arrival = self._arrival(worker, reason)
        where = (
            ", ".join(f"{unit} rows {start} to {stop - 1}" for unit, start, stop in in_flight)
            or "nothing"
        )
        log.warning(
            "worker %s has died, %d times by now, %d since it last finished anything: %s. In flight: %s. Starts again "
            "in %.1f s", name, worker.deaths, worker.barren, reason, where, arrival.wait_s,
        )  # fmt: skip
        for unit, start, stop in in_flight:
            self.lose(stop - start)
            self._suspect(unit, start, stop, reason, alone=len(in_flight) == 1)
        return arrival

    def begin(self, name: str, unit: str, num_rows: int) -> list[Piece] | None:
        """A worker takes up a unit. None: all of it is in flight from now on; else it is suspect:
        see `enter`.

        A suspect unit comes in the pieces to run it in, those first that have not been finished, in
        any order: where a few of many are bad, the worker soon shows with another that it can work
        at all.
        """
        if unit not in self._suspects:
            self._worker(name).in_flight.add((unit, 0, num_rows))
            return None
        pieces = list(self._suspects[unit].items())
        random.Random(f"{unit} {self._worker(name).deaths}").shuffle(pieces)
        pieces.sort(key=lambda piece: piece[1].cleared)
        return [Piece(start=start, stop=stop, error=rows.error) for (start, stop), rows in pieces]

    def enter(self, name: str, unit: str, start: int, stop: int) -> None:
        """A worker is about to run a piece of a suspect unit, and nothing beside it."""
        self._worker(name).in_flight.add((unit, start, stop))

    def leave(self, name: str, unit: str, start: int, stop: int) -> None:
        """A worker has finished rows that it had in flight."""
        worker = self._worker(name)
        worker.in_flight.discard((unit, start, stop))
        worker.barren = 0
        rows = self._suspects.get(unit, {}).get((start, stop))
        if rows:
            rows.cleared = True

    def finish(self, unit: str) -> None:
        """A suspect unit is answered. Its culprits stay known, in case its answers are lost and
        asked for again.
        """
        if not any(rows.error for rows in self._suspects.get(unit, {}).values()):
            self._suspects.pop(unit, None)

    def say(self, name: str, last_words: str) -> None:
        """A worker is about to end its own process, and why."""
        self._worker(name).last_words = last_words

    def lose(self, num_rows: int) -> None:
        """Rows were in work when their process died. For a subclass that counts them."""

    def _worker(self, name: str) -> _Worker:
        return self._workers.setdefault(name, _Worker())

    def _arrival(self, worker: _Worker, reason: str) -> Arrival:
        if worker.barren >= self._patience.barren_deaths:
            return Arrival(
                refusal=f"its process died {worker.barren} times in a row and finished nothing in between; the last "
                f"time: {reason}"
            )
        if worker.barren < 2:
            return Arrival()
        wait = self._patience.backoff_s * 2.0 ** (worker.barren - 2)
        return Arrival(wait_s=min(wait, self._patience.max_backoff_s))

    def _suspect(self, unit: str, start: int, stop: int, reason: str, *, alone: bool) -> None:
        pieces = self._suspects.setdefault(unit, {(start, stop): _Rows()})
        if not alone or (start, stop) not in pieces:
            return
        if stop - start > 1:
            del pieces[start, stop]
            size = -(-(stop - start) // self._patience.pieces)
            pieces |= {
                (first, min(first + size, stop)): _Rows() for first in range(start, stop, size)
            }
            return
        rows = pieces[start, stop]
        rows.deaths += 1
        rows.cleared = False
        if rows.deaths >= self._patience.row_deaths:
            rows.error = RowError(
                "worker_died",
                f"the process that worked on this row died {rows.deaths} times while it had nothing else to do; the "
                f"last time: {reason}. The other rows went on without it: make it smaller or leave it out",
            )
            log.warning("%s row %d is recorded as an error: %s", unit, start, rows.error)
