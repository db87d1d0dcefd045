"""The input rows behind an output's rows, where they are still there and unchanged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa

from glm_batch.models.errors import ConfigError, RowError
from glm_batch.pipelines.input.source import Source
from glm_batch.pipelines.input.values import Row, column_values
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.planning.plan import Plan, Unit
from glm_batch.pipelines.storage.storage import StorageError

Place = tuple[int, int]  # unit, row in it


class InputRows:
    """Reads an output's input. `problems` says, once for each file, why it cannot be read."""

    def __init__(self, job: Job, plan: Plan) -> None:
        self._job, self.plan = job, plan
        self.problems: dict[int, str] = {}
        self._checked: set[int] = set()

    def golds(self, unit: Unit, part: pa.Table) -> list[Any] | None:
        """A unit's gold answers, None for a row without one; None where they cannot be had.

        Where the input is gone, the carried column stands in for it if there is one.
        """
        gold = self._job.task.gold
        if gold is None:
            return None
        rows = self.read(unit, (gold,))
        if rows is not None:
            return [None if isinstance(row, RowError) else row.get(gold) for row in rows]
        return column_values(part[gold]) if gold in part.column_names else None

    def read(self, unit: Unit, columns: Sequence[str]) -> list[Row | RowError] | None:
        """A unit's rows with these columns; None where the file cannot be read any more."""
        if not self.is_readable(unit.file):
            return None
        source = Source(storage=self._job.storage, columns=tuple(columns))
        try:
            return source.read_rows(self.plan.files[unit.file].file, unit.rows)
        except (ConfigError, StorageError, OSError) as error:
            self.problems[unit.file] = str(error)
            return None

    def some(self, places: Iterable[Place], columns: Sequence[str]) -> dict[Place, Row | RowError]:
        """The rows at these places, unit by unit; those that cannot be read are left out."""
        wanted: dict[int, list[int]] = defaultdict(list)
        for unit, row in places:
            wanted[unit].append(row)
        found: dict[Place, Row | RowError] = {}
        for number in sorted(wanted):
            rows = self.read(self._units[number], columns)
            if rows is not None:
                found |= {(number, row): rows[row] for row in wanted[number]}
        return found

    @cached_property
    def _units(self) -> list[Unit]:
        return list(self.plan.units())

    def is_readable(self, number: int) -> bool:
        """Whether a file (its number in the plan) is what the job read; else `problems` tells."""
        if number not in self._checked:
            self._checked.add(number)
            planned = self.plan.files[number].file
            try:
                now = Source(storage=self._job.storage, columns=()).list_files([planned.path])
                if [(each.size, each.stamp) for each in now] != [(planned.size, planned.stamp)]:
                    self.problems[number] = f"{planned.name} has changed since the job read it"
            except (ConfigError, OSError) as error:
                self.problems[number] = str(error)
        return number not in self.problems
