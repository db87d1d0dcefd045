"""Preprocessor: rows in, requests out, on CPU workers.

Runs as the callable class of a Ray Data stage. What is to be done comes as a function that builds the work on the
worker, so that only a description travels. Knows nothing of tasks, prompts or files.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import pyarrow as pa

from glm_actors.guard import Answer, Guard, RayBook
from models.errors import GlmBatchError, RowError


class Transform(Protocol):
    """A function of tables."""

    def __call__(self, table: pa.Table, lost: RowError | None = None) -> pa.Table:
        """One row out for each row in. With `lost` it is the error of every row, and none of them is looked at."""
        ...


class Preprocessor:
    """Builds its transform once, when the worker starts, and applies it to each unit's table.

    `ledger` and `unit_column`: see glm_actors.model.ModelActor.
    """

    def __init__(self, build: Callable[[], Transform], ledger: Any = None, unit_column: str | None = None) -> None:
        self._unit_column = unit_column
        self._guard = Guard(RayBook(ledger) if ledger is not None else None, "a preprocessing worker")
        if self._guard.refusal:
            raise self._guard.refusal
        self._transform = build()

    def __call__(self, table: pa.Table) -> pa.Table:
        unit = table[self._unit_column][0].as_py() if self._unit_column and table.num_rows else ""

        def transform(start: int, stop: int) -> pa.Table:
            return self._isolated(table.slice(start, stop - start))

        answers = self._guard.run(f"rows of unit {unit}", table.num_rows, transform)
        pieces = [self._piece(table, answer) for answer in answers]
        return _joined(pieces)

    def _isolated(self, table: pa.Table) -> pa.Table:
        """The transform's result, with an error for each row at which it raises what it should not.

        Where it raises at every row it is not the rows: then the first exception stands.
        """
        try:
            return self._transform(table)
        except GlmBatchError:
            raise
        except Exception as error:  # a stage's border: one row's surprise must not end the job
            rows = [self._alone(table.slice(row, 1)) for row in range(table.num_rows)]
            if table.num_rows > 1 and not any(survived for survived, _ in rows):
                raise
            traceback.print_exception(error)
            return _joined([piece for _, piece in rows])

    def _alone(self, row: pa.Table) -> tuple[bool, pa.Table]:
        try:
            return True, self._transform(row)
        except GlmBatchError:
            raise
        except Exception as error:  # as above
            message = f"preparing this row raised {type(error).__name__}: {error}; the worker's log has the traceback"
            return False, self._transform(row, lost=RowError("internal_error", message))

    def _piece(self, table: pa.Table, answer: Answer[pa.Table]) -> pa.Table:
        if isinstance(answer.result, RowError):
            return self._transform(table.slice(answer.start, answer.stop - answer.start), lost=answer.result)
        return answer.result


def _joined(pieces: Sequence[pa.Table]) -> pa.Table:
    return pieces[0] if len(pieces) == 1 else pa.concat_tables(pieces).unify_dictionaries()
