"""`python -m benchmarks.protocol_cost`: what committing unit by unit costs, against committing once
at the end.

The same rows through the same graph with EchoEngine, in turns: with the protocol, and with a last
step that keeps all rows in memory and writes one part when the last unit has come. Owns that step,
the turns and the report.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import typer
from rich.console import Console

from benchmarks import BUILD
from benchmarks.machine import describe
from benchmarks.make_mid_model import make_mid_model
from benchmarks.pipeline_rows import write_job
from glm_batch.jobs.files.sections import load_job
from glm_batch.models.errors import RowError
from glm_batch.pipelines.cluster.cluster import cluster, job_workers
from glm_batch.pipelines.graph.steps import committed_table
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.lease import own
from glm_batch.pipelines.output.parts import CommitRecord
from glm_batch.pipelines.runs.pipeline import engine_config, job_graph, unit_steps
from glm_batch.pipelines.runs.prepared import prepare
from glm_batch.pipelines.tasks.rows import UNIT, TaskSpec, count_rows


@dataclass(slots=True)
class CommitOnce:
    """Keeps what comes, and commits all of it as one unit with the last one. Nothing is safe until
    then.
    """

    output: Output
    num_units: int
    spec: TaskSpec
    name: str = "committing"
    tables: list[pa.Table] = field(default_factory=list)

    def num_rows(self, table: pa.Table) -> int:
        return 1

    def __call__(
        self, table: pa.Table, start: int, stop: int, lost: RowError | None = None
    ) -> pa.Table:
        self.tables.append(table)
        counts = count_rows(table)
        record = CommitRecord(
            unit=table[UNIT][0].as_py(), part="", rows=0, num_bytes=0, checksum="", counts=counts
        )
        if len(self.tables) == self.num_units:
            rows = pa.concat_tables(self.tables).select(self.spec.schema.names)
            record = self.output.commit(0, rows, counts)
        return committed_table(record, table)


def main(
    rows: Annotated[int, typer.Option(min=5000)] = 100_000,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Rows per second of both ways from the first unit to the end, medians, and their ratio."""
    folder = BUILD / "protocol_cost"
    shutil.rmtree(folder, ignore_errors=True)
    job_path = write_job(folder, make_mid_model(BUILD / "mid"), rows, 10)
    os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
    rates: dict[str, list[float]] = {"protocol": [], "once": []}
    with cluster():
        for turn in range(repeats):
            for way in rates:
                rates[way].append(_rate(job_path, folder / f"out-{turn}-{way}", once=way == "once"))
    medians = {way: round(statistics.median(found)) for way, found in rates.items()}
    ratio = round(medians["protocol"] / medians["once"], 3)
    report = {
        "machine": describe(),
        "rows": rows,
        "rates": rates,
        "medians": medians,
        "ratio": ratio,
    }
    path = BUILD / f"protocol-cost-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps(report, indent=1))
    Console().print_json(data=report)


def _rate(job_path: Path, out: Path, *, once: bool) -> float:
    """Rows per second between the first and the last unit; what "once" writes at the end counts."""
    from glm_batch.pipelines.graph import stages

    job, _ = load_job(str(job_path), [f"output={out}"])
    output = Output.at(job.output)
    prepared = prepare(job, output)
    plan, spec, workers = prepared.plan, prepared.spec, job_workers(job)
    steps = unit_steps(prepared, output)
    if once:
        steps = replace(steps, commit=CommitOnce(output, plan.num_units, spec))
    dataset = job_graph(prepared, steps, engine_config(job), workers, list(plan.units()))
    with own(output.store):
        marks: list[tuple[float, Any]] = [
            (time.monotonic(), record) for record in stages.records(dataset)
        ]
    return sum(record.counts.rows for _, record in marks[1:]) / (marks[-1][0] - marks[0][0])


if __name__ == "__main__":
    typer.run(main)
