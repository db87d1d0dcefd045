"""The pipeline on one screen: a job's rows from its input files to committed parts.

    orders -> read, render, tokenize (CPU actors) -> infer (model actors) -> parse, commit (CPU
    actors)

`run` does the whole job and can be called again after any crash; `build_dataset` gives the labelled
rows as a Ray Dataset instead. `process` and `finish` are those of every run: retry, cron and the
cells of a sweep differ in which units they work on, and in how a unit is read and committed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from glm_batch.glm_actors.ray_private import end_execution
from glm_batch.models import rooms
from glm_batch.models.engine.api.interface import EngineConfig
from glm_batch.models.errors import EngineError, GlmBatchError
from glm_batch.pipelines.cluster.cluster import cluster, job_workers
from glm_batch.pipelines.graph.steps import Commit, Read, build_parser, build_renderer, orders
from glm_batch.pipelines.job import Job, job_file
from glm_batch.pipelines.metrics.counts import Counts, Summary
from glm_batch.pipelines.metrics.exporter import Exporter
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.journal import Journal, tidy
from glm_batch.pipelines.output.lease import Lease, own
from glm_batch.pipelines.output.manifest import Manifest, is_finished, write_manifest
from glm_batch.pipelines.output.parts import CommitRecord
from glm_batch.pipelines.planning.plan import Unit, job_source
from glm_batch.pipelines.runs.prepared import Checked, Prepared, prepare
from glm_batch.pipelines.runs.watch import OnProgress, Stop, Tally, Watch, watched
from glm_batch.pipelines.tasks.kinds import TASKS

if TYPE_CHECKING:
    from ray.data import Dataset

    from glm_batch.glm_actors.units.model_actor import EngineSource
    from glm_batch.glm_actors.units.row_worker import Step
    from glm_batch.pipelines.cluster.shares import Workers

WAVE_UNITS = 10_000
EXECUTOR_END_S = 30.0
T = TypeVar("T")
# Ray Data adds a word on its own retries to the errors of a stage
RAY_ADVICE = "\nFailed to apply UDF transform"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished job: what it came to, and its rows."""

    output: Output
    manifest: Manifest
    summary: Summary

    def iter_tables(self) -> Iterator[pa.Table]:
        """The committed Arrow tables in the order of the input, one part in memory at a time."""
        return self.output.iter_tables()


def run(
    job: Job | Checked,
    on_progress: OnProgress | None = None,
    *,
    stop: Stop | None = None,
    extend: bool = False,
    app: str | None = None,
) -> Result:
    """Does what of the job is not committed yet, and finishes its output. Ray starts here if it is
    not running. What was checked already is not read again.

    With `stop`, signals end the run early in good order. With `extend`, files may have been added
    to the input of an output that stands. With `app`, the replicas of this live application do the
    model's work. Raises ConfigError before anything starts for a job that cannot run, EngineError
    when the engine gives up, StorageError when the output cannot be written, InterruptedRunError or
    TooManyErrorsError when the run ended early on purpose.
    """
    asked = job.job if isinstance(job, Checked) else job
    tally = Tally(on_progress, asked.max_error_rate if asked.fail_fast else None)
    tally.tell("planning")
    output = Output.at(asked.output, asked.storage)
    prepared = prepare(job, output, extend=extend)
    if is_done(prepared, output):
        tally.resume(prepared.plan, output)
        manifest = output.manifest()
    else:
        with own(output.store) as lease:
            output.take_over(prepared.plan, job_file(asked))
            units = tally.resume(prepared.plan, output)
            watch = Watch(lease=lease, stop=stop or Stop())
            process(prepared, output, units, tally, watch, app=app)
            manifest = finish(prepared, output, lease)
    tally.tell("done")
    summary = tally.summary(output)
    if asked.asks_by_row:
        summary = replace(summary, notes=(*summary.notes, _answer_files().exported_note(output)))
    return Result(output=output, manifest=manifest, summary=summary)


def build_dataset(job: Job | Checked) -> Dataset:
    """The job's labelled rows, in the output's schema, as a lazy Ray Dataset; nothing is committed.

    Ray must be running, or starts with its own defaults. Raises ConfigError for a job that cannot
    run.
    """
    from glm_batch.pipelines.graph import stages

    prepared = prepare(job, None)
    plan, spec = prepared.plan, prepared.spec
    workers = job_workers(spec.job)
    dataset = stages.unit_graph(
        orders(plan, list(plan.units())),
        partial(build_renderer, Read(job_source(spec.job)), spec),
        engine_config(spec.job),
        partial(build_parser, spec),
        workers,
        stages.start_ledger(plan),
        commits=False,
    )
    return stages.without_own_columns(dataset, spec.schema, workers)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSteps:
    """How a run reads and commits a unit, and what a committed one adds to its tally."""

    read: Step
    commit: Step
    journal: Journal
    counted: Callable[[CommitRecord], Counts] = lambda record: record.counts


def process(
    prepared: Prepared,
    output: Output,
    units: Sequence[Unit],
    tally: Tally,
    watch: Watch,
    *,
    steps: UnitSteps | None = None,
    app: str | None = None,
) -> None:
    """Commits these units. Raises as `run` does."""
    tally.refuse_errors()
    if not units:
        return
    job, steps = prepared.spec.job, steps or unit_steps(prepared, output)
    tally.tell("starting")
    with cluster(found=app is not None):
        from glm_batch.pipelines.graph import stages

        engine = engine_of(job, app)
        workers = job_workers(job, beside_app=app is not None)
        watch.expect(workers.replicas * stages.UNITS_IN_ENGINE)
        run_graphs(
            partial(job_graph, prepared, steps, engine, workers),
            units,
            watch,
            Exporter(prepared.plan.fingerprint),
            lambda record: tally.add(steps.counted(record), record.spent),
        )
    tally.refuse_signal(watch.stop)


def job_graph(
    prepared: Prepared,
    steps: UnitSteps,
    engine: EngineConfig | EngineSource,
    workers: Workers,
    units: Sequence[Unit],
) -> Dataset:
    """The whole graph over these units, as in the diagram above."""
    from glm_batch.pipelines.graph import stages

    plan, spec = prepared.plan, prepared.spec
    return stages.unit_graph(
        orders(plan, units),
        partial(build_renderer, steps.read, spec),
        engine,
        partial(build_parser, spec, steps.commit),
        workers,
        stages.start_ledger(plan),
        steps.journal,
    )


def unit_steps(prepared: Prepared, output: Output) -> UnitSteps:
    """Those of a unit that is processed for the first time."""
    plan, spec = prepared.plan, prepared.spec
    journal = Journal(output=output, every_seconds=spec.job.commit.every_seconds)
    return UnitSteps(
        read=Read(job_source(spec.job)),
        commit=Commit(journal, plan.unit_sizes, spec),
        journal=journal,
    )


def is_done(prepared: Prepared, output: Output) -> bool:
    """Whether nothing is left to do."""
    if not is_finished(output, prepared.plan):
        return False
    asks_by_row = prepared.spec.job.asks_by_row
    return not asks_by_row or bool(_answer_files().is_exported(output, output.manifest()))


def finish(prepared: Prepared, output: Output, lease: Lease) -> Manifest:
    """Writes what stands at the end of a job, after every unit is committed.

    Raises LeaseLostError.
    """
    lease.confirm()
    manifest = write_manifest(output, prepared.plan, prepared.spec.schema, prepared.facts)
    if prepared.spec.job.asks_by_row and not _answer_files().is_exported(output, manifest):
        _answer_files().export(output, manifest)
    tidy(output)
    return manifest


def _answer_files() -> Any:
    return rooms.load("pipelines.openai_batch.answer_files")


def engine_config(job: Job) -> EngineConfig:
    """The job's engine section as the engine takes it."""
    task = None if job.asks_by_row else TASKS[job.task.kind].engine_task
    return job.engine.of(os.path.abspath(job.model), task)


def engine_of(job: Job, app: str | None) -> EngineConfig | EngineSource:
    """What runs the job's model: its own workers, or the application `app`. Raises ConfigError."""
    if app is None:
        return engine_config(job)
    source: EngineSource = rooms.load("pipelines.shared.app").shared_model(
        app, engine_config(job), senders=job.engine.replica_range[1]
    )
    return source


def run_graphs(
    graph: Callable[[Sequence[T]], Dataset],
    units: Sequence[T],
    watch: Watch,
    exporter: Exporter,
    on_record: Callable[[CommitRecord], None],
) -> None:
    """Runs graphs over all units and tells of each record; ends early as `watch` says.

    Not all units make one graph: Ray's driver keeps some 10 KB for each block that it has ever
    seen.
    """
    for start in range(0, len(units), WAVE_UNITS):
        _run_graph(graph(units[start : start + WAVE_UNITS]), watch, exporter, on_record)
        if watch.stop.is_asked:
            return


def _run_graph(
    dataset: Dataset, watch: Watch, exporter: Exporter, on_record: Callable[[CommitRecord], None]
) -> None:
    from ray.exceptions import ActorDiedError, RayError

    from glm_batch.pipelines.graph import stages

    try:
        with watch.stop.listening():
            for record in watched(stages.records(dataset), watch.is_over):
                watch.count()
                exporter.count(record.counts, record.spent)
                on_record(record)
    except (RayError, RuntimeError) as error:
        cause = _own_error(error)
        if cause is not None:
            raise cause from error
        if isinstance(error, ActorDiedError):
            raise EngineError(
                f"a worker's process died again and again; Ray's logs say why ({error})"
            ) from error
        raise
    finally:
        end_execution(dataset, EXECUTOR_END_S)


def _own_error(error: BaseException | None) -> GlmBatchError | None:
    """Our own error under what Ray has wrapped around it, if there is one."""
    from ray.exceptions import RayError

    while error is not None:
        # Ray's wrapper is an instance of the wrapped error's class too, but its text is a
        # traceback.
        if isinstance(error, GlmBatchError) and not isinstance(error, RayError):
            text, advice, _ = str(error).partition(RAY_ADVICE)
            return type(error)(text) if advice else error
        error = getattr(error, "cause", None) or error.__cause__
    return None
