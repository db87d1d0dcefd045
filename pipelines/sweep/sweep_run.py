"""Runs a sweep's unfinished units, model after model, a model's cells on one set of replicas.

    bundles -> read once, render for each cell (CPU actors) -> infer (model actors) -> parse, commit
    by cell

Each cell has its own output with the ordinary commit protocol, so that a sweep resumes cell by cell
and unit by unit. One lease covers them all.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.cluster.cluster import cluster, job_workers
from glm_batch.pipelines.input.source import Source
from glm_batch.pipelines.job import Job, job_file
from glm_batch.pipelines.metrics.counts import Summary
from glm_batch.pipelines.metrics.exporter import Exporter
from glm_batch.pipelines.output.commit import LEASE, Output
from glm_batch.pipelines.output.journal import Journal
from glm_batch.pipelines.output.lease import own
from glm_batch.pipelines.output.manifest import Manifest
from glm_batch.pipelines.planning.plan import Plan, shared_unit_rows
from glm_batch.pipelines.runs.pipeline import engine_config, finish, run_graphs
from glm_batch.pipelines.runs.prepared import Checked, Prepared, check, prepare
from glm_batch.pipelines.runs.watch import OnProgress, Stop, Tally, Watch
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
    """A sweep that was run to its end."""

    cells: tuple[Finished, ...]
    summary: Summary


@dataclass(frozen=True, slots=True, kw_only=True)
class _Open:
    """A cell that was checked: its output, plan, task, and units that are not committed yet."""

    cell: Cell
    output: Output
    prepared: Prepared
    pending: frozenset[int]

    @property
    def plan(self) -> Plan:
        return self.prepared.plan

    @property
    def spec(self) -> TaskSpec:
        return self.prepared.spec


def run_sweep(
    sweep: Sweep,
    on_progress: OnProgress | None = None,
    *,
    checked: Sequence[Checked] | None = None,
    stop: Stop | None = None,
) -> Ran:
    """Does what is not committed yet and finishes all outputs. Ray starts if there is work. Cells
    that were `checked`, in their order, are not read again.

    Raises what pipelines.runs.pipeline.run raises; a ConfigError names the cell that it is about.
    """
    tally = Tally(on_progress, whose=" of all cells")
    tally.tell("planning")
    output = Output.at(sweep.output, sweep.storage)
    _refuse_job(output)
    with output.writable():
        output.store.prepare((LEASE, TEMPORARY, CELL_FOLDER))
    with own(output.store) as lease:
        cells = _opened(sweep.cells, checked or [_check(cell) for cell in sweep.cells], tally)
        _process(cells, tally, Watch(lease=lease, stop=stop or Stop()))
        finished = tuple(
            Finished(
                cell=each.cell,
                output=each.output,
                manifest=finish(each.prepared, each.output, lease),
            )
            for each in cells
        )
    tally.tell("done")
    return Ran(cells=finished, summary=tally.summary(output))


def with_shared_units(cells: Sequence[Cell], checked: Sequence[Checked]) -> list[Cell]:
    """Cells with one `commit.unit_rows` a data set where it is "auto": equal ranges are shared."""
    found: dict[str, int] = {}
    for cell, each in zip(cells, checked, strict=True):
        if cell.dataset not in found:
            jobs = [other.job for other in cells if other.dataset == cell.dataset]
            found[cell.dataset] = shared_unit_rows(jobs, each.survey)
    return [
        replace(
            cell,
            job=replace(cell.job, commit=replace(cell.job.commit, unit_rows=found[cell.dataset])),
        )
        if cell.job.commit.unit_rows == "auto"
        else cell
        for cell in cells
    ]


def _check(cell: Cell) -> Checked:
    try:
        return check(cell.job)
    except ConfigError as error:
        raise ConfigError(f"{cell.name}: {error}") from error


def _opened(cells: Sequence[Cell], checked: Sequence[Checked], tally: Tally) -> list[_Open]:
    """All cells are checked before work on any of them begins."""
    run_id = uuid.uuid4().hex
    found = []
    for cell, each in zip(with_shared_units(cells, checked), checked, strict=True):
        output = Output.at(cell.job.output, cell.job.storage)
        try:
            prepared = prepare(replace(each, job=cell.job), output)
        except ConfigError as error:
            raise ConfigError(f"{cell.name}: {error}") from error
        output.take_over(prepared.plan, job_file(cell.job))
        spec = replace(prepared.spec, run_id=run_id, name=cell.name)
        pending = frozenset(unit.index for unit in tally.resume(prepared.plan, output))
        prepared = replace(prepared, spec=spec)
        found.append(_Open(cell=cell, output=output, prepared=prepared, pending=pending))
    return found


def _process(cells: Sequence[_Open], tally: Tally, watch: Watch) -> None:
    unfinished = [number for number, each in enumerate(cells) if each.pending]
    if not unfinished:
        return
    tally.tell("starting")
    with cluster():
        for replicas in dict.fromkeys(cells[number].cell.replicas for number in unfinished):
            together = [number for number in unfinished if cells[number].cell.replicas == replicas]
            _process_together(cells, together, tally, watch)
            if watch.stop.is_asked:
                break
    tally.refuse_signal(watch.stop)


def _process_together(
    cells: Sequence[_Open], numbers: Sequence[int], tally: Tally, watch: Watch
) -> None:
    """The pending units of cells that share their engines: the whole graph, as in the diagram
    above.
    """
    from glm_batch.pipelines.graph import stages

    some = [cells[number] for number in numbers]
    jobs, specs = [each.cell.job for each in some], [each.spec for each in cells]
    workers = job_workers(next((job for job in jobs if reads_media(job, job.model)), jobs[0]))
    every_seconds = min(job.commit.every_seconds for job in jobs)
    journals = {
        number: Journal(output=cells[number].output, every_seconds=every_seconds)
        for number in numbers
    }
    commit = CommitBundle(
        journals, {number: cells[number].plan.unit_sizes for number in numbers}, specs
    )
    render = partial(build_renderer, specs, numbers, _sources(cells, numbers))
    parse = partial(build_committer, specs, numbers, commit)

    def graph(bundles: Sequence[Bundle]) -> Dataset:
        journal = BundleJournal(
            journals=journals,
            cells={each.number: each.cells for each in bundles},
            every_seconds=every_seconds,
        )
        ledger = stages.start_ledger(some[0].plan)
        return stages.unit_graph(
            bundles, render, engine_config(jobs[0]), parse, workers, ledger, journal
        )

    bundles = make_bundles(
        [each.cell.dataset for each in cells],
        [each.plan for each in cells],
        [each.pending for each in cells],
        numbers,
    )
    watch.expect(workers.replicas * stages.UNITS_IN_ENGINE * len(numbers))
    exporter = Exporter(some[0].plan.fingerprint)
    run_graphs(
        graph, bundles, watch, exporter, lambda record: tally.add(record.counts, record.spent)
    )


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
