"""Guard: what a worker process tells the ledger before and after its work, and how it runs units
that are suspect.

Owns the turns of the process's threads: units that nobody suspects run side by side, a suspect one
runs with nothing beside it. Knows nothing of tables, engines or how a ledger decides.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, Protocol, TypeVar

from glm_batch.glm_actors.faults.suspects import Arrival, Piece
from glm_batch.models.errors import EngineError, RowError

DEAD_EXIT_CODE = 70
LAST_WORDS_S = 10.0  # that a dying process waits for the ledger to hear it
T = TypeVar("T")
R = TypeVar("R")


class Book(Protocol):
    """A glm_actors.faults.suspects.Ledger, here or elsewhere, for one worker."""

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
    """What became of rows [start, stop): the work's result, or the error of a single row that must
    not be run.
    """

    start: int
    stop: int
    result: T | RowError


class Run(Protocol):
    """Runs work over rows under guard: see Guard.run."""

    def __call__(
        self, unit: str, num_rows: int, work: Callable[[int, int], T]
    ) -> list[Answer[T]]: ...


class Guard:
    """Arrives at the ledger when it is built: that may wait. `refusal` is why this process should
    not start at all.
    """

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
        """Runs `work(start, stop)` over all rows of a unit, at once or in pieces; answers in the
        rows' order.
        """
        if not num_rows:
            return [Answer(0, 0, work(0, 0))]

        def at_once() -> list[Answer[T]]:
            return [Answer(0, num_rows, work(0, num_rows))]

        return self._guarded(
            unit, num_rows, at_once, lambda pieces: self._in_pieces(unit, pieces, work)
        )

    def run_steps(self, unit: str, whole: Callable[[], R], careful: Callable[[Run], R]) -> R:
        """Runs `whole()`; but `careful` if the unit is suspect, which runs each step by what it is
        given, as `run`.
        """
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
    """Where Python writes what a fatal signal was, beside the worker's log, for the process that
    comes after.
    """

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
    """Many beside each other, or one alone. Whoever waits to be alone goes before those that come
    later.
    """

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
