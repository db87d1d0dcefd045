"""`python -m benchmarks.scale`: plans and resumes a job of a billion rows in 50,000 files, without
running a row.

The files are real, small Parquet files under many names; the commit records of the units that are
done are written as a job would have written them. Owns the input, the state and the report.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console

from benchmarks import BUILD, ROOT
from benchmarks.machine import describe
from glm_batch.pipelines import Job
from glm_batch.pipelines.job import EngineSection, TaskConfig
from glm_batch.pipelines.metrics.counts import Counts
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.parts import CommitRecord
from glm_batch.pipelines.planning.plan import Plan
from glm_batch.pipelines.runs.prepared import prepare
from glm_batch.pipelines.runs.watch import Tally

WRITERS = 8


def main(
    files: Annotated[int, typer.Option(min=1)] = 50_000,
    rows: Annotated[int, typer.Option(min=1, help="rows of each file")] = 20_000,
    step: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Times planning, and resuming with 99 % of the units done, each in a process of its own."""
    if step:
        print(json.dumps({"plan": _plan, "resume": _resume}[step]()))
        return
    from benchmarks.make_mid_model import make_mid_model  # imports torch, which a driver does not

    make_mid_model(BUILD / "mid")
    folder = _folder()
    shutil.rmtree(folder, ignore_errors=True)
    _write_input(folder / "in", files, rows)
    planned = _in_process("plan")
    done = _write_state()
    resumed = _in_process("resume")
    report = {
        "machine": describe(),
        "files": files,
        "rows": files * rows,
        "done": done,
        "plan": planned,
    } | {
        "resume": resumed,
        "plan_bytes": (folder / "out" / "plan.json").stat().st_size,
        "record_bytes": sum(path.stat().st_size for path in (folder / "out" / "commits").iterdir()),
    }
    path = BUILD / f"scale-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps(report, indent=1))
    Console().print_json(data=report)
    print(f"written to {path}")


def _folder() -> Path:
    return BUILD / "scale"


def _write_input(folder: Path, files: int, rows: int) -> None:
    """The rows of all files are the same: what is in them is not looked at before the job runs."""
    sink = io.BytesIO()
    table = pa.table({"text": pa.array(["a short text"] * rows).dictionary_encode()})
    pq.write_table(table, sink, row_group_size=rows)
    data = sink.getvalue()
    for number in range(files):
        path = folder / f"{number // 1000:03d}" / f"{number:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _job() -> Job:
    task = TaskConfig(kind="choose", prompt="Which? {text}", labels=["yes", "no"])
    return Job(
        model=str(BUILD / "mid"),
        input=[str(_folder() / "in" / "*" / "*.parquet")],
        output=str(_folder() / "out"),
        task=task,
        engine=EngineSection(kind="echo"),
    )


def _plan() -> dict[str, Any]:
    job = _job()
    begun = time.monotonic()
    plan = prepare(job, Output.at(job.output)).plan
    return _measured(begun) | {"unit_rows": plan.unit_rows, "units": plan.num_units}


def _resume() -> dict[str, Any]:
    """From the start of a driver to the list of units that it has to run."""
    job = _job()
    begun = time.monotonic()
    output = Output.at(job.output)
    units = Tally(None).resume(prepare(job, output).plan, output)
    return {"pending": len(units)} | _measured(begun)


def _measured(begun: float) -> dict[str, Any]:
    # Not getrusage: there a process begins with the peak of the one that started it.
    status = Path("/proc/self/status").read_text()
    (peak,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return {"seconds": round(time.monotonic() - begun, 1), "peak_mib": round(int(peak) / 1024)}


def _write_state() -> int:
    """The records of all units but every hundredth; how many there are."""
    output = Output.at(str(_folder() / "out"))
    plan = output.standing_plan()

    def write(record: CommitRecord) -> None:
        path = _folder() / "out" / "commits" / f"unit-{record.unit:08d}-g{record.generation}.json"
        path.write_bytes(record.to_json())

    records = [record for record in _records(plan) if record.unit % 100]
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write, records))
    return len(records)


def _records(plan: Plan) -> Iterator[CommitRecord]:
    for unit in plan.units():
        counts = Counts(rows=unit.num_rows, ok=unit.num_rows, prompt_tokens=40 * unit.num_rows)
        part = f"parts/{unit.id}-g1-00000000.parquet"
        yield CommitRecord(
            unit=unit.index,
            part=part,
            rows=unit.num_rows,
            num_bytes=1,
            checksum="0" * 64,
            counts=counts,
        )


def _in_process(step: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.scale", "--step", step]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    typer.run(main)
