"""OpenAI batch files for tests, and the stages of their jobs in this process, without Ray.

Run as batch_files.py JOB.json: commits all units of that job with the echo engine and finishes it,
to be killed on the way.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow as pa

from glm_batch.glm_actors.engines.engine_loop import EngineLoop
from glm_batch.glm_actors.units.batches import to_requests, with_completions
from glm_batch.jobs.files.sections import load_kept_job
from glm_batch.models.engine import build_engine
from glm_batch.models.errors import RowError
from glm_batch.pipelines import run
from glm_batch.pipelines.graph.steps import Order, Read, build_parser, build_renderer, orders
from glm_batch.pipelines.job import EngineSection, Job, job_file
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.lease import own
from glm_batch.pipelines.planning.plan import job_source
from glm_batch.pipelines.runs.pipeline import engine_config
from glm_batch.pipelines.runs.prepared import prepare
from glm_batch.pipelines.tasks.rows import TaskSpec, count_rows

Json = dict[str, Any]


def line(custom_id: Any, url: str, body: Any, **more: Any) -> Json:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body, **more}


def write_lines(path: Path, lines: Iterable[Json | str]) -> Path:
    texts = (each if isinstance(each, str) else json.dumps(each) for each in lines)
    path.write_text("".join(text + "\n" for text in texts))
    return path


def make_job(checkpoint: Path | str, folder: Path, **changes: Any) -> Job:
    given = {"input_format": "openai_batch", "engine": EngineSection(kind="echo"), **changes}
    return Job(
        model=str(checkpoint),
        input=[str(folder / "requests.jsonl")],
        output=str(folder / "out"),
        **given,
    )


class LocalStages:
    """The steps of a job and its engine. `complete` may be told to lose rows as a dying worker
    does.
    """

    def __init__(self, spec: TaskSpec) -> None:
        self._spec = spec
        self._read = Read(job_source(spec.job))
        self._loop = EngineLoop(lambda: build_engine(engine_config(spec.job)))

    def rows(
        self, order: Order, lose: Callable[[pa.Table], RowError | None] = lambda table: None
    ) -> pa.Table:
        """A unit's output columns. What `lose` says of a line's requests befalls it in parsing."""
        table = order.to_table()
        for step in build_renderer(self._read, self._spec):
            table = step(table, 0, step.num_rows(table))
        (parse,) = build_parser(self._spec)
        submission: Future[Any] = self._loop.submit(to_requests(table))
        table = with_completions(table, submission.result())
        lines = [parse(table, row, row + 1, lose(table)) for row in range(parse.num_rows(table))]
        return pa.concat_tables(lines)

    def close(self) -> None:
        self._loop.close()


def commit_all(job: Job) -> None:
    """Commits what of a job is not committed yet; the output is not finished."""
    output = Output.at(job.output, job.storage)
    prepared = prepare(job, output)
    stages = LocalStages(prepared.spec)
    with own(output.store):
        output.take_over(prepared.plan, job_file(job))
        for order in orders(prepared.plan, list(prepared.plan.units())):
            rows = stages.rows(order)
            output.commit(order.unit, rows.select(prepared.spec.schema.names), count_rows(rows))
    stages.close()


def answer_all(job: Job) -> tuple[list[Json], list[Json]]:
    """Runs a job to its end without Ray; the lines of output.jsonl and errors.jsonl."""
    commit_all(job)
    run(job)
    return exported(job)


def exported(job: Job) -> tuple[list[Json], list[Json]]:
    store = Output.at(job.output, job.storage).store
    good, bad = (
        store.read(name).decode().splitlines() for name in ("output.jsonl", "errors.jsonl")
    )
    return [json.loads(text) for text in good], [json.loads(text) for text in bad]


if __name__ == "__main__":
    path = sys.argv[1]
    the_job, _ = load_kept_job(Path(path).read_bytes(), path)
    commit_all(the_job)
    run(the_job)
