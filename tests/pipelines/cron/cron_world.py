"""Runs of `cron` in one process, without Ray: what the nights of
tests/pipelines/cron/test_cron_nights.py are made of.

The steps, the engine and the commit protocol are those of a real run; only Ray's part, who calls
them, is not. Run as: cron_world.py CHECKPOINT FOLDER does one night in a process that may be
killed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import glm_batch.pipelines.cron.incremental
from glm_batch.glm_actors.units.model_actor import ModelActor
from glm_batch.glm_actors.units.row_worker import RowWorker
from glm_batch.pipelines.cron.incremental import Choices, Night, run_night
from glm_batch.pipelines.graph.steps import build_parser, build_renderer, committed_records, orders
from glm_batch.pipelines.job import CommitSection, CronSection, EngineSection, Job, TaskConfig
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.manifest import write_manifest
from glm_batch.pipelines.planning.plan import Unit
from glm_batch.pipelines.runs.pipeline import UnitSteps, engine_config, unit_steps
from glm_batch.pipelines.runs.prepared import Prepared, prepare
from glm_batch.pipelines.runs.watch import Stop, Tally, Watch
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


def process_here(
    prepared: Prepared,
    output: Output,
    units: Sequence[Unit],
    tally: Tally,
    watch: Watch,
    *,
    steps: UnitSteps | None = None,
    app: str | None = None,
) -> None:
    """What pipelines.runs.pipeline.process does, unit by unit."""
    spec, steps = prepared.spec, steps or unit_steps(prepared, output)
    begin = RowWorker(lambda: build_renderer(steps.read, spec))
    end = RowWorker(lambda: build_parser(spec, steps.commit))
    engine = model(spec.job.model, "")
    watch.lease.check()
    for order in orders(prepared.plan, units):
        if watch.stop.is_asked:
            break
        (committed,) = committed_records(end(engine(begin(order.to_table()))))
        tally.add(steps.counted(committed), committed.spent)
    tally.refuse_signal(watch.stop)


def night(job: Job, **choices: Any) -> Night:
    """A run of cron in this process; pipelines.cron.incremental.process must be `process_here`."""
    return run_night(job, Choices(**choices))


def from_scratch(job: Job, output: Path) -> Output:
    """The same input as a job of its own, which knows nothing of other nights."""
    alone = replace(job, output=str(output))
    made = Output.at(alone.output)
    prepared = prepare(alone, made)
    tally = Tally(None)
    process_here(prepared, made, tally.resume(prepared.plan, made), tally, _watch())
    write_manifest(made, prepared.plan, prepared.spec.schema, prepared.facts)
    return made


def _watch() -> Watch:
    from types import SimpleNamespace

    return Watch(lease=SimpleNamespace(check=lambda: None), stop=Stop())  # type: ignore[arg-type]


if __name__ == "__main__":
    checkpoint, folder = Path(sys.argv[1]), Path(sys.argv[2])
    glm_batch.pipelines.cron.incremental.process = process_here
    night(make_job(checkpoint, folder))
