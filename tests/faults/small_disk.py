"""A job whose disk fills up in the middle, and that is run again once there is room; tells what
happened as JSON.

Run as: python -m tests.faults.small_disk FOLDER HOW, with a job.yaml in FOLDER. HOW is "mount", in
a process that may mount: the output then lies on a file system of SIZE bytes, which gets filled.
Elsewhere it is "limit": the kernel refuses every larger write of the job's processes. The finished
output is copied to FOLDER/finished.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import yaml

from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.state import status_of, verify
from tests.faults.driver import HURRY
from tests.faults.places import ROOT, Laptop, driver_command
from tests.faults.workloads import ECHO_PACE

SIZE = 3 << 20
COMMITS_BEFORE = 10
LIMIT = 1000  # bytes: less than a part has


def main(folder: Path, how: str) -> None:
    disk = folder / "disk"
    disk.mkdir()
    if how == "mount":
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(disk)], check=True
        )
    job = yaml.safe_load((folder / "job.yaml").read_text())
    (folder / "job.yaml").write_text(yaml.safe_dump(job | {"output": str(disk / "out")}))

    def fill(driver: subprocess.Popen[str]) -> None:
        if how == "mount":
            _write_until_full(disk / "ballast")
        else:
            _limit_files(driver.pid)

    first = _run(folder, disk / "out", fill)
    then = _state(disk / "out")
    (disk / "ballast").unlink(missing_ok=True)
    (folder / HURRY).touch()
    second = _run(folder, disk / "out", lambda driver: None)
    shutil.copytree(disk / "out", folder / "finished")
    print(json.dumps({"first": first, "then": then, "second": second}))


def _run(
    folder: Path, output: Path, when_at_work: Callable[[subprocess.Popen[str]], None]
) -> dict[str, Any]:
    """A driver's exit code and what it said."""
    command = driver_command(
        replace(ECHO_PACE, folder=str(folder)).to_json(), "label", str(folder / "job.yaml")
    )
    driver = subprocess.Popen(
        command,
        cwd=ROOT,
        env=Laptop().environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while driver.poll() is None and len(list((output / "commits").glob("*"))) < COMMITS_BEFORE:
        time.sleep(0.05)
    when_at_work(driver)
    _, err = driver.communicate()
    return {"code": driver.returncode, "err": err}


def _write_until_full(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError:  # full, as it should be
            return


def _limit_files(pid: int) -> None:
    driver = psutil.Process(pid)
    for process in [driver, *driver.children(recursive=True)]:
        process.rlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))


def _state(folder: Path) -> dict[str, Any]:
    """What the disk that is full holds."""
    output = Output.at(str(folder))
    status = status_of(output)
    return {
        "units_done": status.units_done,
        "units": status.num_units,
        "finished": status.finished,
        "problems": [problem for _, problem in verify(output) if problem],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
