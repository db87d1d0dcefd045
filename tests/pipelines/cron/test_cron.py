"""Incremental runs: what is new or changed is processed, the rest is taken over, and a failed run
changes nothing.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from glm_batch.jobs.commands.outputs import gc, retry
from glm_batch.pipelines import run
from glm_batch.pipelines.cron.incremental import Choices, Night, run_night
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.runs.watch import Stop
from tests.pipelines.runs.test_pipeline import make_job, write_input

pytestmark = pytest.mark.usefixtures("ray_cluster")


def line(key: str, text: str = "shape") -> str:
    return json.dumps({"id": key, "text": text, "size": 1, "gold": "circle"})


def write(folder: Path, name: str, *lines: str) -> Path:
    path = folder / "in" / name
    path.write_text("\n".join(lines) + "\n")
    return path


def tonight(job: Job, **choices: Any) -> Night:
    return run_night(job, Choices(**choices))


def rows(output: Output) -> list[dict[str, Any]]:
    return [row for table in output.iter_tables() for row in table.to_pylist()]


def test_retry_of_the_version_in_force_is_published(
    echo_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_input(tmp_path, num_parquet=3)
    write(tmp_path, "b.jsonl", line("b0"), "{", line("b2"))
    job = make_job(echo_checkpoint, tmp_path, 3)
    bounded = tonight(job, max_units=1)
    assert (bounded.state, bounded.processed_units, bounded.left_units, bounded.version) == (
        "bounded",
        1,
        1,
        None,
    )
    over = run_night(job, Choices(), stop=Stop(seconds=0.0))
    assert (over.state, over.processed_units, over.left_units) == ("bounded", 0, 1)
    assert tonight(job).processed_units == 1
    assert retry(job.output, []) == 3
    capsys.readouterr()
    gc(job.output)
    assert "removed parts/unit-00000001-g1-" in capsys.readouterr().out
    assert [row["attempts"] for row in rows(Output.at(job.output)) if row["status"] == "error"] == [
        2
    ]
    (tmp_path / "in" / "b.jsonl").unlink()
    assert (tonight(job).processed_rows, tonight(job).state) == (0, "unchanged")
    assert retry(job.output, []) == 3
    assert "1 failed rows are of deleted input files" in " ".join(capsys.readouterr().out.split())
    assert [row["attempts"] for row in rows(Output.at(job.output)) if row["status"] == "error"] == [
        2
    ]


def test_nights(echo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_input(tmp_path, num_parquet=10)
    job = make_job(echo_checkpoint, tmp_path, 3)
    first = tonight(job)
    assert (first.state, first.processed_rows, first.adopted_units) == ("finished", 10, 0)
    write(tmp_path, "b.jsonl", *(line(f"b{n}") for n in range(7)))
    second = tonight(job)
    assert (second.state, second.processed_rows, second.adopted_units) == ("finished", 7, 4)
    write(tmp_path, "b.jsonl", *(line(f"b{n}", "changed" if n == 4 else "shape") for n in range(8)))
    third = tonight(job)
    assert (third.processed_rows, third.adopted_units) == (3 + 2, 5)
    (tmp_path / "in" / "a.parquet").unlink()
    os.utime(tmp_path / "in" / "b.jsonl")
    fourth = tonight(job)
    assert (fourth.processed_rows, fourth.adopted_units, fourth.deleted_rows) == (0, 7, 10)
    found = rows(Output.at(job.output))
    from dataclasses import replace

    fresh = run(replace(job, output=str(tmp_path / "fresh")))
    expected = rows(fresh.output)
    assert found[:8] == expected
    assert [row["row_key"] for row in found[8:]] == [f"p{n}" for n in range(10)]
    assert tonight(job).state == "unchanged"
    assert tonight(job, drop_deleted=True).state == "finished"
    assert rows(Output.at(job.output)) == expected
