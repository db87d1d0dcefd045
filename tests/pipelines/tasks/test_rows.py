"""What a worker keeps between units: one job's runner, and nothing of the job before."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from glm_batch.pipelines.job import Job, TaskConfig
from glm_batch.pipelines.tasks import rows
from glm_batch.pipelines.tasks.task_runner import TaskRunner


def test_a_worker_that_goes_on_to_another_job_ends_the_decoder_of_the_first(
    echo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(model="m", input=["i"], output="o", task=TaskConfig(kind="generate", prompt="{text}"))
    first, second = (
        rows.TaskSpec(job=job, model_dir=str(echo_checkpoint), schema=pa.schema([]), run_id=name)
        for name in "ab"
    )
    monkeypatch.setattr(rows, "_runners", {})
    closed: list[object] = []
    monkeypatch.setattr(TaskRunner, "close", lambda runner: closed.append(runner))
    runner = rows.runner_of(first)
    assert rows.runner_of(first) is runner
    assert not closed
    assert rows.runner_of(second) is not runner
    assert closed == [runner]
