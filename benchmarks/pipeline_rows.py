"""`python -m benchmarks.pipeline_rows`: many short rows through the whole pipeline with EchoEngine, no model.

Shows what the pipeline itself costs: rows per second, and whether the memory of the driver and of Ray's processes stays
flat. Owns the rows, the job file and the sampling; the job runs as `glm-batch label` in a process of its own.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import typer
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.compare import BUILD, ROOT
from benchmarks.machine import describe, end_tree
from benchmarks.make_mid_model import LABELS, make_mid_model, make_words

MARKS = (0.1, 0.5, 1.0)
SAMPLE_EVERY_S = 0.25
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One look at the job: seconds since its start, committed units, bytes that belong to each group of processes.

    A process's bytes are its resident ones without those it shares with others (the object store, libraries).
    """

    at_s: float
    units: int
    driver: int
    workers: int
    daemons: int


def main(
    rows: Annotated[int, typer.Option(min=100)] = 100_000,
    files: Annotated[int, typer.Option(min=1, help="input files the rows are spread over")] = 10,
    timeout: Annotated[float, typer.Option(help="seconds the job may take")] = 1200.0,
) -> None:
    """Runs the job and prints rows/s and memory at 10 %, 50 % and 100 % of the committed rows."""
    console = Console()
    folder = BUILD / "pipeline_rows"
    shutil.rmtree(folder, ignore_errors=True)
    job_path = _write_job(folder, make_mid_model(BUILD / "mid"), rows, files)
    samples, total_s = _run(job_path, folder, timeout)
    plan = json.loads((folder / "out" / "plan.json").read_text())
    written = _committed_rows(folder / "out")
    if written != rows:
        raise SystemExit(f"{rows} rows went in, {written} are committed in {folder / 'out'}")
    report = _report(samples, total_s, rows, plan["units"])
    report_path = BUILD / f"pipeline-rows-{time.strftime('%Y%m%d-%H%M%S')}.json"
    report_path.write_text(json.dumps(report, indent=1))
    _show(console, report)
    console.print(f"written to {report_path}")


def _write_job(folder: Path, model_dir: Path, num_rows: int, num_files: int) -> Path:
    (folder / "in").mkdir(parents=True)
    rng, words = random.Random(0), make_words(2000)
    for number in range(num_files):
        keys = list(range(number, num_rows, num_files))
        texts = [" ".join(rng.choices(words, k=12)) for _ in keys]
        pq.write_table(pa.table({"id": keys, "text": texts}), folder / "in" / f"{number:03d}.parquet")
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


def _run(job_path: Path, folder: Path, timeout: float) -> tuple[list[Sample], float]:
    """Runs the job to its end; samples of its memory, and its seconds from process start to exit."""
    log_path = folder / "label.log"
    samples: list[Sample] = []
    with log_path.open("w") as log:
        begin = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs", "label", str(job_path)], cwd=ROOT, stdout=log, stderr=log, text=True
        )
        try:
            while process.poll() is None:
                at_s = time.perf_counter() - begin
                if at_s > timeout:
                    raise SystemExit(f"the job took more than {timeout:.0f} s, see {log_path}")
                samples.append(_sample(process.pid, at_s, folder / "out" / "commits"))
                time.sleep(SAMPLE_EVERY_S)
            total_s = time.perf_counter() - begin
        finally:
            end_tree(process)
    if process.returncode != 0:
        raise SystemExit(f"glm-batch label ended with exit status {process.returncode}, see {log_path}")
    return samples, total_s


def _sample(pid: int, at_s: float, commits: Path) -> Sample:
    groups = {"driver": 0, "workers": 0, "daemons": 0}
    try:
        family = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    for process in [psutil.Process(pid), *family]:
        try:
            memory = process.memory_info()
            group = "driver" if process.pid == pid else _group(process)
        except psutil.NoSuchProcess:
            continue
        groups[group] += memory.rss - memory.shared
    units = len(os.listdir(commits)) if commits.is_dir() else 0
    return Sample(at_s=at_s, units=units, **groups)


def _group(process: psutil.Process) -> str:
    """Ray names a worker's process after what it runs ("ray::..."); the rest are Ray's own daemons."""
    title = process.cmdline()[:1]
    return "workers" if title and title[0].startswith("ray::") else "daemons"


def _committed_rows(output: Path) -> int:
    manifest = json.loads((output / "manifest.json").read_text())
    return sum(int(pq.read_metadata(output / part["part"]).num_rows) for part in manifest["parts"])


def _report(samples: list[Sample], total_s: float, rows: int, num_units: int) -> dict[str, Any]:
    """`rows_per_s` is over everything; `steady_rows_per_s` from the first committed unit seen to the last."""
    working = [sample for sample in samples if sample.units > 0]
    first = working[0]
    last = next(sample for sample in working if sample.units == working[-1].units)
    seconds = last.at_s - first.at_s
    steady = rows * (last.units - first.units) / num_units / seconds if seconds > 0 else None
    marks = {}
    for mark in MARKS:
        reached = next((sample for sample in working if sample.units >= mark * num_units), working[-1])
        marks[f"{mark:.0%}"] = asdict(reached)
    return {
        "machine": describe(),
        "rows": rows,
        "units": num_units,
        "end_to_end_s": total_s,
        "first_commit_s": first.at_s,
        "rows_per_s": rows / total_s,
        "steady_rows_per_s": steady,
        "memory": marks,
        "peak": {name: max(getattr(s, name) for s in samples) for name in ("driver", "workers", "daemons")},
    }


def _show(console: Console, report: dict[str, Any]) -> None:
    steady = report["steady_rows_per_s"]
    console.print(
        f"{report['rows']} rows in {report['units']} units: {report['end_to_end_s']:.1f} s from process start to exit, "
        f"{report['rows_per_s']:.0f} rows/s; first unit committed after {report['first_commit_s']:.1f} s, "
        f"from then on {'-' if steady is None else f'{steady:.0f}'} rows/s"
    )
    table = Table(title="memory of its own (MiB)")
    for heading in ("committed", "seconds", "driver", "Ray workers", "Ray daemons"):
        table.add_column(heading, justify="right")
    memory, peak = report["memory"], report["peak"]
    for mark, sample in memory.items():
        sizes = [f"{sample[name] / MIB:.0f}" for name in ("driver", "workers", "daemons")]
        table.add_row(mark, f"{sample['at_s']:.1f}", *sizes)
    table.add_row("peak", "", *[f"{peak[name] / MIB:.0f}" for name in ("driver", "workers", "daemons")])
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
