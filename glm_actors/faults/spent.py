"""What a unit's time went into: seconds by what was done, in a column that travels with its rows.

A worker's seconds, not the clock's: several workers and units run side by side.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import pyarrow as pa

SPENT = "#spent"  # column: a map, the same in every row
# What is timed, beside the names of the steps. Seconds in the engine, from a unit's submission to
# its last completion, are shared with other units; those that the engine was busy or idle are all
# units' since the last one was finished.
IN_ENGINE, ENGINE_BUSY, ENGINE_IDLE = "in engine", "engine busy", "engine idle"
MEDIA = "media"

SECONDS = pa.map_(pa.string(), pa.float64())

_running: ContextVar[Stopwatch | None] = ContextVar("stopwatch", default=None)


class Stopwatch:
    """`seconds` by what was timed. Each second counts once, for the innermost name."""

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        self.seconds: Counter[str] = Counter(seconds or {})
        self._inner = 0.0

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Times what happens in the context, with what is `timed` on the same thread."""
        token = _running.set(self)
        outer, self._inner = self._inner, 0.0
        begun = time.monotonic()
        try:
            yield
        finally:
            took = time.monotonic() - begun
            self.seconds[what] += took - self._inner  # type: ignore[assignment]  # as above
            self._inner = outer + took
            _running.reset(token)


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Counts the time under a name of its own, if anybody times what goes on here."""
    stopwatch = _running.get()
    if stopwatch is None:
        yield
        return
    with stopwatch.on(what):
        yield


def spent_on(table: pa.Table) -> dict[str, float]:
    """A unit's seconds so far; none where nothing was timed."""
    if SPENT not in table.column_names or not table.num_rows:
        return {}
    return dict(table[SPENT][0].as_py())


def with_spent(table: pa.Table, seconds: Mapping[str, float]) -> pa.Table:
    """The table with these seconds in place of those that it has."""
    rounded = [(what, round(value, 4)) for what, value in seconds.items()]
    # One value for all rows: a dictionary costs an index each.
    column = pa.DictionaryArray.from_arrays(
        pa.repeat(pa.scalar(0, pa.int8()), table.num_rows), pa.array([rounded], SECONDS)
    )
    without = table.drop_columns([SPENT]) if SPENT in table.column_names else table
    return without.append_column(SPENT, column)
