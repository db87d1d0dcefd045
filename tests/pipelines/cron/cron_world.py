"""Runs of `cron` in one process, without Ray: what the nights of
tests/pipelines/cron/test_cron_nights.py are made of.

The steps, the engine and the commit protocol are those of a real run; only Ray's part, who calls
them, is not. Run as: cron_world.py CHECKPOINT FOLDER does one night in a process that may be
killed.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import glm_batch.pipelines.cron.incremental
from glm_batch.glm_actors.units.model_actor import ModelActor
from glm_batch.glm_actors.units.row_worker import RowWorker
from glm_batch.pipelines.cron.incremental import Choices, Night, run_night
from glm_batch.pipelines.graph.steps import Commit, Order, Parse, Read, Render
from glm_batch.pipelines.job import CommitSection, CronSection, EngineSection, Job, TaskConfig
from glm_batch.pipelines.output.commit import CommitRecord, Output
from glm_batch.pipelines.output.journal import Journal
from glm_batch.pipelines.planning.plan import job_source
from glm_batch.pipelines.runs.pipeline import Prepared, engine_config, prepare
from glm_batch.pipelines.runs.progress import Work
from glm_batch.pipelines.runs.stop import InterruptedRunError
from glm_batch.pipelines.runs.watch import Watch
from glm_batch.pipelines.tasks.rows import UNIT


def make_job(checkpoint: Path, folder: Path, output: str = "out") -> Job:
    return Job(
        model=str(checkpoint),
        input=[str(folder / "in")],
        output=str(folder / output),
        key="id",
        carry=["id", "size"],
        task=TaskConfig(
            kind="choose", prompt="Which shape? {text}", labels=["circle", "square"], gold="gold"
        ),
        engine=EngineSection(kind="echo"),
        commit=CommitSection(unit_rows=4),
        cron=CronSection(keep=2),
    )


@lru_cache(maxsize=1)
def model(checkpoint: str, job: str) -> ModelActor:
    return ModelActor(engine_config(make_job(Path(checkpoint), Path(job))), 1, None, UNIT)


def complete_here(job: Job, prepared: Prepared, output: Output, work: Work, watch: Watch) -> None:
    """What pipelines.runs.pipeline.complete does, unit by unit."""
    plan, spec, source = prepared.plan, prepared.spec, job_source(job)
    journal = Journal(output=output, every_seconds=3600.0)
    begin = RowWorker(lambda: [Read(source), Render(spec)])
    end = RowWorker(lambda: [Parse(spec), Commit(journal, plan.unit_sizes, spec)])
    engine = model(job.model, "")
    earlier = plan.duplicates_by_unit()
    watch.lease.check()
    for unit in work.pending(plan):
        if watch.stop.is_asked:
            break
        order = Order.of(
            unit, plan.files[unit.file].file, earlier.get((unit.file, unit.rows.start), {})
        )
        (record,) = end(engine(begin(order.to_table())))["record"].to_pylist()
        work.add_checked(job, CommitRecord.from_json(record))
    if watch.stop.signum is not None and not work.is_complete:
        raise InterruptedRunError(work.how_far(), watch.stop.signum)


def night(job: Job, **choices: Any) -> Night:
    """A run of cron in this process; pipelines.cron.incremental.complete must be `complete_here`."""
    return run_night(job, Choices(**choices))


def from_scratch(job: Job, output: Path) -> Output:
    """The same input as a job of its own, which knows nothing of other nights."""
    alone = replace(job, output=str(output))
    made = Output.at(alone.output)
    prepared = prepare(alone, made)
    work = Work(None)
    work.resume(prepared.plan, made)
    complete_here(alone, prepared, made, work, _watch())
    made.finish(prepared.plan, prepared.spec.schema, prepared.facts)
    return made


def _watch() -> Watch:
    from types import SimpleNamespace

    from glm_batch.pipelines.runs.stop import Stop

    return Watch(lease=SimpleNamespace(check=lambda: None), stop=Stop())  # type: ignore[arg-type]


if __name__ == "__main__":
    checkpoint, folder = Path(sys.argv[1]), Path(sys.argv[2])
    glm_batch.pipelines.cron.incremental.complete = complete_here
    night(make_job(checkpoint, folder))
