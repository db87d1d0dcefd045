"""Ways for a run to end before its last row, all of them resumable: a signal, or too many failed
rows.

Owns the signal handlers and the grace period. Knows nothing of Ray or of what is being run.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from glm_batch.models.errors import GlmBatchError

GRACE_S = 20.0


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
    """Whether someone asked the run to stop. The first signal asks, the second one ends the process
    at once.

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
        """Takes SIGINT and SIGTERM for the duration of the context; elsewhere than on the main
        thread, nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            signum: signal.signal(signum, self._handle)
            for signum in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Makes SIGTERM what SIGINT is, a KeyboardInterrupt, wherever `listening` does not take it;
        keeps `signum`.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def interrupt(signum: int, frame: FrameType | None) -> None:
            self.ask(signum)
            raise KeyboardInterrupt

        before = {
            signum: signal.signal(signum, interrupt) for signum in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _is_over(self, grace_s: float) -> bool:
        return self._ends_at is not None and time.monotonic() >= self._ends_at + grace_s

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            os._exit(128 + signum)
        self.ask(signum)
        print(
            f"\nstopping: committing what is finished, for {self.grace_s:.0f} s at most; once more ends at once",
            file=sys.stderr,
        )
