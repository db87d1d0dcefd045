"""The pipeline on one screen: a job's rows from its input files to committed parts.

    orders -> read, render, tokenize (CPU actors) -> infer (model actors) -> parse, commit (CPU
    actors)

`run` does the whole job and can be called again after any crash; `build_dataset` gives the labelled
rows as a Ray Dataset instead. Owns the order of things; each step lives in the module named after
it.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from glm_batch.glm_actors.ray_private import end_execution
from glm_batch.models import rooms
from glm_batch.models.checkpoint.config_reader import load_config
from glm_batch.models.engine.api.interface import EngineConfig
from glm_batch.models.errors import EngineError, GlmBatchError
from glm_batch.pipelines.calibration.calibration import planned_scaling
from glm_batch.pipelines.cluster.cluster import cluster, job_workers
from glm_batch.pipelines.graph.steps import Commit, Read
from glm_batch.pipelines.job import Job, job_file
from glm_batch.pipelines.metrics.counts import Summary
from glm_batch.pipelines.metrics.exporter import Exporter
from glm_batch.pipelines.openai_batch.answer_files import export, exported_note, is_exported
from glm_batch.pipelines.output.commit import CommitRecord, Manifest, Output
from glm_batch.pipelines.output.journal import Journal, tidy
from glm_batch.pipelines.output.lease import own
from glm_batch.pipelines.planning.plan import (
    Plan,
    Unit,
    extended_plan,
    identify,
    job_source,
    make_plan,
)
from glm_batch.pipelines.runs.progress import OnProgress, Work
from glm_batch.pipelines.runs.stop import InterruptedRunError, Stop
from glm_batch.pipelines.runs.watch import Watch, watched
from glm_batch.pipelines.tasks.rows import TaskSpec
from glm_batch.pipelines.tasks.schema import output_schema
from glm_batch.pipelines.tasks.tasks import TaskRunner

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
    job: Job,
    on_progress: OnProgress | None = None,
    *,
    stop: Stop | None = None,
    extend: bool = False,
    app: str | None = None,
) -> Result:
    """Does what of the job is not committed yet, and finishes its output. Ray starts here if it is
    not running.

    With `stop`, signals end the run early in good order. With `extend`, files may have been added
    to the input of an output that stands. With `app`, the replicas of this live application do the
    model's work. Raises ConfigError before anything starts for a job that cannot run, EngineError
    when the engine gives up, StorageError when the output cannot be written, InterruptedRunError or
    TooManyErrorsError when the run ended early on purpose.
    """
    work = Work(on_progress)
    output = Output.at(job.output, job.storage)
    work.tell("planning")
    prepared = prepare(job, output, extend=extend)
    if is_done(job, output, prepared.plan):
        work.resume(prepared.plan, output)
        manifest = output.manifest()
    else:
        with own(output.store) as lease:
            output.take_over(prepared.plan, job_file(job))
            work.resume(prepared.plan, output)
            complete(job, prepared, output, work, Watch(lease=lease, stop=stop or Stop()), app)
            lease.confirm()
            manifest = finish(job, output, prepared.plan, prepared.spec.schema, prepared.facts)
            tidy(output)
    work.tell("done")
    summary = work.summary(output)
    if job.asks_by_row:
        summary = replace(summary, notes=(*summary.notes, exported_note(output)))
    return Result(output=output, manifest=manifest, summary=summary)


def is_done(job: Job, output: Output, plan: Plan) -> bool:
    """Whether nothing is left to do."""
    return output.is_finished(plan) and (
        not job.asks_by_row or is_exported(output, output.manifest())
    )


def finish(
    job: Job, output: Output, plan: Plan, schema: pa.Schema, facts: dict[str, Any]
) -> Manifest:
    """Writes what stands at the end of a job, after every unit is committed."""
    manifest = output.finish(plan, schema, facts)
    if job.asks_by_row and not is_exported(output, manifest):
        export(output, manifest)
    return manifest


def build_dataset(job: Job) -> Dataset:
    """The job's labelled rows, in the output's schema, as a lazy Ray Dataset; nothing is committed.

    Ray must be running, or starts with its own defaults. Raises ConfigError for a job that cannot
    run.
    """
    from glm_batch.pipelines.graph import stages

    prepared = prepare(job, None)
    units = list(prepared.plan.units())
    workers, ledger = job_workers(job), stages.start_ledger(prepared.plan)
    read = Read(job_source(job))
    dataset = stages.order(prepared.plan, units, workers)
    dataset = completed(dataset, read, prepared.spec, engine_config(job), workers, ledger)
    dataset = stages.parse(dataset, prepared.spec, workers, ledger)
    return stages.without_own_columns(dataset, prepared.spec.schema, workers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A job that has been checked: its plan, what travels to the workers, what goes into the
    manifest.
    """

    plan: Plan
    spec: TaskSpec
    facts: dict[str, Any]


def prepare(job: Job, output: Output | None, *, extend: bool = False) -> Prepared:
    """Checks everything that can be known before work starts; with an output, its plan is created
    or taken up.

    Raises ConfigError.
    """
    model_dir = os.path.abspath(job.model)
    config = load_config(model_dir)
    facts = job_facts(job, model_dir)
    files = job_source(job).list_files(job.input)
    identity = identify(job, files, model_dir)
    standing = output.adopt(identity, extend=extend) if output is not None else None
    if standing is None:
        plan = make_plan(job, files, identity)
    else:
        plan = (
            standing
            if standing.identity == identity
            else extended_plan(job, standing, files, identity)
        )
    schema = output_schema(job, config, {name: plan.schema.field(name).type for name in job.carry})
    if output is not None and standing is None:
        plan = output.begin(plan)
    run_id = f"{plan.fingerprint}-{uuid.uuid4().hex[:8]}"
    scaling = planned_scaling(plan.identity["task"], job.task.labels or config.id2label)
    spec = TaskSpec(job=job, model_dir=model_dir, schema=schema, run_id=run_id, scaling=scaling)
    return Prepared(plan=plan, spec=spec, facts=facts)


def job_facts(job: Job, model_dir: str) -> dict[str, Any]:
    """What is decided for a job before it starts, for its manifest. Raises ConfigError."""
    if not job.asks_by_row:
        return TaskRunner(job, model_dir).facts
    from glm_batch.pipelines.openai_batch.requests import RequestRunner

    return RequestRunner(job, model_dir).facts


def completed(
    dataset: Dataset,
    read: Step,
    spec: TaskSpec,
    engine: EngineConfig | EngineSource,
    workers: Workers,
    ledger: Any,
    journal: Journal | None = None,
) -> Dataset:
    """The part of the graph from orders to completions."""
    from glm_batch.pipelines.graph import stages

    dataset = stages.render(dataset, read, spec, workers, ledger)
    return stages.infer(dataset, engine, workers, ledger, journal)


def committed(
    plan: Plan,
    units: Sequence[Unit],
    read: Step,
    spec: TaskSpec,
    workers: Workers,
    journal: Journal,
    commit: Step,
    engine: EngineConfig | EngineSource | None = None,
) -> Dataset:
    """The whole graph, as in the diagram above; `engine` is the job's own by default: see
    `engine_of`.
    """
    from glm_batch.pipelines.graph import stages

    ledger = stages.start_ledger(plan)
    dataset = stages.order(plan, units, workers)
    dataset = completed(
        dataset, read, spec, engine or engine_config(spec.job), workers, ledger, journal
    )
    return stages.commit(dataset, spec, commit, workers, ledger)


def engine_config(job: Job) -> EngineConfig:
    """The job's engine section as the engine takes it."""
    engine = job.engine
    # which takes any mixture of requests
    kind = "torch" if job.asks_by_row and engine.kind == "auto" else engine.kind
    return EngineConfig(
        model=os.path.abspath(job.model),
        kind=kind,
        dtype=engine.dtype,
        device=engine.device,
        tensor_parallel_size=engine.tensor_parallel_size,
        max_step_tokens=engine.max_step_tokens,
        max_model_len=engine.max_model_len,
        task=None if job.task.kind == "requests" else job.task.kind,
    )


def engine_of(job: Job, app: str | None) -> EngineConfig | EngineSource:
    """Where the job's model runs: on workers of its own, or in the live application `app`. Raises
    ConfigError.
    """
    if app is None:
        return engine_config(job)
    source: EngineSource = rooms.load("pipelines.shared.app").shared_model(
        app, engine_config(job), senders=job.engine.replica_range[1]
    )
    return source


def complete(
    job: Job, prepared: Prepared, output: Output, work: Work, watch: Watch, app: str | None = None
) -> None:
    """Commits every unit that is not committed yet."""
    pending = work.pending(prepared.plan)
    work.refuse_errors(job)
    if not pending:
        return
    work.tell("starting")
    with cluster(found=app is not None):
        from glm_batch.pipelines.graph import stages

        engine = engine_of(job, app)
        workers = job_workers(job, beside_app=app is not None)
        watch.expect(workers.replicas * stages.UNITS_IN_ENGINE)
        journal = Journal(output=output, every_seconds=job.commit.every_seconds)
        plan, spec, read = prepared.plan, prepared.spec, Read(job_source(job))
        commit, exporter = Commit(journal, plan.unit_sizes, spec), Exporter(plan.fingerprint)
        for wave in waves(pending):
            dataset = committed(plan, wave, read, spec, workers, journal, commit, engine)
            follow(dataset, watch, exporter, lambda record: work.add_checked(job, record))
            if watch.stop.is_asked:
                break
    if watch.stop.signum is not None and not work.is_complete:
        raise InterruptedRunError(work.how_far(), watch.stop.signum)


def waves(units: Sequence[T]) -> Iterator[Sequence[T]]:
    """Units that become one graph together. Ray's driver keeps some 10 KB for each block that it
    has ever seen.
    """
    for start in range(0, len(units), WAVE_UNITS):
        yield units[start : start + WAVE_UNITS]


def follow(
    dataset: Dataset, watch: Watch, exporter: Exporter, on_record: Callable[[CommitRecord], None]
) -> None:
    """Runs a graph that ends in commits, and tells of each record; ends early when `watch` says so."""
    from ray.exceptions import ActorDiedError, RayError

    from glm_batch.pipelines.graph import stages

    try:
        with watch.stop.listening():
            for record in watched(stages.committed(dataset), watch.is_over):
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
