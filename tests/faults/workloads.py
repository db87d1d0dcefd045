"""The jobs that are killed: many small units of EchoEngine, and the shipped tiny checkpoint with
its real weights.

Owns their inputs, their pace, and the undisturbed runs that give what their records must be.
"""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from glm_batch.jobs.files.sections import load_job
from glm_batch.pipelines import run
from tests.faults.checks import Workload, read_records
from tests.faults.driver import HURRY, Pace, completed_rows
from tests.faults.places import ROOT, Place, driver_command

TICKETS = ROOT / "examples" / "support"
ECHO_PACE = Pace(folder="", render_s=0.04, step_s=0.08, step_rows=7, commit_s=0.02)
TINY_PACE = Pace(folder="", render_s=0.05, step_s=0.05, step_rows=20, commit_s=0.02)


def echo_job(
    checkpoint: Path, folder: Path, num_rows: int, unit_rows: int = 5, every_seconds: float = 30.0
) -> dict[str, Any]:
    """Every row's prompt is different, so that no answer can stand in another's place unnoticed."""
    (folder / "in").mkdir(parents=True)
    for number, start in enumerate(range(0, num_rows, -(-num_rows // 3))):
        rows = range(start, min(start + -(-num_rows // 3), num_rows))
        table = pa.table(
            {
                "id": [f"r{row}" for row in rows],
                "shape": [f"shape {row:x} {row % 7}" for row in rows],
            }
        )
        pq.write_table(table, folder / "in" / f"{number}.parquet")
    return {
        "model": str(checkpoint),
        "input": [str(folder / "in" / "*.parquet")],
        "key": "id",
        "carry": ["shape"],
        "task": {"kind": "generate", "prompt": "Which shape? {shape}"},
        "engine": {"kind": "echo"},
        "commit": {"unit_rows": unit_rows, "every_seconds": every_seconds},
    }


def tiny_choose_job() -> dict[str, Any]:
    job: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "route.yaml").read_text())
    return _of_tickets(job, ["tickets-1.parquet", "tickets-4.jsonl"])


def tiny_generate_job() -> dict[str, Any]:
    job: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "reply.yaml").read_text())
    sampling = {"max_tokens": 32, "temperature": 0.8, "top_p": 0.95, "seed": 11}
    return _of_tickets(job, ["tickets-3.parquet"]) | {"sampling": sampling}


def _of_tickets(job: dict[str, Any], files: list[str]) -> dict[str, Any]:
    """In float32: with bfloat16, whom a row is batched with shows in the third digit of its
    probabilities.
    """
    input_files = {
        "input": [str(TICKETS / file) for file in files],
        "model": str(ROOT / job["model"]),
    }
    return job | input_files | {"commit": {"unit_rows": 5}, "engine": {"dtype": "float32"}}


def undisturbed(job: dict[str, Any], pace: Pace, place: Place, folder: Path) -> Workload:
    """Runs the job by itself, without sleeping."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / HURRY).touch()
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job | {"output": str(folder / "out")}))
    command = driver_command(replace(pace, folder=str(folder)).to_json(), "label", str(path))
    done = subprocess.run(
        command, cwd=ROOT, env=place.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"exit code {done.returncode}:\n{done.stderr}"
    return _workload(job, pace, folder / "out", completed_rows(folder))


def undisturbed_here(job: dict[str, Any], folder: Path) -> Workload:
    """Runs an EchoEngine job on the Ray of this process. All its rows must be good ones."""
    folder.mkdir(parents=True)
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job | {"output": str(folder / "out")}))
    counts = run(load_job(str(path), [])[0]).summary.counts
    assert counts.ok == counts.rows
    return _workload(job, ECHO_PACE, folder / "out", counts.rows)


def _workload(job: dict[str, Any], pace: Pace, output: Path, rows_for_engine: int) -> Workload:
    records = read_records(output)
    return Workload(
        job=job,
        pace=pace,
        keys=records["row_key"].to_pylist(),
        records=records,
        rows_for_engine=rows_for_engine,
    )
