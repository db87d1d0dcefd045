"""A job whose replica is several processes: it answers as one does, and outlives each of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glm_batch.glm_actors.faults.suspects import Patience
from glm_batch.models.engine import SamplingParams
from glm_batch.models.engine.echo import EchoEngine
from glm_batch.pipelines import run
from glm_batch.pipelines.job import CommitSection, EngineSection, Job, TaskConfig
from glm_batch.pipelines.metrics.counts import Progress
from glm_batch.pipelines.output.commit import Output
from tests.pipelines.graph.test_culprits import actor_with, write_input
from tests.pipelines.graph.test_culprits import make_job as make_echo_job
from tests.ray_processes import NewProcesses

pytestmark = pytest.mark.usefixtures("ray_cluster")

CHECKPOINT = Path(__file__).parents[3] / "examples" / "tiny_glm"
NUM_ROWS = 300
UNIT_ROWS = 10


def make_job(folder: Path, name: str, ranks: int) -> Job:
    return Job(
        model=str(CHECKPOINT),
        input=[str(folder / "in.parquet")],
        output=str(folder / name),
        key="id",
        task=TaskConfig(kind="generate", prompt="Which team handles this ticket?\n\n{text}"),
        sampling=SamplingParams(max_tokens=6, ignore_eos=True),
        engine=EngineSection(
            kind="torch", dtype="float32", device="cpu", tensor_parallel_size=ranks
        ),
        commit=CommitSection(unit_rows=UNIT_ROWS),
    )


def records(job: Job) -> list[tuple[Any, ...]]:
    return [
        (row["row_key"], row["status"], row["text"], row["output_tokens"])
        for table in Output.at(job.output).iter_tables()
        for row in table.to_pylist()
    ]


class Killer:
    """Kills the first of the chosen once a tenth, the second once half of the units are committed.

    The second may be on its way back then, because what is committed was answered before.
    """

    def __init__(self, *chosen: Callable[[], list[psutil.Process]]) -> None:
        self._chosen = list(chosen)
        self.killed: list[int] = []

    def __call__(self, progress: Progress) -> None:
        share = progress.units_done / max(1, progress.units_total)
        if self._chosen and share > 0.1 + 0.4 * len(self.killed):
            chosen = self._chosen.pop(0)
            deadline = time.monotonic() + 60.0
            while not (found := chosen()):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            self.killed.append(found[0].pid)
            os.kill(found[0].pid, signal.SIGKILL)


def test_a_job_outlives_each_of_its_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glm_batch.pipelines.graph.stages.PATIENCE", Patience(backoff_s=0.1))
    texts = [
        f"ticket {row}: my parcel {'is late ' * (row % 7)}and I was billed twice"
        for row in range(NUM_ROWS)
    ]
    pq.write_table(
        pa.table({"id": [f"r{row}" for row in range(NUM_ROWS)], "text": texts}),
        tmp_path / "in.parquet",
    )
    alone, together = make_job(tmp_path, "alone", 1), make_job(tmp_path, "together", 2)
    run(alone)
    ranks, leaders = NewProcesses("ray::Rank"), NewProcesses("ray::MapWorker(MapBatches(ModelActor")
    kill = Killer(ranks, leaders)
    result = run(together, kill)
    assert len(kill.killed) == 2
    assert result.summary.counts.ok == NUM_ROWS
    assert records(together) == records(alone)
    _, left = psutil.wait_procs(ranks(), timeout=20)
    assert not left


def test_replicas_are_added_while_units_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, echo_checkpoint: Path
) -> None:
    class Slow(EchoEngine):
        def step(self) -> Any:
            time.sleep(0.3)
            return super().step()

    write_input(tmp_path, num_rows=400)
    starts = tmp_path / "starts"
    monkeypatch.setattr("glm_batch.pipelines.graph.stages.ModelActor", actor_with(Slow, starts))
    job = replace(
        make_echo_job(echo_checkpoint, tmp_path, unit_rows=4),
        engine=EngineSection(kind="echo", replicas=(1, 2)),
    )
    assert run(job).summary.counts.ok == 400
    assert len(starts.read_text().split()) == 2
