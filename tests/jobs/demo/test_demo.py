"""`glm-batch demo` from an installed wheel, in a folder that holds nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from glm_batch.jobs.demo.demo import JOBS, demo
from glm_batch.models.errors import ConfigError

ROOT = Path(__file__).parents[3]
NOWHERE = "http://127.0.0.1:9"  # a proxy that is not there: whatever is fetched fails


def test_the_demo_of_a_wheel_runs_in_an_empty_folder(installed_wheel: Path, tmp_path: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(installed_wheel),
        "HTTP_PROXY": NOWHERE,
        "HTTPS_PROXY": NOWHERE,
    }
    done = subprocess.run(
        [sys.executable, "-m", "glm_batch.jobs", "demo", "motion"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
    counts = json.loads((tmp_path / "out/demo/motion/manifest.json").read_text())["counts"]
    assert counts["gold_correct"] >= 0.98 * counts["gold_rows"] > 0
    shown = subprocess.run(
        [sys.executable, "-c", "import glm_batch; print(glm_batch.__file__)"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(shown.stdout.strip()).is_relative_to(installed_wheel)


def test_the_wheel_has_what_every_demo_reads(installed_wheel: Path) -> None:
    examples = installed_wheel / "glm_batch/examples"
    for name in (*JOBS, "requests", "serve", "sweep"):
        assert (examples / f"{name}.yaml").is_file()
    for folder in ("tiny_glm", "support", "shapes", "clips"):
        kept = {path.name for path in (ROOT / "examples" / folder).iterdir()}
        assert {path.name for path in (examples / folder).iterdir()} == kept


def test_somebody_elses_examples_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "examples").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="not glm-batch's"):
        demo([])
    assert list((tmp_path / "examples").iterdir()) == []


def test_unknown_demos_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no demo is called rout; known: route, "):
        demo(["rout"])
