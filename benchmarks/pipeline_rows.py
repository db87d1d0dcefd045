"""`python -m benchmarks.pipeline_rows`: many short rows through the whole pipeline with EchoEngine,
no model.

Shows what the pipeline itself costs: rows per second, and whether the memory of the driver and of
Ray's processes stays flat. Owns the rows, the job file and the report.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks import BUILD
from benchmarks.machine import describe
from benchmarks.make_mid_model import LABELS, make_mid_model, make_words
from benchmarks.watched_job import MIB, WORKERS, Sample, WatchedJob, run_watched

MARKS = (0.1, 0.5, 1.0)


def main(
    rows: Annotated[int, typer.Option(min=100)] = 100_000,
    files: Annotated[int, typer.Option(min=1, help="input files the rows are spread over")] = 10,
    timeout: Annotated[float, typer.Option(help="seconds the job may take")] = 1200.0,
) -> None:
    """Runs the job and prints rows/s and memory at 10 %, 50 % and 100 % of the committed rows."""
    console = Console()
    folder = BUILD / "pipeline_rows"
    shutil.rmtree(folder, ignore_errors=True)
    job_path = write_job(folder, make_mid_model(BUILD / "mid"), rows, files)
    job = run_watched(job_path, folder / "out", timeout)
    if job.num_rows != rows:
        raise SystemExit(f"{rows} rows went in, {job.num_rows} are committed in {folder / 'out'}")
    report = _report(job)
    report_path = BUILD / f"pipeline-rows-{time.strftime('%Y%m%d-%H%M%S')}.json"
    report_path.write_text(json.dumps(report, indent=1))
    _show(console, report)
    console.print(f"written to {report_path}")


def write_job(folder: Path, model_dir: Path, num_rows: int, num_files: int) -> Path:
    (folder / "in").mkdir(parents=True)
    rng, words = random.Random(0), make_words(2000)
    for number in range(num_files):
        keys = list(range(number, num_rows, num_files))
        texts = [" ".join(rng.choices(words, k=12)) for _ in keys]
        pq.write_table(
            pa.table({"id": keys, "text": texts}), folder / "in" / f"{number:03d}.parquet"
        )
    job = {
        "model": str(model_dir),
        "input": [str(folder / "in" / "*.parquet")],
        "output": str(folder / "out"),
        "key": "id",
        "carry": ["text"],
        "task": {"kind": "choose", "prompt": "What is it about? {text}", "labels": list(LABELS)},
        "engine": {"kind": "echo"},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def _report(job: WatchedJob) -> dict[str, Any]:
    """`rows_per_s` is over everything; `steady_rows_per_s` from the first committed unit seen to
    the last.
    """
    return {
        "machine": describe(),
        "rows": job.num_rows,
        "units": job.num_units,
        "end_to_end_s": job.total_s,
        "first_commit_s": job.working[0].at_s,
        "rows_per_s": job.num_rows / job.total_s,
        "steady_rows_per_s": job.steady_rows_per_s,
        "memory": {f"{mark:.0%}": _memory(job.at(mark)) for mark in MARKS},
        "peak": {
            "driver": job.peak(["driver"]),
            "workers": job.peak(WORKERS),
            "daemons": job.peak(["daemons"]),
        },
    }


def _memory(sample: Sample) -> dict[str, float]:
    memory = sample.memory
    return {
        "at_s": sample.at_s, "driver": memory["driver"], "workers": sample.workers,
        "daemons": memory["daemons"],
    }  # fmt: skip


def _show(console: Console, report: dict[str, Any]) -> None:
    steady = report["steady_rows_per_s"]
    console.print(
        f"{report['rows']} rows in {report['units']} units: {report['end_to_end_s']:.1f} s "
        f"from process start to exit, "
        f"{report['rows_per_s']:.0f} rows/s; first unit committed after "
        f"{report['first_commit_s']:.1f} s, "
        f"from then on {'-' if steady is None else f'{steady:.0f}'} rows/s"
    )
    table = Table(title="memory of its own (MiB)")
    for heading in ("committed", "seconds", "driver", "Ray workers", "Ray daemons"):
        table.add_column(heading, justify="right")
    memory, peak = report["memory"], report["peak"]
    for mark, sample in memory.items():
        sizes = [f"{sample[name] / MIB:.0f}" for name in ("driver", "workers", "daemons")]
        table.add_row(mark, f"{sample['at_s']:.1f}", *sizes)
    table.add_row(
        "peak", "", *[f"{peak[name] / MIB:.0f}" for name in ("driver", "workers", "daemons")]
    )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
