"""Processes failed rows again and replaces their records: `glm-batch retry`.

    orders -> a unit's failed rows -> render, infer, parse as ever -> merged with its good rows,
    commit

A unit's good rows are copied, so that its next generation is whole; until its record is created,
the old one counts. Which rows failed is read from the parts by the workers: the driver holds units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from glm_batch.glm_actors.faults.spent import spent_on
from glm_batch.models.errors import EngineError, RowError
from glm_batch.pipelines.graph.steps import Read, committed_table
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.metrics.counts import COMMITTING, READING, Counts, Summary
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.journal import Journal
from glm_batch.pipelines.output.lease import own
from glm_batch.pipelines.output.parts import CommitRecord, part_of
from glm_batch.pipelines.planning.plan import job_source
from glm_batch.pipelines.runs.pipeline import UnitSteps, finish, process
from glm_batch.pipelines.runs.prepared import check_again
from glm_batch.pipelines.runs.watch import OnProgress, Stop, Tally, Watch
from glm_batch.pipelines.tasks.rows import RIGHT, UNIT, TaskSpec, count_rows


def retry_failed(
    job: Job,
    output: Output,
    codes: Sequence[str],
    on_progress: OnProgress | None = None,
    *,
    stop: Stop | None = None,
    app: str | None = None,
) -> Summary:
    """Processes rows that failed, with one of `codes` if any, again; sums up the whole output.

    A finished output gets its manifest anew at the end. With `app`, the replicas of this live
    application do the model's work. Raises ConfigError before anything starts, otherwise as
    pipelines.run does.
    """
    tally = Tally(on_progress)
    tally.tell("planning")
    plan = output.standing_plan()
    with own(output.store) as lease:
        failed = {
            record.unit: record
            for record in output.records(plan)
            if num_failed(record.counts, codes)
        }
        readable = plan.units_of(plan.present)
        touched = {unit: record for unit, record in failed.items() if unit < readable}
        prepared = check_again(job, plan, touched).prepared(plan)
        tally.expect(
            sum(num_failed(record.counts, codes) for record in touched.values()), len(touched)
        )
        units = [unit for unit in plan.units() if unit.index in touched]
        steps = _retry_steps(prepared.spec, output, touched, codes)
        watch = Watch(lease=lease, stop=stop or Stop())
        process(prepared, output, units, tally, watch, steps=steps, app=app)
        if len(output.generations()) == plan.num_units:
            counts = finish(prepared, output, lease).counts
        else:
            counts = sum((record.counts for record in output.records(plan)), Counts())
    tally.tell("done")
    notes = tuple(_notes(failed, touched, codes))
    return replace(tally.summary(output), counts=counts, notes=notes)


def _retry_steps(
    spec: TaskSpec, output: Output, touched: Mapping[int, CommitRecord], codes: Sequence[str]
) -> UnitSteps:
    generations = {unit: record.generation for unit, record in touched.items()}
    every_seconds = spec.job.commit.every_seconds
    journal = Journal(output=output, every_seconds=every_seconds, generations=generations)

    def recomputed(record: CommitRecord) -> Counts:
        """As many rows as were processed again."""
        before = touched[record.unit].counts
        rows, ok = num_failed(before, codes), record.counts.ok - before.ok
        return replace(record.counts, rows=rows, ok=ok)

    return UnitSteps(
        read=ReadFailed(Read(job_source(spec.job)), journal, codes),
        commit=Recommit(journal, spec, codes),
        journal=journal,
        counted=recomputed,
    )


def _notes(
    failed: Mapping[int, CommitRecord], touched: Mapping[int, CommitRecord], codes: Sequence[str]
) -> Iterator[str]:
    if not failed:
        yield f"no row failed{' with ' + ', '.join(codes) if codes else ''}: nothing was left to do"
    if gone := sum(
        num_failed(record.counts, codes) for unit, record in failed.items() if unit not in touched
    ):
        yield f"{gone:,} failed rows are of deleted input files and stay as they are"


def num_failed(counts: Counts, codes: Sequence[str]) -> int:
    """How many rows failed, with one of `codes` if there are any."""
    return sum(rows for code, rows in counts.errors.items() if not codes or code in codes)


def failed_positions(
    part: pa.Table, codes: Sequence[str]
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Where in a part the rows stand that failed, with one of `codes` if there are any."""
    found = pc.equal(part["status"], "error")
    if codes:
        found = pc.and_(found, pc.is_in(part["error_code"], pa.array(codes, pa.string())))
    return np.flatnonzero(found.to_numpy())


def merged(part: pa.Table, again: pa.Table, codes: Sequence[str]) -> pa.Table:
    """The part with its failed rows replaced by `again`, in their order; attempts add up."""
    positions = failed_positions(part, codes)
    if len(positions) != again.num_rows:
        raise RuntimeError(
            f"{again.num_rows} rows came back for {len(positions)} failed ones: Ray split or "
            "merged units"
        )
    attempts = pc.add(again["attempts"], part["attempts"].take(positions))
    again = again.set_column(again.schema.get_field_index("attempts"), "attempts", attempts).select(
        part.column_names
    )
    order = np.arange(part.num_rows)
    order[positions] = part.num_rows + np.arange(len(positions))
    return pa.concat_tables([part, again.cast(part.schema)]).take(order)


@dataclass(frozen=True, slots=True)
class ReadFailed:
    """An order -> those of the unit's rows that failed."""

    read: Read
    journal: Journal
    codes: Sequence[str]
    name: str = READING

    def num_rows(self, table: pa.Table) -> int:
        return self.read.num_rows(table)

    def __call__(
        self, table: pa.Table, start: int, stop: int, lost: RowError | None = None
    ) -> pa.Table:
        (unit,) = table[UNIT].to_pylist()
        record = self.journal.output.known_record(unit, self.journal.generations[unit])
        positions = failed_positions(self.journal.output.read_part(part_of(record)), self.codes)
        here = positions[(positions >= start) & (positions < stop)] - start
        return self.read(table, start, stop, lost).take(here)


@dataclass(frozen=True, slots=True)
class Recommit:
    """A unit's recomputed rows -> `committed_table`, once its next generation is committed."""

    journal: Journal
    spec: TaskSpec
    codes: Sequence[str]
    name: str = COMMITTING

    def num_rows(self, table: pa.Table) -> int:
        return 1  # the unit is committed as a whole

    def __call__(
        self, table: pa.Table, start: int, stop: int, lost: RowError | None = None
    ) -> pa.Table:
        (unit,) = table[UNIT].unique().to_pylist()
        if lost:
            raise EngineError(f"unit {unit} cannot be committed: {lost.message}")
        output, generation = self.journal.output, self.journal.generations[unit]
        before = output.known_record(unit, generation)
        part = output.read_part(part_of(before))
        whole = merged(part, table.select(self.spec.schema.names), self.codes)
        new = count_rows(table)
        failed = part.take(failed_positions(part, self.codes))
        old = count_rows(failed.append_column(RIGHT, pa.nulls(failed.num_rows, pa.bool_())))
        counts = before.counts - replace(old, gold_rows=new.gold_rows) + new
        record = output.commit(unit, whole, counts, generation + 1, spent_on(table))
        self.journal.forget(unit)
        return committed_table(record)
