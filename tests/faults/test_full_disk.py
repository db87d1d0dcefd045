"""A disk that fills up in the middle of a job: it ends with a clear error, and goes on when there
is room.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.faults.checks import check_output
from tests.faults.places import ROOT, Laptop
from tests.faults.workloads import echo_job, undisturbed_here

COMMITTED_BEFORE = 10


def mounting() -> list[str] | None:
    """What to put before a command that mounts, so that nobody else sees it; None where this may
    not be done.
    """
    for flags in ("-rm", "-m"):
        unshare = ["unshare", flags]
        tried = subprocess.run(
            [*unshare, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False
        )
        if tried.returncode == 0:
            return unshare
    return None


@pytest.mark.usefixtures("ray_cluster")
def test_a_full_disk_ends_the_job_and_room_lets_it_go_on(
    echo_checkpoint: Path, tmp_path: Path
) -> None:
    job = echo_job(echo_checkpoint, tmp_path, 400)
    workload = undisturbed_here(job, tmp_path / "undisturbed")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    before = mounting()
    script = [
        sys.executable,
        "-m",
        "tests.faults.small_disk",
        str(tmp_path),
        "limit" if before is None else "mount",
    ]
    done = subprocess.run(
        [*(before or []), *script],
        cwd=ROOT,
        env=Laptop().environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["first"]["code"] == 1, told["first"]["err"]
    cause = "File too large" if before is None else "No space left on device"
    said = " ".join(told["first"]["err"].split())
    for words in (
        "the job failed",
        "cannot be written",
        cause,
        "run the same command again",
        "what is committed stays",
    ):
        assert words in said
    assert "Traceback" not in said
    assert COMMITTED_BEFORE <= told["then"]["units_done"] < told["then"]["units"]
    assert (told["then"]["finished"], told["then"]["problems"]) == (False, [])
    assert told["second"]["code"] == 0, told["second"]["err"]
    check_output(tmp_path / "finished", workload)
