"""Each optional room can be taken away: what is left plans and labels texts and pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from glm_batch.models import rooms
from tests.packaging.conftest import CLUSTER_ENVIRONMENT, ROOT, clean_environment, copy_product, run

EXAMPLES = ROOT / "examples"
COMMANDS = [["plan", "text.yaml"], ["label", "text.yaml"], ["label", "image.yaml"]]
ON_RAY = f"""
from glm_batch.jobs.__main__ import app
from glm_batch.pipelines.cluster.cluster import cluster

with cluster():
    for arguments in {COMMANDS}:
        try:
            app(arguments)
        except SystemExit as end:
            assert end.code == 0, arguments
"""
INPUTS = {"text": "text.jsonl", "image": "image.parquet"}
TASKS: dict[str, dict[str, Any]] = {
    "text": {"kind": "choose", "prompt": "{text}", "labels": ["billing", "shipping"]},
    "image": {"kind": "choose", "prompt": "Shape?", "image": "image", "labels": ["circle", "star"]},
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A job over two texts and one over two pictures, in a folder of their own."""
    folder = tmp_path / "jobs"
    folder.mkdir()
    texts = ["Where is my parcel?", "I was charged twice."]
    (folder / INPUTS["text"]).write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    images = pq.read_table(EXAMPLES / "shapes" / "shapes-1.parquet", columns=["image"])
    pq.write_table(images.slice(0, 2), folder / INPUTS["image"])
    for name, task in TASKS.items():
        job = {
            "model": str(EXAMPLES / "tiny_glm"),
            "input": [INPUTS[name]],
            "output": f"out/{name}",
            "task": task,
            "engine": {"kind": "torch"},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(job))
    return folder


@pytest.fixture(scope="module")
def forks() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("label_here.py"))],
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.communicate("")


def product_without(rooms_gone: Sequence[str], target: Path) -> str:
    """The folder that holds a glm_batch without these rooms."""
    target.mkdir()
    gone = [folder for name in rooms_gone for folder in rooms.ROOMS[name].folders]
    return str(copy_product(target, gone) / "src")


def assert_labelled(place: Path) -> None:
    for name in TASKS:
        (part,) = json.loads((place / "out" / name / "manifest.json").read_text())["parts"]
        table = pq.read_table(place / "out" / name / part["part"])
        assert table["status"].to_pylist() == ["ok", "ok"]


@pytest.mark.parametrize("room", rooms.ROOMS)
def test_jobs_run_without(
    room: str, tmp_path: Path, place: Path, forks: subprocess.Popen[str]
) -> None:
    assert forks.stdin is not None
    assert forks.stdout is not None
    source = product_without([room], tmp_path / "product")
    print(json.dumps([source, str(place), COMMANDS]), file=forks.stdin, flush=True)
    assert forks.stdout.readline() == "0\n", (place / "log").read_text()
    assert_labelled(place)


def test_jobs_run_on_ray_without_any(tmp_path: Path, place: Path, ray_address: str) -> None:
    source = product_without(list(rooms.ROOMS), tmp_path / "product")
    run(
        sys.executable,
        "-c",
        ON_RAY,
        cwd=place,
        timeout=280,
        PYTHONPATH=source,
        RAY_ADDRESS=ray_address,
        **CLUSTER_ENVIRONMENT,
    )
    assert_labelled(place)
