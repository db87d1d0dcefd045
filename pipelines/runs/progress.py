"""Adds up what a run commits, tells it to whoever shows it, and says when too many rows have
failed.

Knows nothing of how rows are processed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping

from glm_batch.glm_actors.faults.spent import IN_ENGINE
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.metrics.counts import Counts, Phase, Progress, Summary
from glm_batch.pipelines.output.commit import CommitRecord, Output
from glm_batch.pipelines.planning.plan import Plan, Unit
from glm_batch.pipelines.runs.stop import TooManyErrorsError

OnProgress = Callable[[Progress], None]


class Work:
    """Adds up what is committed, and reports it."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self._on_progress = on_progress
        self._begun = time.monotonic()
        self._started: float | None = None
        self._done: set[int] = set()
        self._resumed = self._counts = Counts()
        self._spent: Counter[str] = Counter()
        self._num_rows = self._num_units = self._units_done = 0

    def tell(self, phase: Phase) -> None:
        if self._on_progress is None:
            return
        now = time.monotonic()
        self._on_progress(
            Progress(
                phase=phase,
                units_total=self._num_units,
                units_done=self._units_done,
                rows_total=self._num_rows,
                counts=self._counts,
                resumed=self._resumed,
                spent=dict(self._spent),
                elapsed_s=now - self._begun,
                working_s=now - self._started if self._started is not None else 0.0,
            )
        )

    def resume(self, plan: Plan, output: Output) -> None:
        """Counts what earlier runs have committed."""
        self._num_rows, self._num_units = plan.num_rows, plan.num_units
        for record in output.records(plan):
            self._done.add(record.unit)
            self._resumed += record.counts
        self._counts, self._units_done = self._resumed, len(self._done)

    def expect(self, num_rows: int, num_units: int) -> None:
        """Counts these rows and units only, which are to be processed again."""
        self._num_rows, self._num_units = num_rows, num_units

    def pending(self, plan: Plan) -> list[Unit]:
        return [unit for unit in plan.units() if unit.index not in self._done]

    @property
    def is_complete(self) -> bool:
        return self._units_done == self._num_units

    @property
    def units_left(self) -> int:
        return self._num_units - self._units_done

    @property
    def new_units(self) -> int:
        """Units that this run has committed, beside those that `resume` found."""
        return self._units_done - len(self._done)

    @property
    def new_rows(self) -> int:
        return self._counts.rows - self._resumed.rows

    def how_far(self) -> str:
        return (
            f"stopped with {self._units_done:,} of {self._num_units:,} units ({self._counts.rows:,} of "
            f"{self._num_rows:,} rows) committed; the same command goes on from there"
        )

    def add(self, counts: Counts, spent: Mapping[str, float]) -> None:
        """Counts a unit. The first one to come says when the engine began to work: what was before
        is start-up.
        """
        if self._started is None:
            self._started = time.monotonic() - spent.get(IN_ENGINE, 0.0)
        self._counts += counts
        self._spent.update(spent)
        self._units_done += 1
        self.tell("running")

    def add_checked(self, job: Job, record: CommitRecord) -> None:
        self.add(record.counts, record.spent)
        self.refuse_errors(job)

    def refuse_errors(self, job: Job) -> None:
        """Raises TooManyErrorsError under `fail_fast`, as soon as more rows failed than may fail of
        all of them.
        """
        if (
            job.fail_fast
            and self._counts.error_rows > job.max_error_rate * self._num_rows
            and not self.is_complete
        ):
            codes = ", ".join(f"{code} {rows:,}" for code, rows in self._counts.errors.items())
            raise TooManyErrorsError(
                f"{self._counts.error_rows:,} rows failed ({codes}), and max_error_rate allows "
                f"{job.max_error_rate:.2%} of {self._num_rows:,}: {self.how_far()} without fail_fast"
            )

    def summary(self, output: Output) -> Summary:
        now = time.monotonic()
        return Summary(
            output=output.place,
            counts=self._counts,
            resumed_rows=self._resumed.rows,
            spent=dict(self._spent),
            elapsed_s=now - self._begun,
            working_s=now - self._started if self._started is not None else 0.0,
        )
