"""A user's script is checked by mypy and pyright, and an editor's go-to-definition ends in the
repository.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jedi
import pytest

from tests.packaging.conftest import ROOT, clean_environment

GOOD = """\
from glm_batch import Job, Request, SamplingParams, __version__, build_engine, load, run
from glm_batch.pipelines.job import TaskConfig

task = TaskConfig(kind="choose", prompt="{text}", labels=["a", "b"])
job = Job(model="m", input=["a.jsonl"], output="out", task=task, sampling=SamplingParams(seed=1))
rows: int = run(job).summary.counts.rows
version: str = __version__
answers = load("m").choose([{"role": "user", "content": "text"}], ["a", "b"])
engine, kind = build_engine, Request
"""
BAD = "\nJob(model=1, input=['a'], output='out', task=task)\n"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(GOOD + BAD)
    return path


def test_mypy_checks_a_users_script(script: Path) -> None:
    # With our own settings and from here, so that what `mypy` has found out of glm_batch is used.
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert len(errors) == 1, done.stdout + done.stderr
    assert f':{len(GOOD.splitlines()) + 2}: error: Argument "model" to "Job"' in errors[0]


def test_pyright_checks_a_users_script(script: Path, python: Path) -> None:
    """It finds the package as it is installed, and the mark that it is typed."""
    done = subprocess.run(
        [sys.executable, "-m", "basedpyright", "--pythonpath", str(python), "--outputjson", script],
        cwd=script.parent,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    found = json.loads(done.stdout)["generalDiagnostics"]
    errors = [each for each in found if each["severity"] == "error"]
    assert [each["range"]["start"]["line"] for each in errors] == [len(GOOD.splitlines()) + 1]
    assert "__init__" in errors[0]["message"] or '"model"' in errors[0]["message"]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("Job", "pipelines/job.py"),
        ("run", "pipelines/runs/pipeline.py"),
        ("load", "models/__init__.py"),
        ("Request", "models/engine/api/request.py"),
    ],
)
def test_go_to_definition_ends_in_the_repository(name: str, file: str) -> None:
    code = f"from glm_batch import {name}\n"
    project = jedi.Project(ROOT / "examples", added_sys_path=[str(ROOT / "src")])
    (found,) = jedi.Script(code, project=project).goto(
        1, len(code) - 2, follow_imports=True, follow_builtin_imports=True
    )
    assert found.module_path is not None
    assert found.module_path.resolve() == ROOT / file
