"""Processes failed rows again and replaces their records: `glm-batch retry`.

    orders -> a unit's failed rows -> render, infer, parse as ever -> merged with its good rows,
    commit

A unit's good rows are copied, so that its next generation is whole; until its record is created,
the old one counts. Which rows failed is read from the parts by the workers: the driver holds units.
Owns nothing of how rows are processed.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from glm_batch.glm_actors.faults.spent import spent
from glm_batch.models.checkpoint.config_reader import load_config
from glm_batch.models.errors import ConfigError, EngineError, RowError
from glm_batch.pipelines.calibration.calibration import planned_scaling
from glm_batch.pipelines.cluster.cluster import cluster, job_workers
from glm_batch.pipelines.graph.steps import Read, committed_table
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.metrics.bottleneck import COMMITTING, READING
from glm_batch.pipelines.metrics.counts import Counts, Summary
from glm_batch.pipelines.metrics.exporter import Exporter
from glm_batch.pipelines.output.commit import CommitRecord, Output, part_of
from glm_batch.pipelines.output.journal import Journal, tidy
from glm_batch.pipelines.output.lease import Lease, own
from glm_batch.pipelines.planning.plan import Plan, differences, identify, job_source
from glm_batch.pipelines.runs.pipeline import committed, engine_of, finish, follow, job_facts, waves
from glm_batch.pipelines.runs.progress import OnProgress, Work
from glm_batch.pipelines.runs.stop import InterruptedRunError, Stop
from glm_batch.pipelines.runs.watch import Watch
from glm_batch.pipelines.tasks.rows import RIGHT, UNIT, TaskSpec, count_rows
from glm_batch.pipelines.tasks.schema import output_schema


def retry_failed(
    job: Job,
    output: Output,
    codes: Sequence[str],
    on_progress: OnProgress | None = None,
    *,
    stop: Stop | None = None,
    app: str | None = None,
) -> Summary:
    """Recomputes the failed rows of all committed units, or those with one of `codes`; sums up the
    whole output.

    A finished output gets its manifest anew at the end. With `app`, the replicas of this live
    application do the model's work. Raises ConfigError before anything starts, otherwise as
    pipelines.run does.
    """
    work = Work(on_progress)
    work.tell("planning")
    plan = output.standing_plan()
    with own(output.store) as lease:
        failed = {
            record.unit: record
            for record in output.records(plan)
            if num_failed(record.counts, codes)
        }
        readable = plan.units_of(plan.present)
        touched = {unit: record for unit, record in failed.items() if unit < readable}
        spec, facts = _checked(job, plan, touched)
        if touched:
            work.expect(
                sum(num_failed(record.counts, codes) for record in touched.values()), len(touched)
            )
            work.tell("starting")
            _process(
                spec,
                plan,
                output,
                touched,
                codes,
                work,
                Watch(lease=lease, stop=stop or Stop()),
                app,
            )
        counts = _finish(output, plan, spec, facts, lease)
    work.tell("done")
    return replace(work.summary(output), counts=counts, notes=tuple(_notes(failed, touched, codes)))


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
            f"{again.num_rows} rows came back for {len(positions)} failed ones: Ray split or merged units"
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
    """Output columns of a unit's failed rows -> `committed_table`, once its next generation is
    committed.
    """

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
        record = output.commit(unit, whole, counts, generation + 1, spent(table))
        self.journal.forget(unit)
        return committed_table(record)


def _checked(
    job: Job, plan: Plan, touched: Mapping[int, CommitRecord]
) -> tuple[TaskSpec, dict[str, object]]:
    """What travels to the workers, and what goes into the manifest. Raises ConfigError when the job
    is another now.
    """
    model_dir = os.path.abspath(job.model)
    identity = identify(job, [planned.file for planned in plan.files], model_dir)
    source = job_source(job)
    for number in {unit.file for unit in plan.units() if unit.index in touched}:
        planned = plan.files[number].file
        (now,) = source.list_files([planned.path])
        identity["input"][planned.name] = {"size": now.size, "modified": now.stamp}
    if identity != plan.identity:
        lines = "\n  ".join(differences(plan.identity, identity))
        raise ConfigError(
            f"this is another job now; undo the difference (there -> now):\n  {lines}"
        )
    config = load_config(model_dir)
    schema = output_schema(job, config, {name: plan.schema.field(name).type for name in job.carry})
    run_id = f"{plan.fingerprint}-{uuid.uuid4().hex[:8]}"
    scaling = planned_scaling(plan.identity["task"], job.task.labels or config.id2label)
    spec = TaskSpec(job=job, model_dir=model_dir, schema=schema, run_id=run_id, scaling=scaling)
    return spec, job_facts(job, model_dir)


def _process(
    spec: TaskSpec,
    plan: Plan,
    output: Output,
    touched: Mapping[int, CommitRecord],
    codes: Sequence[str],
    work: Work,
    watch: Watch,
    app: str | None,
) -> None:
    generations = {unit: record.generation for unit, record in touched.items()}
    journal = Journal(
        output=output, every_seconds=spec.job.commit.every_seconds, generations=generations
    )
    units = [unit for unit in plan.units() if unit.index in touched]
    with cluster(found=app is not None):
        from glm_batch.pipelines.graph import stages

        engine = engine_of(spec.job, app)
        workers = job_workers(spec.job, beside_app=app is not None)
        watch.expect(workers.replicas * stages.UNITS_IN_ENGINE)
        exporter = Exporter(plan.fingerprint)
        read = ReadFailed(Read(job_source(spec.job)), journal, codes)
        for wave in waves(units):
            dataset = committed(
                plan, wave, read, spec, workers, journal, Recommit(journal, spec, codes), engine
            )
            follow(
                dataset,
                watch,
                exporter,
                lambda record: work.add(_recomputed(touched, record, codes), record.spent),
            )
            if watch.stop.is_asked:
                break
    if watch.stop.signum is not None and not work.is_complete:
        raise InterruptedRunError(work.how_far(), watch.stop.signum)


def _recomputed(
    touched: Mapping[int, CommitRecord], record: CommitRecord, codes: Sequence[str]
) -> Counts:
    """What to show of a unit: as many rows as were processed again."""
    before = touched[record.unit].counts
    return replace(record.counts, rows=num_failed(before, codes), ok=record.counts.ok - before.ok)


def _finish(
    output: Output, plan: Plan, spec: TaskSpec, facts: dict[str, object], lease: Lease
) -> Counts:
    """Counts of the whole output; its manifest is written anew if it is complete."""
    records: Iterator[CommitRecord] = output.records(plan)
    counts = Counts()
    for record in records:
        counts += record.counts
    if counts.rows == plan.num_rows:
        lease.confirm()
        finish(spec.job, output, plan, spec.schema, facts)
        tidy(output)
    return counts
