"""Suspects: which row ends the processes that work on it, found in as few deaths as can be.

Owns the search, the `Ledger` that lives through the deaths of a job's workers, and the `Guard` by
which a worker tells it what it is at. A replica of a live application is searched for by
glm_actors.shared. A death makes all suspect that its process had in flight. A suspect unit is run
with nothing beside it; when it is lost then, the piece that was in flight is cut into smaller ones,
down to single rows. A row that was lost alone twice is the culprit: it gets an error and is never
run again. Every death cuts a piece or counts against a row, so the search ends.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NoReturn, Protocol, TypeVar

from glm_batch.models.errors import EngineError, RowError

log = logging.getLogger(__name__)

DEAD_EXIT_CODE = 70
LAST_WORDS_S = 10.0  # that a dying process waits for the ledger to hear it
NO_WORDS = (
    "it was killed without a word: by SIGKILL, as the kernel does when the machine's memory runs "
    "out, or by native code that ended the process"
)
T = TypeVar("T")
R = TypeVar("R")


class NoRestartError(EngineError):
    """An EngineError that another process of the job would meet, too: the job ends with it."""


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
    """What a starting worker is told: how long to wait first, or why not to start at all."""

    wait_s: float = 0.0
    refusal: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Rows [start, stop) of a suspect unit: to be run by themselves, or a single row with its
    error. `cleared`: they have been finished since a worker last died over them.
    """

    start: int
    stop: int
    error: RowError | None = None
    cleared: bool = False


@dataclass(slots=True)
class _Rows:
    """One piece: how often a worker died over it, and whether it was finished since."""

    deaths: int = 0
    cleared: bool = False
    error: RowError | None = None


class Suspects:
    """The search. `worker` names for people what dies over a row: "process" or "replica"."""

    def __init__(self, patience: Patience, worker: str = "process") -> None:
        self._patience, self._worker = patience, worker
        self._units: dict[str, dict[tuple[int, int], _Rows]] = {}
        self._num_lost = 0

    def pieces(self, unit: str) -> list[Piece] | None:
        """The pieces to run a suspect unit in; None for one that nobody suspects.

        One that has been finished before comes first: it shows that a worker can work at all. Then
        those that have not, in any order, because bad rows may stand side by side.
        """
        if unit not in self._units:
            return None
        pieces = [
            Piece(start=start, stop=stop, error=rows.error, cleared=rows.cleared)
            for (start, stop), rows in self._units[unit].items()
        ]
        random.Random(f"{unit} {self._num_lost}").shuffle(pieces)
        pieces.sort(key=lambda piece: piece.cleared)
        return pieces[-1:] + pieces[:-1] if pieces[-1].cleared else pieces

    def lose(self, unit: str, start: int, stop: int, reason: str, *, alone: bool) -> None:
        """Rows [start, stop) were in flight at a death, `alone` or beside others."""
        self._num_lost += 1
        pieces = self._units.setdefault(unit, {(start, stop): _Rows()})
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
                f"the {self._worker} that worked on this row died {rows.deaths} times while it had "
                f"nothing else of the job to do; the last time: {reason}. The other rows went on "
                "without it: make it smaller or leave it out",
            )
            log.warning("%s row %d is recorded as an error: %s", unit, start, rows.error)

    def clear(self, unit: str, start: int, stop: int) -> None:
        """A piece is finished."""
        rows = self._units.get(unit, {}).get((start, stop))
        if rows:
            rows.cleared = True

    def forget(self, unit: str) -> None:
        """A unit is answered. Its culprits stay known: its answers may be lost and asked again."""
        if not any(rows.error for rows in self._units.get(unit, {}).values()):
            self._units.pop(unit, None)


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
        self._suspects = Suspects(patience)

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
            "worker %s has died, %d times by now, %d since it last finished anything: %s. In "
            "flight: %s. Starts again "
            "in %.1f s", name, worker.deaths, worker.barren, reason, where, arrival.wait_s,
        )  # fmt: skip
        for unit, start, stop in in_flight:
            self.lose(stop - start)
            self._suspects.lose(unit, start, stop, reason, alone=len(in_flight) == 1)
        return arrival

    def begin(self, name: str, unit: str, num_rows: int) -> list[Piece] | None:
        """A worker takes up a unit: in flight as a whole (None), or suspect: see `enter`."""
        pieces = self._suspects.pieces(unit)
        if pieces is None:
            self._worker(name).in_flight.add((unit, 0, num_rows))
        return pieces

    def enter(self, name: str, unit: str, start: int, stop: int) -> None:
        """A worker is about to run a piece of a suspect unit, and nothing beside it."""
        self._worker(name).in_flight.add((unit, start, stop))

    def leave(self, name: str, unit: str, start: int, stop: int) -> None:
        """A worker has finished rows that it had in flight."""
        worker = self._worker(name)
        worker.in_flight.discard((unit, start, stop))
        worker.barren = 0
        self._suspects.clear(unit, start, stop)

    def finish(self, unit: str) -> None:
        """A suspect unit is answered."""
        self._suspects.forget(unit)

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
                refusal=f"its process died {worker.barren} times in a row and finished "
                "nothing in between; the last "
                f"time: {reason}"
            )
        if worker.barren < 2:
            return Arrival()
        wait = self._patience.backoff_s * 2.0 ** (worker.barren - 2)
        return Arrival(wait_s=min(wait, self._patience.max_backoff_s))


class Book(Protocol):
    """A Ledger, here or elsewhere, for one worker."""

    @property
    def is_restart(self) -> bool: ...
    def arrive(self) -> Arrival: ...
    def begin(self, unit: str, num_rows: int) -> list[Piece] | None: ...
    def enter(self, unit: str, start: int, stop: int) -> None: ...
    def leave(self, unit: str, start: int, stop: int, *, wait: bool) -> None: ...
    def finish(self, unit: str) -> None: ...
    def say(self, last_words: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """What became of rows [start, stop): the work's result, or a culprit's error."""

    start: int
    stop: int
    result: T | RowError


class Run(Protocol):
    """Runs work over rows under guard: see Guard.run."""

    def __call__(
        self, unit: str, num_rows: int, work: Callable[[int, int], T]
    ) -> list[Answer[T]]: ...


class Guard:
    """Arrives at the ledger when it is built, which may wait. `refusal`: why not to start."""

    def __init__(self, book: Book | None, what: str) -> None:
        """`what` names the worker for people; without a book work is just done."""
        self._book, self._what = book, what
        self._turns = _Turns()
        self.is_restart = book is not None and book.is_restart
        arrival = book.arrive() if book else Arrival()
        self.refusal = EngineError(f"{what}: {arrival.refusal}") if arrival.refusal else None
        if not self.refusal:
            time.sleep(arrival.wait_s)

    def run(self, unit: str, num_rows: int, work: Callable[[int, int], T]) -> list[Answer[T]]:
        """Runs `work(start, stop)` over a unit's rows, at once or in pieces; answers in order."""
        if not num_rows:
            return [Answer(0, 0, work(0, 0))]

        def at_once() -> list[Answer[T]]:
            return [Answer(0, num_rows, work(0, num_rows))]

        return self._guarded(
            unit, num_rows, at_once, lambda pieces: self._in_pieces(unit, pieces, work)
        )

    def run_steps(self, unit: str, whole: Callable[[], R], careful: Callable[[Run], R]) -> R:
        """Runs `whole()`, or `careful` if the unit is suspect; that gets `run` for its steps."""
        return self._guarded(unit, 1, whole, lambda _: careful(self._run_alone))

    def _guarded(
        self, unit: str, num_rows: int, whole: Callable[[], R], suspect: Callable[[list[Piece]], R]
    ) -> R:
        book = self._book
        if book is None:
            return whole()
        with self._turns.beside_others():
            pieces = book.begin(unit, num_rows)
            if pieces is None:
                result = whole()
                book.leave(unit, 0, num_rows, wait=False)
                return result
        with self._turns.alone():
            result = suspect(pieces)
            book.finish(unit)
            return result

    def _run_alone(
        self, unit: str, num_rows: int, work: Callable[[int, int], T]
    ) -> list[Answer[T]]:
        """A step of a suspect unit, which may not be suspect itself."""
        assert self._book is not None
        pieces = self._book.begin(unit, num_rows)
        if pieces is None:
            result = work(0, num_rows)
            self._book.leave(unit, 0, num_rows, wait=True)
            return [Answer(0, num_rows, result)]
        answers = self._in_pieces(unit, pieces, work)
        self._book.finish(unit)
        return answers

    def _in_pieces(
        self, unit: str, pieces: list[Piece], work: Callable[[int, int], T]
    ) -> list[Answer[T]]:
        answers = [self._run_piece(unit, piece, work) for piece in pieces]
        return sorted(answers, key=lambda answer: answer.start)

    def die(self, error: BaseException | str) -> NoReturn:
        """Ends this process so that it is started again, and its units are retried there.

        An exception would send the retry to the same process, and ray.actor.exit_actor is not
        retried at all.
        """
        reason = (
            str(error)
            if isinstance(error, str | EngineError)
            else f"{type(error).__name__}: {error}"
        )
        print(
            f"{self._what}: its process ends and will be started again: {reason}",
            file=sys.stderr,
            flush=True,
        )
        if self._book:
            # On a thread of its own: whatever state this process is in, it must end.
            speaking = threading.Thread(target=self._book.say, args=(reason,), daemon=True)
            speaking.start()
            speaking.join(LAST_WORDS_S)
        os._exit(DEAD_EXIT_CODE)

    def _run_piece(self, unit: str, piece: Piece, work: Callable[[int, int], T]) -> Answer[T]:
        if piece.error:
            return Answer(piece.start, piece.stop, piece.error)
        assert self._book is not None
        self._book.enter(unit, piece.start, piece.stop)
        result = work(piece.start, piece.stop)
        self._book.leave(unit, piece.start, piece.stop, wait=True)
        return Answer(piece.start, piece.stop, result)


class RayBook:
    """The Book of this Ray actor in a Ledger that is an actor too."""

    def __init__(self, ledger: Any) -> None:
        import ray

        context = ray.get_runtime_context()
        self._ledger, self._get = ledger, ray.get
        self._name: str = context.get_actor_id() or "driver"
        self.is_restart = bool(context.was_current_actor_reconstructed)
        self._crash = _CrashFile(self._name)

    def arrive(self) -> Arrival:
        arrived = self._ledger.arrive.remote(self._name, self._crash.former)
        # A ledger that is only just starting has nothing to tell to a first process.
        return self._get(arrived) if self.is_restart else Arrival()

    def begin(self, unit: str, num_rows: int) -> list[Piece] | None:
        return self._get(self._ledger.begin.remote(self._name, unit, num_rows))  # type: ignore[no-any-return]

    def enter(self, unit: str, start: int, stop: int) -> None:
        self._get(self._ledger.enter.remote(self._name, unit, start, stop))

    def leave(self, unit: str, start: int, stop: int, *, wait: bool) -> None:
        left = self._ledger.leave.remote(self._name, unit, start, stop)
        if wait:
            self._get(left)

    def finish(self, unit: str) -> None:
        self._ledger.finish.remote(unit)

    def say(self, last_words: str) -> None:
        self._get(self._ledger.say.remote(self._name, last_words))


class _CrashFile:
    """Where Python writes what a fatal signal was, for the process that comes after."""

    def __init__(self, name: str) -> None:
        self.former: str | None = None
        try:
            log = Path(os.readlink("/proc/self/fd/2"))
        except OSError:  # no such thing on this system: a crash then leaves no words
            return
        if not log.is_file():
            return
        path = log.parent / f"crash-{name}.txt"
        if path.exists():
            text = path.read_text(errors="replace")
            print(text, file=sys.stderr, flush=True)
            self.former = text.partition("\n")[0].strip() or None
        self._file = path.open("w")
        faulthandler.enable(self._file)


class _Turns:
    """Many beside each other, or one alone, who goes before those that come later."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = self._waiting = 0

    @contextmanager
    def beside_others(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._running >= 0 and not self._waiting)
            self._running += 1
        try:
            yield
        finally:
            self._end(1)

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: self._running == 0)
            self._waiting -= 1
            self._running = -1
        try:
            yield
        finally:
            self._end(-1)

    def _end(self, count: int) -> None:
        with self._changed:
            self._running -= count
            self._changed.notify_all()
