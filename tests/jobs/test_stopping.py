"""Ends before the last row: signals, too many failed rows, another driver. Each leaves an output
that goes on.
"""

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

from glm_batch.jobs.__main__ import EXIT_BAD_CONFIG, EXIT_ROW_ERRORS
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.state import collect, status_of

ROOT = Path(__file__).parents[2]
NUM_ROWS, UNIT_ROWS = 1200, 4


@pytest.fixture
def long_job(work: Any) -> Any:
    """A job of many small units, so that it can be met at work."""
    lines = (
        json.dumps({"id": row, "text": f"row {row}", "team": "red", "score": 1.0})
        for row in range(NUM_ROWS)
    )
    (work.root / "data" / "long.jsonl").write_text("\n".join(lines))
    changes = {"input": ["data/long.jsonl"], "commit": {"unit_rows": UNIT_ROWS}}
    work.write_job(lambda job: job.update(changes))
    return work


def start(work: Any) -> subprocess.Popen[str]:
    """`glm-batch label` in a process group of its own, as a shell starts it; returns when it has
    committed units.
    """
    commits = work.root / "out" / "commits"
    before = len(list(commits.glob("*")))
    driver = subprocess.Popen(
        [sys.executable, "-m", "glm_batch.jobs", "label", "job.yaml"],
        cwd=work.root,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while len(list(commits.glob("*"))) < before + 5:
        assert driver.poll() is None, driver.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return driver


def committed(work: Any) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (work.root / "out" / "commits").iterdir()}


def test_signals_commit_what_is_finished_and_every_rerun_goes_on(long_job: Any) -> None:
    """SIGTERM, Ctrl-C, then a second driver and two signals at once, one after the other on the
    same output.
    """
    stand: dict[str, bytes] = {}
    for signum, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        driver = start(long_job)
        # A terminal sends Ctrl-C to the whole group; a supervisor tells the driver alone.
        os.killpg(driver.pid, signum) if signum == signal.SIGINT else driver.send_signal(signum)
        _, err = driver.communicate(timeout=120)
        assert driver.returncode == code, err
        for part in (
            "stopping: committing what is finished",
            "units (",
            "the same command goes on from there",
        ):
            assert part in err
        assert "Traceback" not in err
        now = committed(long_job)
        assert stand.items() < now.items()
        assert len(now) < NUM_ROWS // UNIT_ROWS
        stand = now

    driver = start(long_job)
    # so that it is not done too soon, and both signals are waiting for it
    os.kill(driver.pid, signal.SIGSTOP)
    second = long_job.run("label", "job.yaml")
    assert second.code == EXIT_BAD_CONFIG
    assert f"is being written by another driver (process {driver.pid} of" in " ".join(
        second.err.split()
    )
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGCONT):
        os.kill(driver.pid, each)
    driver.communicate(timeout=60)
    assert driver.returncode in (130, 143)

    before = status_of(Output.at("out"))
    assert (before.finished, before.units_done < before.num_units) == (False, True)
    done = long_job.run("label", "job.yaml")
    assert done.code == 0, done.err
    assert f"{before.counts.rows:,} of them from an earlier run" in " ".join(done.out.split())
    keys = [key for table in Output.at("out").iter_tables() for key in table["row_key"].to_pylist()]
    assert keys == [str(row) for row in range(NUM_ROWS)]


def test_fail_fast_ends_early_and_drops_no_row(work: Any) -> None:
    bad = ["{"] * 3
    good = [
        json.dumps({"id": row, "text": f"row {row}", "team": "red", "score": 1.0})
        for row in range(297)
    ]
    (work.root / "data" / "long.jsonl").write_text("\n".join([*bad, *good]))
    changes = {
        "input": ["data/long.jsonl"],
        "commit": {"unit_rows": 10},
        "fail_fast": True,
        "max_error_rate": 0.005,
    }
    work.write_job(lambda job: job.update(changes))
    done = work.run("label", "job.yaml")
    assert done.code == EXIT_ROW_ERRORS, done.err
    assert "3 rows failed (bad_json 3), and max_error_rate allows 0.50% of 300" in done.err
    assert not status_of(Output.at("out")).finished
    again = work.run("label", "job.yaml")
    assert (again.code, "ray" in again.imported) == (EXIT_ROW_ERRORS, False)


def test_a_worker_that_dies_while_it_commits_is_replaced(
    work: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    marker = tmp_path / "died"
    lines = [
        json.dumps({"id": row, "text": f"row {row}", "team": "red", "score": 1.0})
        for row in range(100)
    ]
    (work.root / "data" / "long.jsonl").write_text("\n".join(lines))
    work.write_job(
        lambda job: job.update({"input": ["data/long.jsonl"], "commit": {"unit_rows": 5}})
    )
    monkeypatch.setenv("GLM_BATCH_CRASH_AT", f"after_part:3@{marker}")
    done = work.run("label", "job.yaml")
    assert done.code == 0, done.err
    assert marker.exists()
    output = Output.at("out")
    keys = [key for table in output.iter_tables() for key in table["row_key"].to_pylist()]
    assert keys == [str(row) for row in range(100)]
    # an orphan: the part that the dead worker did not commit
    assert len(list(Path("out/parts").iterdir())) == 21
    assert collect(output).num_bytes > 0
    assert len(list(Path("out/parts").iterdir())) == 20
