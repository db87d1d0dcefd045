"""A run reads its input and its checkpoint once: what was checked is handed on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from glm_batch.jobs.commands.label import label
from glm_batch.jobs.commands.outputs import retry
from glm_batch.jobs.cron.cron import cron
from glm_batch.models.processing.tokenizer import Tokenizer
from glm_batch.pipelines.input import source as source_module
from glm_batch.pipelines.input.source import Source
from glm_batch.pipelines.runs import pipeline
from tests.pipelines.cron.cron_world import process_here
from tests.pipelines.runs.test_pipeline import write_input


@pytest.fixture
def job_file(echo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of 23 rows in one Parquet and 2 in one JSONL file, run in this process."""
    write_input(tmp_path, jsonl=('{"id": "j0", "text": "a", "size": 1, "gold": "circle"}', "{"))
    path = tmp_path / "job.yaml"
    task = {"kind": "choose", "prompt": "{text}", "labels": ["circle", "square"], "gold": "gold"}
    job = {"model": str(echo_checkpoint), "input": [str(tmp_path / "in")], "task": task}
    job |= {"output": str(tmp_path / "out"), "key": "id", "carry": ["id", "size"]}
    path.write_text(yaml.safe_dump(job | {"engine": {"kind": "echo"}, "max_error_rate": 1.0}))
    for name in ("runs.pipeline", "runs.retry_run", "cron.incremental"):
        monkeypatch.setattr(f"glm_batch.pipelines.{name}.process", process_here)
    return path


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each is done by the driver; workers' tokenizers are their own."""
    found: Counter[str] = Counter()

    def count(owner: Any, name: str, what: str) -> None:
        do: Callable[..., Any] = getattr(owner, name)

        def counting(*arguments: Any, **options: Any) -> Any:
            found[what] += 1
            return do(*arguments, **options)

        monkeypatch.setattr(
            owner, name, staticmethod(counting) if what == "tokenizers" else counting
        )

    count(source_module, "list_files", "listings")
    count(Source, "_look", "footers")
    count(Source, "_sampled_schema", "samples")
    count(Tokenizer, "from_dir", "tokenizers")

    def work_here(*arguments: Any, **options: Any) -> None:
        before = found["tokenizers"]
        process_here(*arguments, **options)
        found["tokenizers"] = before

    for name in ("runs.pipeline", "runs.retry_run", "cron.incremental"):
        monkeypatch.setattr(f"glm_batch.pipelines.{name}.process", work_here)
    return found


ONCE = {"listings": 1, "footers": 1, "samples": 1, "tokenizers": 1}


def test_label(job_file: Path, counted: Counter[str]) -> None:
    assert label(str(job_file), []) == 0
    assert counted == ONCE
    counted.clear()
    assert label(str(job_file), []) == 0
    assert counted == ONCE


def test_retry(job_file: Path, counted: Counter[str]) -> None:
    """One file has a row that failed; it is looked at again, and no other."""
    label(str(job_file), [])
    counted.clear()
    assert retry(str(job_file.parent / "out"), []) == 0
    assert counted == {"listings": 1, "tokenizers": 1}


def test_cron(job_file: Path, counted: Counter[str]) -> None:
    assert cron(str(job_file), []) == 0
    assert counted == ONCE
    counted.clear()
    assert cron(str(job_file), []) == 0
    assert counted == {"listings": 1}  # there was nothing to do
    with (job_file.parent / "in" / "b.jsonl").open("a") as stream:
        stream.write('{"id": "j1", "text": "b", "size": 2, "gold": "circle"}\n')
    counted.clear()
    assert cron(str(job_file), []) == 0
    assert counted == ONCE


def test_run_from_python(job_file: Path, counted: Counter[str]) -> None:
    from glm_batch.jobs.files.sections import load_job

    job, _ = load_job(str(job_file), [])
    pipeline.run(job)
    assert counted == ONCE
