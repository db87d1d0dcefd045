"""Ends before the last row: signals, too many failed rows, another driver. Each leaves an output that goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.__main__ import EXIT_BAD_CONFIG, EXIT_ROW_ERRORS
from pipelines.commit import Output

ROOT = Path(__file__).parents[2]
NUM_ROWS = 1200


@pytest.fixture
def long_job(work: Any) -> Any:
    """A job of many small units, so that it can be met at work."""
    lines = (json.dumps({"id": row, "text": f"row {row}", "team": "red", "score": 1.0}) for row in range(NUM_ROWS))
    (work.root / "data" / "long.jsonl").write_text("\n".join(lines))
    changes = {"input": ["data/long.jsonl"], "commit": {"unit_rows": 4}}
    work.write_job(lambda job: job.update(changes))
    return work


def start(work: Any, *arguments: str) -> subprocess.Popen[str]:
    """`glm-batch label` in a process group of its own, as a shell starts it; returns when units are committed."""
    driver = subprocess.Popen(
        [sys.executable, "-m", "jobs", "label", "job.yaml", *arguments],
        cwd=work.root,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 90
    while len(list((work.root / "out" / "commits").glob("*"))) < 5:
        assert driver.poll() is None, driver.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return driver


def check_rest(work: Any) -> None:
    """The rerun does what is left, and every row is there once."""
    before = Output.at("out").status()
    assert 0 < before.units_done < before.num_units
    assert not before.finished
    done = work.run("label", "job.yaml")
    assert done.code == 0, done.err
    assert f"{before.counts.rows:,} of them from an earlier run" in " ".join(done.out.split())
    keys = [key for table in Output.at("out").iter_tables() for key in table["row_key"].to_pylist()]
    assert keys == [str(row) for row in range(NUM_ROWS)]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_commits_what_is_finished_and_ends(long_job: Any, signum: signal.Signals, code: int) -> None:
    driver = start(long_job)
    begun = time.monotonic()
    # A terminal sends Ctrl-C to the whole group; a supervisor tells the driver alone.
    os.killpg(driver.pid, signum) if signum == signal.SIGINT else driver.send_signal(signum)
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == code, err
    assert time.monotonic() - begun < 15  # units of four rows are finished long before the grace period ends
    for part in ("stopping: committing what is finished", "units (", "the same command goes on from there"):
        assert part in err
    assert "Traceback" not in err
    check_rest(long_job)


def test_a_second_signal_ends_at_once_and_a_second_driver_is_refused(long_job: Any) -> None:
    driver = start(long_job)
    os.kill(driver.pid, signal.SIGSTOP)  # so that it is not done too soon, and both signals are waiting for it
    second = long_job.run("label", "job.yaml")
    assert second.code == EXIT_BAD_CONFIG
    assert f"is being written by another driver (process {driver.pid} of" in " ".join(second.err.split())
    for signum in (signal.SIGINT, signal.SIGTERM):
        os.kill(driver.pid, signum)
    os.kill(driver.pid, signal.SIGCONT)
    begun = time.monotonic()
    driver.communicate(timeout=30)
    assert driver.returncode in (130, 143)
    assert time.monotonic() - begun < 5
    check_rest(long_job)


def test_fail_fast_ends_early_and_drops_no_row(work: Any) -> None:
    bad = ["{"] * 3
    good = [json.dumps({"id": row, "text": f"row {row}", "team": "red", "score": 1.0}) for row in range(297)]
    (work.root / "data" / "long.jsonl").write_text("\n".join([*bad, *good]))
    changes = {"input": ["data/long.jsonl"], "commit": {"unit_rows": 10}, "fail_fast": True, "max_error_rate": 0.005}
    work.write_job(lambda job: job.update(changes))
    done = work.run("label", "job.yaml")
    assert done.code == EXIT_ROW_ERRORS, done.err
    assert "3 rows failed (bad_json 3), and max_error_rate allows 0.50% of 300" in done.err
    assert not Output.at("out").status().finished
    again = work.run("label", "job.yaml")
    assert (again.code, "ray" in again.imported) == (EXIT_ROW_ERRORS, False)
    rest = work.run("label", "job.yaml", "--set", "fail_fast=false")
    assert rest.code == EXIT_ROW_ERRORS
    status = Output.at("out").status()
    assert (status.finished, status.counts.rows, status.counts.errors) == (True, 300, {"bad_json": 3})


@pytest.mark.parametrize("point", ["after_part", "after_record"])
def test_a_worker_that_dies_while_it_commits_is_replaced(
    work: Any, point: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    marker = tmp_path / "died"
    lines = [json.dumps({"id": row, "text": f"row {row}", "team": "red", "score": 1.0}) for row in range(100)]
    (work.root / "data" / "long.jsonl").write_text("\n".join(lines))
    work.write_job(lambda job: job.update({"input": ["data/long.jsonl"], "commit": {"unit_rows": 5}}))
    monkeypatch.setenv("GLM_BATCH_CRASH_AT", f"{point}:3@{marker}")
    done = work.run("label", "job.yaml")
    assert done.code == 0, done.err
    assert marker.exists()
    output = Output.at("out")
    keys = [key for table in output.iter_tables() for key in table["row_key"].to_pylist()]
    assert keys == [str(row) for row in range(100)]
    orphans = len(list(Path("out/parts").iterdir())) - 20
    assert orphans == (1 if point == "after_part" else 0)
    gc = work.run("gc", "out")
    assert (gc.code, "ray" in gc.imported) == (0, False)
    assert f"removed {orphans} files" in gc.out
    verified = work.run("status", "out", "--verify")
    assert verified.code == 0
    assert "verified 20 parts" in verified.out
    part = next(Path("out/parts").iterdir())
    part.write_bytes(part.read_bytes()[:-1])
    damaged = work.run("status", "out", "--verify")
    assert damaged.code == 1
    assert part.name in damaged.err
    assert "1 damaged" in damaged.out
