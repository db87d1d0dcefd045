"""RowWorker: a unit's table in, its table after some steps out, on CPU workers.

Runs as the callable class of a Ray Data stage. The steps come as a function that builds them on the
worker, so that only a description travels. A row that raises, or ends the process, costs that row.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import pyarrow as pa

from glm_batch.glm_actors.faults.spent import Stopwatch, spent_on, with_spent
from glm_batch.glm_actors.faults.startup import loading
from glm_batch.glm_actors.faults.suspects import Guard, RayBook, Run
from glm_batch.models.errors import GlmBatchError, RowError


class Step(Protocol):
    """A pass over a unit's rows. `name` says for people what is done to them: "reading"."""

    @property
    def name(self) -> str: ...

    def num_rows(self, table: pa.Table) -> int:
        """How many rows there are to pass over."""
        ...

    def __call__(
        self, table: pa.Table, start: int, stop: int, lost: RowError | None = None
    ) -> pa.Table:
        """What becomes of rows [start, stop); with `lost`, none is looked at and all have it."""
        ...


class RowWorker:
    """Builds its steps once, when the worker starts, and takes each unit through them.

    `ledger` and `unit_column`: see glm_actors.units.model_actor.ModelActor.
    """

    what = "a worker"  # for people; Ray names processes after the class

    def __init__(
        self,
        build: Callable[[], Sequence[Step]],
        ledger: Any = None,
        unit_column: str | None = None,
    ) -> None:
        self._unit_column = unit_column
        self._guard = Guard(RayBook(ledger) if ledger is not None else None, self.what)
        with loading():
            self._steps = build() if not self._guard.refusal else ()

    def __call__(self, table: pa.Table) -> pa.Table:
        # raised here, because Ray would wrap it in the constructor into an actor's death
        if self._guard.refusal:
            raise self._guard.refusal
        unit = table[self._unit_column][0].as_py() if self._unit_column and table.num_rows else ""
        return self._guard.run_steps(
            f"unit {unit}", partial(self._whole, table), partial(self._careful, unit, table)
        )

    def _whole(self, table: pa.Table) -> pa.Table:
        return self._timed(
            table, lambda step, table: _isolated(step, table, 0, step.num_rows(table))
        )

    def _careful(self, unit: object, table: pa.Table, run: Run) -> pa.Table:
        def over(step: Step, table: pa.Table) -> pa.Table:
            answers = run(
                f"{step.name} of unit {unit}", step.num_rows(table), partial(_isolated, step, table)
            )
            return _joined(
                [
                    step(table, answer.start, answer.stop, answer.result)
                    if isinstance(answer.result, RowError)
                    else answer.result
                    for answer in answers
                ]
            )

        return self._timed(table, over)

    def _timed(self, table: pa.Table, over: Callable[[Step, pa.Table], pa.Table]) -> pa.Table:
        stopwatch = Stopwatch(spent_on(table))
        for step in self._steps:
            with stopwatch.on(step.name):
                table = over(step, table)
            table = with_spent(table, stopwatch.seconds)
        return table


def _isolated(step: Step, table: pa.Table, start: int, stop: int) -> pa.Table:
    """The step's result, with an error for each row at which it raises what it should not.

    Where it raises at every row it is not the rows: then the first exception stands.
    """
    try:
        return step(table, start, stop)
    except GlmBatchError:
        raise
    except Exception as error:  # a stage's border: one row's surprise must not end the job
        rows = [_alone(step, table, row) for row in range(start, stop)]
        if len(rows) > 1 and not any(survived for survived, _ in rows):
            raise
        traceback.print_exception(error)
        return _joined([piece for _, piece in rows])


def _alone(step: Step, table: pa.Table, row: int) -> tuple[bool, pa.Table]:
    try:
        return True, step(table, row, row + 1)
    except GlmBatchError:
        raise
    except Exception as error:  # as above
        raised = f"{step.name} this row raised {type(error).__name__}: {error}"
        message = f"{raised}; the worker's log has the traceback"
        return False, step(table, row, row + 1, RowError("internal_error", message))


def _joined(pieces: Sequence[pa.Table]) -> pa.Table:
    """The pieces as one table; a piece without an image or video lacks the columns for them."""
    if len(pieces) == 1:
        return pieces[0]
    return pa.concat_tables(pieces, promote_options="default")
