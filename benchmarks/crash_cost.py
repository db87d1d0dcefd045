"""`python -m benchmarks.crash_cost`: how much work a SIGKILL costs, and how soon a restarted job
goes on.

First: rows that an EchoEngine of RATE rows/s has to do again after a kill, against
`commit.every_seconds` and `commit.unit_rows`. Second: a restart on a job that is 99 % finished,
from process start to the first new commit. The machinery of the kills is tests.faults'; this module
owns the questions and the report.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks import BUILD, ROOT
from benchmarks.machine import describe
from tests.faults.campaign import run_campaign
from tests.faults.driver import Pace
from tests.faults.places import Farm, Laptop
from tests.faults.workloads import echo_job, undisturbed

TARGETS = ("driver", "model", "preprocessor")
EVERY_SECONDS = (1.0, 4.0)
UNIT_ROWS = (50, 1000)
PACE = Pace(folder="", step_s=0.1, step_rows=10)
RATE = PACE.step_rows / PACE.step_s
KILLS_IN_A_JOB = 2
NUM_ROWS = 4000
RESUMED_ROWS, RESUMED_UNIT_ROWS = 100_000, 500
MISSING = 0.01


def main(
    seed: Annotated[int, typer.Option(help="of the moments of the kills")] = 1,
    jobs: Annotated[
        int, typer.Option(min=1, help=f"per line, each killed {KILLS_IN_A_JOB} times")
    ] = 2,
    restarts: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Prints both tables, and writes them as JSON."""
    console, folder = Console(), BUILD / "crash_cost"
    shutil.rmtree(folder, ignore_errors=True)
    report: dict[str, Any] = {"machine": describe(), "seed": seed, "rows_per_s": RATE}
    with Farm(num_nodes=1) as farm:
        report["kills"] = [
            line
            for every_s in EVERY_SECONDS
            for unit_rows in UNIT_ROWS
            for line in _kills(
                farm, folder / f"{every_s}-{unit_rows}", every_s, unit_rows, seed, jobs
            )
        ]
    report["restarts"] = _restarts(folder / "restart", restarts)
    path = BUILD / f"crash-cost-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps(report, indent=1))
    _show(console, report)
    console.print(f"written to {path}")


def _kills(
    farm: Farm, folder: Path, every_s: float, unit_rows: int, seed: int, num_jobs: int
) -> list[dict[str, Any]]:
    job = echo_job(
        ROOT / "examples" / "tiny_glm", folder, NUM_ROWS, unit_rows=unit_rows, every_seconds=every_s
    )
    workload = undisturbed(job, PACE, farm, folder / "undisturbed")
    lines = []
    for target in TARGETS:
        tallies = [
            run_campaign(
                target,
                farm,
                workload,
                [target],
                KILLS_IN_A_JOB,
                seed + number,
                folder / f"{target}-{number}",
            )
            for number in range(num_jobs)
        ]
        kills = sum(tally.kills.total() for tally in tallies)
        again = sum(tally.rows_again for tally in tallies) / kills
        recovered_s = [seconds for tally in tallies for seconds in tally.recovered_s]
        lines.append(
            {
                "target": target,
                "every_seconds": every_s,
                "unit_rows": unit_rows,
                "kills": kills,
                "rows_again": again,
                "seconds_again": again / RATE,
                "next_commit_s": sum(recovered_s) / max(len(recovered_s), 1),
            }
        )
    return lines


def _restarts(folder: Path, times: int) -> dict[str, Any]:
    """Seconds from process start to the first new commit, and to the exit, on a job of which few
    units are missing.
    """
    job = echo_job(
        ROOT / "examples" / "tiny_glm", folder, RESUMED_ROWS, unit_rows=RESUMED_UNIT_ROWS
    )
    out = folder / "out"
    (folder / "job.yaml").write_text(yaml.safe_dump(job | {"output": str(out)}))
    _label(folder)
    num_missing = round(MISSING * RESUMED_ROWS / RESUMED_UNIT_ROWS)
    first_s, whole_s = [], []
    for _ in range(times):
        # As if the driver had died before it committed these.
        missing = sorted((out / "commits").iterdir())[-num_missing:]
        for path in [*missing, out / "manifest.json"]:
            path.unlink()
        begun = time.time()
        _label(folder)
        whole_s.append(time.time() - begun)
        first_s.append(min(path.stat().st_mtime for path in missing) - begun)
    return {
        "rows": RESUMED_ROWS,
        "missing_units": num_missing,
        "first_commit_s": first_s,
        "exit_s": whole_s,
    }


def _label(folder: Path) -> None:
    command = [sys.executable, "-m", "glm_batch.jobs", "label", str(folder / "job.yaml")]
    done = subprocess.run(
        command, cwd=ROOT, env=Laptop().environment(), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(
            f"glm-batch label ended with exit status {done.returncode}:\n{done.stderr}"
        )


def _show(console: Console, report: dict[str, Any]) -> None:
    console.print_json(data=report["machine"])
    headings = [
        "killed",
        "every_seconds",
        "unit_rows",
        "kills",
        "rows again/kill",
        "engine's seconds",
        "to next commit s",
    ]
    table = Table(*headings, title=f"an engine of {report['rows_per_s']:.0f} rows/s")
    for line in report["kills"]:
        table.add_row(
            line["target"], f"{line['every_seconds']:g}", str(line["unit_rows"]),
            str(line["kills"]),
            f"{line['rows_again']:.0f}", f"{line['seconds_again']:.2f}",
            f"{line['next_commit_s']:.1f}",
        )  # fmt: skip
    console.print(table)
    restarts = report["restarts"]
    first, whole = (
        " ".join(f"{seconds:.1f}" for seconds in restarts[name])
        for name in ("first_commit_s", "exit_s")
    )
    console.print(
        f"restart with {restarts['missing_units']} units missing of {restarts['rows']:,} "
        f"rows: the first new commit "
        f"after {first} s, the end after {whole} s"
    )


if __name__ == "__main__":
    typer.run(main)
