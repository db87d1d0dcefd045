"""Processes failed rows again and replaces their records: `glm-batch retry`.

    source -> a unit's failed rows -> render, infer, parse as ever -> merged with its good rows -> commit

A unit's good rows are copied, so that its next generation is whole; until its record is created, the old one counts.
Which rows failed is read from the parts by the workers: the driver holds units. Owns nothing of how rows are processed.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from glm_actors.model import SECONDS
from models.config_reader import load_config
from models.errors import ConfigError
from pipelines.cluster import cluster, job_workers
from pipelines.commit import CommitRecord, Output, part_of
from pipelines.job import Job
from pipelines.journal import Journal, tidy
from pipelines.lease import Lease, own
from pipelines.metrics import Counts, Summary
from pipelines.pipeline import answered, follow, waves
from pipelines.plan import Plan, Unit, differences, identify, job_source
from pipelines.progress import OnProgress, Work
from pipelines.rows import RIGHT, UNIT, TaskSpec, count_rows, task_runner
from pipelines.schema import output_schema
from pipelines.stop import InterruptedRunError, Stop
from pipelines.tasks import TaskRunner
from pipelines.watch import Watch

if TYPE_CHECKING:
    from ray.data import Dataset

    from pipelines.stages import Workers


def retry_failed(
    job: Job, output: Output, codes: Sequence[str], on_progress: OnProgress | None = None, *, stop: Stop | None = None
) -> Summary:
    """Recomputes the failed rows of all committed units, or those with one of `codes`; sums up the whole output.

    A finished output gets its manifest anew at the end. Raises ConfigError before anything starts, otherwise as
    pipelines.run does.
    """
    work = Work(on_progress)
    work.tell("planning")
    plan = output.standing_plan()
    with own(output.store) as lease:
        touched = {record.unit: record for record in output.records(plan) if num_failed(record.counts, codes)}
        spec, facts = _checked(job, plan, touched)
        if touched:
            work.expect(sum(num_failed(record.counts, codes) for record in touched.values()), len(touched))
            work.tell("starting")
            _process(spec, plan, output, touched, codes, work, Watch(lease=lease, stop=stop or Stop()))
        counts = _finish(output, plan, spec, facts, lease)
    work.tell("done")
    note = "" if touched else f"no row failed{' with ' + ', '.join(codes) if codes else ''}: nothing was left to do"
    return replace(work.summary(output), counts=counts, notes=(note,) if note else ())


def num_failed(counts: Counts, codes: Sequence[str]) -> int:
    """How many rows failed, with one of `codes` if there are any."""
    return sum(rows for code, rows in counts.errors.items() if not codes or code in codes)


def failed_positions(part: pa.Table, codes: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
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
    again = again.set_column(again.schema.get_field_index("attempts"), "attempts", attempts).select(part.column_names)
    order = np.arange(part.num_rows)
    order[positions] = part.num_rows + np.arange(len(positions))
    return pa.concat_tables([part, again.cast(part.schema)]).take(order)


class Recommitter:
    """Commits the next generation of units on a worker. The journal knows which one each unit has now."""

    def __init__(self, journal: Journal, spec: TaskSpec, codes: Sequence[str]) -> None:
        self._journal, self._output, self._codes = journal, journal.output, codes
        self._names = spec.schema.names
        task_runner(spec)  # for the parsing that Ray fuses into this process

    def __call__(self, table: pa.Table) -> pa.Table:
        (unit,) = table[UNIT].unique().to_pylist()
        generation = self._journal.generations[unit]
        before = self._output.known_record(unit, generation)
        part = self._output.read_part(part_of(before))
        whole = merged(part, table.select(self._names), self._codes)
        new = count_rows(table)
        failed = part.take(failed_positions(part, self._codes))
        old = count_rows(failed.append_column(RIGHT, pa.nulls(failed.num_rows, pa.bool_())))
        counts = before.counts - replace(old, gold_rows=new.gold_rows) + new
        record = self._output.commit(unit, whole, counts, generation + 1)
        self._journal.forget(unit)
        return pa.table({"record": [record.to_json().decode()], "seconds": [table[SECONDS][0].as_py()]})


def select_failed(output: Output, generations: Mapping[int, int], codes: Sequence[str], table: pa.Table) -> pa.Table:
    """Of a unit as it was read, the rows that failed."""
    (unit,) = table[UNIT].unique().to_pylist()
    part = output.read_part(part_of(output.known_record(unit, generations[unit])))
    return table.take(failed_positions(part, codes))


def _checked(job: Job, plan: Plan, touched: Mapping[int, CommitRecord]) -> tuple[TaskSpec, dict[str, object]]:
    """What travels to the workers, and what goes into the manifest. Raises ConfigError when the job is another now."""
    model_dir = os.path.abspath(job.model)
    identity = identify(job, [planned.file for planned in plan.files], model_dir)
    source = job_source(job)
    for number in {unit.file for unit in plan.units() if unit.index in touched}:
        planned = plan.files[number].file
        (now,) = source.list_files([planned.path])
        identity["input"][planned.name] = {"size": now.size, "modified": now.stamp}
    if identity != plan.identity:
        lines = "\n  ".join(differences(plan.identity, identity))
        raise ConfigError(f"this is another job now; undo the difference (there -> now):\n  {lines}")
    schema = output_schema(job, load_config(model_dir), {name: plan.schema.field(name).type for name in job.carry})
    run_id = f"{plan.fingerprint}-{uuid.uuid4().hex[:8]}"
    spec = TaskSpec(job=job, model_dir=model_dir, schema=schema, run_id=run_id)
    return spec, TaskRunner(job, model_dir).facts


def _process(
    spec: TaskSpec,
    plan: Plan,
    output: Output,
    touched: Mapping[int, CommitRecord],
    codes: Sequence[str],
    work: Work,
    watch: Watch,
) -> None:
    generations = {unit: record.generation for unit, record in touched.items()}
    journal = Journal(output=output, every_seconds=spec.job.commit.every_seconds, generations=generations)
    units = [unit for unit in plan.units() if unit.index in touched]
    with cluster():
        from pipelines import stages

        workers = job_workers(spec.job)
        watch.expect(workers.replicas * stages.UNITS_IN_ENGINE)
        for wave in waves(units):
            dataset = _graph(spec, plan, wave, journal, codes, workers)
            follow(dataset, watch, lambda record, seconds: work.add(_recomputed(touched, record, codes), seconds))
            if watch.stop.is_asked:
                break
    if watch.stop.signum is not None and not work.is_complete:
        raise InterruptedRunError(work.how_far(), watch.stop.signum)


def _graph(
    spec: TaskSpec, plan: Plan, units: Sequence[Unit], journal: Journal, codes: Sequence[str], workers: Workers
) -> Dataset:
    from ray.data import ActorPoolStrategy

    from pipelines import stages

    dataset = stages.read(job_source(spec.job), plan, units, workers)
    select = partial(select_failed, journal.output, journal.generations, codes)
    dataset = dataset.map_batches(select, batch_size=None, batch_format="pyarrow", num_cpus=workers.cpus_each)
    return answered(dataset, spec, workers, journal).map_batches(
        Recommitter,
        fn_constructor_args=(journal, spec, codes),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=workers.committers),
        num_cpus=workers.cpus_each,
    )


def _recomputed(touched: Mapping[int, CommitRecord], record: CommitRecord, codes: Sequence[str]) -> Counts:
    """What to show of a unit: as many rows as were processed again."""
    before = touched[record.unit].counts
    return replace(record.counts, rows=num_failed(before, codes), ok=record.counts.ok - before.ok)


def _finish(output: Output, plan: Plan, spec: TaskSpec, facts: dict[str, object], lease: Lease) -> Counts:
    """Counts of the whole output; its manifest is written anew if it is complete."""
    records: Iterator[CommitRecord] = output.records(plan)
    counts = Counts()
    for record in records:
        counts += record.counts
    if counts.rows == plan.num_rows:
        lease.confirm()
        output.finish(plan, spec.schema, facts)
        tidy(output)
    return counts
