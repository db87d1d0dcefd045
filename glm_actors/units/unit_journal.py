"""Puts aside what an engine has finished of a unit while the rest of the unit is still at work.

Owns which completions are kept and found again; where they are kept is the Journal's business.
Knows nothing of Ray.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import pyarrow as pa

from glm_batch.glm_actors.engines.engine_loop import EngineLoop, Submission
from glm_batch.glm_actors.units.batches import completion_table, to_completions
from glm_batch.models.engine.api.request import Completion, Request

PROMPTNESS = 0.8  # of the time within which things must be durable: writing takes some, too


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
        tables = journal.read(unit) if journal else ()
        found = [completion for table in tables for completion in to_completions(table)]
        self._known = {each.id: each for each in found if isinstance(each, Completion)}
        self._unwritten: list[Completion] = []
        self._written_at = time.monotonic()

    def complete(self, loop: EngineLoop, requests: Sequence[Request]) -> list[Completion]:
        """One completion for each request: those that an earlier attempt has left, and the loop's
        for the rest.
        """
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
