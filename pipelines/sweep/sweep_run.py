"""Runs a sweep's unfinished units, model after model, a model's cells on one set of replicas.

    bundles -> read once, render for each cell (CPU actors) -> infer (model actors) -> parse, commit
    by cell

Each cell has its own output with the ordinary commit protocol, so that a sweep resumes cell by cell
and unit by unit. One lease covers them all.
"""

from __future__ import annotations

import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from glm_batch.glm_actors.faults.spent import IN_ENGINE
from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.cluster.cluster import cluster, job_workers
from glm_batch.pipelines.input.source import Source
from glm_batch.pipelines.job import Job, job_file
from glm_batch.pipelines.metrics.counts import Counts, Phase, Progress
from glm_batch.pipelines.metrics.exporter import Exporter
from glm_batch.pipelines.output.commit import LEASE, CommitRecord, Manifest, Output
from glm_batch.pipelines.output.journal import Journal, tidy
from glm_batch.pipelines.output.lease import own
from glm_batch.pipelines.planning.plan import Plan, job_source, shared_unit_rows
from glm_batch.pipelines.runs.pipeline import Prepared, engine_config, follow, prepare, waves
from glm_batch.pipelines.runs.stop import InterruptedRunError, Stop
from glm_batch.pipelines.runs.watch import Watch
from glm_batch.pipelines.storage.storage import TEMPORARY
from glm_batch.pipelines.sweep.bundles import (
    Bundle,
    BundleJournal,
    CommitBundle,
    build_committer,
    build_renderer,
    make_bundles,
)
from glm_batch.pipelines.sweep.cells import Cell, Sweep
from glm_batch.pipelines.tasks.job_media import reads_media
from glm_batch.pipelines.tasks.prompts import input_columns
from glm_batch.pipelines.tasks.rows import TaskSpec

if TYPE_CHECKING:
    from ray.data import Dataset

    from glm_batch.pipelines.cluster.shares import Workers

OnProgress = Callable[[Progress], None]
CELL_FOLDER = "cells"
OF_JOBS = ("plan.json", "parts", "commits")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A cell whose output is finished."""

    cell: Cell
    output: Output
    manifest: Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """A sweep run to its end: `resumed_rows` were there before; seconds as in counts.Summary."""

    cells: tuple[Finished, ...]
    counts: Counts
    resumed_rows: int
    elapsed_s: float
    working_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Open:
    """A cell that was checked: its output, plan, task, and units that are not committed yet."""

    cell: Cell
    output: Output
    prepared: Prepared
    spec: TaskSpec
    pending: frozenset[int]

    @property
    def plan(self) -> Plan:
        return self.prepared.plan


def run_sweep(
    sweep: Sweep, on_progress: OnProgress | None = None, *, stop: Stop | None = None
) -> Ran:
    """Does what is not committed yet and finishes all outputs. Ray starts if there is work.

    Raises what pipelines.runs.pipeline.run raises; a ConfigError names the cell that it is about.
    """
    tally = _Tally(on_progress)
    tally.tell("planning")
    output = Output.at(sweep.output, sweep.storage)
    _refuse_job(output)
    with output.writable():
        output.store.prepare((LEASE, TEMPORARY, CELL_FOLDER))
    with own(output.store) as lease:
        cells = _opened(sweep, tally)
        watch = Watch(lease=lease, stop=stop or Stop())
        _complete(cells, tally, watch)
        lease.confirm()
        finished = tuple(map(_finished, cells))
    tally.tell("done")
    return tally.ran(finished)


def with_shared_units(cells: Sequence[Cell]) -> list[Cell]:
    """Cells with one `commit.unit_rows` a data set where it is "auto": equal ranges are shared.

    Raises ConfigError for input that cannot be listed.
    """
    found: dict[str, int] = {}
    for name in dict.fromkeys(cell.dataset for cell in cells):
        jobs = [cell.job for cell in cells if cell.dataset == name]
        found[name] = shared_unit_rows(jobs, job_source(jobs[0]).list_files(jobs[0].input))
    return [
        replace(
            cell,
            job=replace(cell.job, commit=replace(cell.job.commit, unit_rows=found[cell.dataset])),
        )
        if cell.job.commit.unit_rows == "auto"
        else cell
        for cell in cells
    ]


def _opened(sweep: Sweep, tally: _Tally) -> list[_Open]:
    """All cells are checked before work on any of them begins."""
    run_id = uuid.uuid4().hex
    found = []
    for cell in with_shared_units(sweep.cells):
        output = Output.at(cell.job.output, cell.job.storage)
        try:
            prepared = prepare(cell.job, output)
        except ConfigError as error:
            raise ConfigError(f"{cell.name}: {error}") from error
        output.take_over(prepared.plan, job_file(cell.job))
        done = {record.unit: record.counts for record in output.records(prepared.plan)}
        tally.expect(prepared.plan, done)
        pending = frozenset(range(prepared.plan.num_units)) - done.keys()
        spec = replace(prepared.spec, run_id=run_id, name=cell.name)
        found.append(_Open(cell=cell, output=output, prepared=prepared, spec=spec, pending=pending))
    return found


def _complete(cells: Sequence[_Open], tally: _Tally, watch: Watch) -> None:
    unfinished = [number for number, each in enumerate(cells) if each.pending]
    if not unfinished:
        return
    tally.tell("starting")
    with cluster():
        for replicas in dict.fromkeys(cells[number].cell.replicas for number in unfinished):
            together = [number for number in unfinished if cells[number].cell.replicas == replicas]
            _run_together(cells, together, tally, watch)
            if watch.stop.is_asked:
                break
    if watch.stop.signum is not None and not tally.is_complete:
        raise InterruptedRunError(tally.how_far(), watch.stop.signum)


def _run_together(
    cells: Sequence[_Open], numbers: Sequence[int], tally: _Tally, watch: Watch
) -> None:
    """The pending units of cells that share their engines."""
    from glm_batch.pipelines.graph import stages

    jobs = [cells[number].cell.job for number in numbers]
    workers = job_workers(next((job for job in jobs if reads_media(job, job.model)), jobs[0]))
    watch.expect(workers.replicas * stages.UNITS_IN_ENGINE * len(numbers))
    bundles = make_bundles(
        [each.cell.dataset for each in cells],
        [each.plan for each in cells],
        [each.pending for each in cells],
        numbers,
    )
    exporter = Exporter(cells[numbers[0]].plan.fingerprint)
    for wave in waves(bundles):
        follow(_graph(cells, numbers, wave, workers), watch, exporter, tally.add)
        if watch.stop.is_asked:
            break


def _graph(
    cells: Sequence[_Open], numbers: Sequence[int], bundles: Sequence[Bundle], workers: Workers
) -> Dataset:
    """The whole graph, as in the diagram above."""
    from glm_batch.pipelines.graph import stages

    specs = [each.spec for each in cells]
    every_seconds = min(cells[number].cell.job.commit.every_seconds for number in numbers)
    journals = {
        number: Journal(output=cells[number].output, every_seconds=every_seconds)
        for number in numbers
    }
    journal = BundleJournal(
        journals=journals,
        cells={each.number: each.cells for each in bundles},
        every_seconds=every_seconds,
    )
    commit = CommitBundle(
        journals, {number: cells[number].plan.unit_sizes for number in numbers}, specs
    )
    ledger = stages.start_ledger(cells[numbers[0]].plan)
    dataset = stages.order_all(bundles, workers)
    render = partial(build_renderer, specs, numbers, _sources(cells, numbers))
    dataset = stages.preprocess(dataset, render, workers, ledger)
    dataset = stages.infer(
        dataset, engine_config(cells[numbers[0]].cell.job), workers, ledger, journal
    )
    return stages.finish(dataset, partial(build_committer, specs, numbers, commit), workers, ledger)


def _sources(cells: Sequence[_Open], numbers: Sequence[int]) -> Mapping[str, Source]:
    """For each data set what reads the columns of all its cells."""
    jobs: dict[str, list[Job]] = {}
    for number in numbers:
        jobs.setdefault(cells[number].cell.dataset, []).append(cells[number].cell.job)
    return {
        name: Source(
            storage=some[0].storage,
            columns=tuple(dict.fromkeys(column for job in some for column in input_columns(job))),
        )
        for name, some in jobs.items()
    }


def _finished(each: _Open) -> Finished:
    manifest = each.output.finish(each.plan, each.spec.schema, each.prepared.facts)
    tidy(each.output)
    return Finished(cell=each.cell, output=each.output, manifest=manifest)


def _refuse_job(output: Output) -> None:
    held = [
        entry.name
        for page in output.store.pages()
        for entry in page
        if os.path.basename(entry.name) in OF_JOBS
    ]
    if held:
        raise ConfigError(
            f"output: {output.place} holds a job's output ({', '.join(held)}); name another place"
        )


class _Tally:
    """Adds up what is committed in all cells, and tells whoever shows it."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self._on_progress = on_progress
        self._begun = time.monotonic()
        self._started: float | None = None
        self._latest = self._begun
        self._spent: Counter[str] = Counter()
        self._resumed = self._counts = Counts()
        self._rows = self._units = self._units_done = 0

    def expect(self, plan: Plan, done: Mapping[int, Counts]) -> None:
        self._rows += plan.num_rows
        self._units += plan.num_units
        self._units_done += len(done)
        for counts in done.values():
            self._resumed += counts
        self._counts = self._resumed

    def add(self, record: CommitRecord) -> None:
        if self._started is None:
            self._started = time.monotonic() - record.spent.get(IN_ENGINE, 0.0)
        self._latest = time.monotonic()
        self._counts += record.counts
        self._spent.update(record.spent)
        self._units_done += 1
        self.tell("running")

    @property
    def is_complete(self) -> bool:
        return self._units_done == self._units

    def how_far(self) -> str:
        return (
            f"stopped with {self._units_done:,} of {self._units:,} units "
            f"({self._counts.rows:,} of {self._rows:,} rows of all cells) committed; "
            "the same command goes on from there"
        )

    def tell(self, phase: Phase) -> None:
        if self._on_progress is None:
            return
        progress = Progress(
            phase=phase,
            units_total=self._units,
            units_done=self._units_done,
            rows_total=self._rows,
            counts=self._counts,
            resumed=self._resumed,
            spent=dict(self._spent),
            elapsed_s=time.monotonic() - self._begun,
            working_s=self._working_s,
        )
        self._on_progress(progress)

    def ran(self, cells: tuple[Finished, ...]) -> Ran:
        return Ran(
            cells=cells,
            counts=self._counts,
            resumed_rows=self._resumed.rows,
            elapsed_s=time.monotonic() - self._begun,
            working_s=self._working_s,
        )

    @property
    def _working_s(self) -> float:
        """Until the latest unit: what comes after it is no engine's time."""
        return self._latest - self._started if self._started is not None else 0.0
