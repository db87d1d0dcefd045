"""Drivers killed at each step of the commit protocol: a rerun completes the output, every row once,
nothing torn.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from glm_batch.pipelines.output.commit import Output
from tests.pipelines.output.crashing_driver import NUM_ROWS, label

ROOT = Path(__file__).parents[3]
UNITS = 6
# (point, how often a whole run reaches it)
POINTS = [
    ("before_plan", 1), ("after_plan", 1), ("before_lease", 1), ("after_lease", 1), ("before_part", UNITS),
    ("before_rename", UNITS + 2), ("after_part", UNITS), ("before_record", UNITS), ("before_link", UNITS + 3),
    ("after_record", UNITS), ("before_manifest", 1), ("after_manifest", 1),
]  # fmt: skip
AIMS = [
    f"{point}:{count}" for point, most in POINTS for count in sorted({1, (most + 1) // 2, most})
]


def drive(folder: Path, aim: str = "", command: str = "label") -> int:
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "GLM_BATCH_CRASH_AT": aim}
    driver = [
        sys.executable,
        str(Path(__file__).with_name("crashing_driver.py")),
        str(folder),
        command,
    ]
    return subprocess.run(driver, env=environment, check=False, timeout=200).returncode


def check_rows(output: Output) -> None:
    keys = [key for table in output.iter_tables() for key in table["row_key"].to_pylist()]
    assert keys == [str(row) for row in range(NUM_ROWS)]


def files(folder: Path, name: str) -> set[str]:
    return {path.name for path in (folder / name).iterdir()}


@pytest.mark.parametrize("aim", AIMS)
def test_a_kill_at_any_step_costs_nothing_but_time(tmp_path: Path, aim: str) -> None:
    folder = tmp_path / "out"
    assert drive(folder, aim) == -signal.SIGKILL
    output = Output.at(str(folder))
    before = {path: path.read_bytes() for path in folder.glob("commits/*")}
    label(output)
    check_rows(output)
    assert {path: path.read_bytes() for path in before} == before
    assert len(files(folder, "commits")) == UNITS


def test_any_number_of_kills_in_a_row(tmp_path: Path) -> None:
    """Seeded: each rerun dies somewhere, until one comes through because it gets nowhere near its
    aim.
    """
    chance, folder = random.Random(5), tmp_path / "out"
    steps = [point for point, most in POINTS if most > 1]
    kills = 0
    while drive(folder, f"{chance.choice(steps)}:{chance.randint(1, 2)}") == -signal.SIGKILL:
        kills += 1
    assert kills > 3
    output = Output.at(str(folder))
    label(output)
    check_rows(output)
    assert drive(folder, command="gc") == 0
    check_rows(output)
    assert len(files(folder, "parts")) == len(files(folder, "commits")) == UNITS
    assert files(folder, "tmp") == set()
