"""`glm-batch demo` from an installed wheel, in a folder that holds nothing."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from glm_batch.jobs.demo.demo import JOBS
from tests.packaging.conftest import ROOT, run

NOWHERE = "http://127.0.0.1:9"  # a proxy that is not there: whatever is fetched fails


@pytest.mark.parametrize("python", ["wheel"], indirect=True)
def test_the_demo_runs_in_an_empty_folder(python: Path, tmp_path: Path) -> None:
    proxies = {"HTTP_PROXY": NOWHERE, "HTTPS_PROXY": NOWHERE}
    shown = run(
        python, "-m", "glm_batch.jobs", "demo", "motion", cwd=tmp_path, timeout=240, **proxies
    )
    assert "accuracy" in shown
    counts = json.loads((tmp_path / "out/demo/motion/manifest.json").read_text())["counts"]
    assert counts["gold_correct"] >= 0.98 * counts["gold_rows"] > 0


def test_the_wheel_has_what_every_demo_reads(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [f"{name}.yaml" for name in (*JOBS, "requests", "serve", "sweep")]
    for folder in ("tiny_glm", "support", "shapes", "clips"):
        files += [f"{folder}/{path.name}" for path in (ROOT / "examples" / folder).iterdir()]
    assert {f"glm_batch/examples/{name}" for name in files} <= names
