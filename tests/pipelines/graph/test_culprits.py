"""Processes that die in the middle of a job cost nothing but the rows that kill them."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glm_batch.glm_actors.engines.engine_loop import EngineLoop
from glm_batch.glm_actors.faults.suspects import Patience
from glm_batch.glm_actors.faults.watchdog import HangLimits
from glm_batch.glm_actors.units.model_actor import ModelActor
from glm_batch.glm_actors.units.row_worker import RowWorker, Step
from glm_batch.models.engine.echo import EchoEngine
from glm_batch.models.errors import EngineError, RowError
from glm_batch.pipelines import run
from glm_batch.pipelines.graph.stages import Committer, Preprocessor
from glm_batch.pipelines.graph.steps import ORDER, Order
from glm_batch.pipelines.job import CommitSection, EngineSection, Job, TaskConfig
from glm_batch.pipelines.output.commit import Output

pytestmark = pytest.mark.usefixtures("ray_cluster")

POISON_TOKENS = 6  # of a word of poison
LONG, LONGER = 15, 7  # words of the first kind of poison, and what each further one has more
NUM_ROWS = 200
BAD_ROWS = (3, 117)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glm_batch.pipelines.graph.stages.PATIENCE", Patience(backoff_s=0.1))


def make_job(checkpoint: Path, folder: Path, name: str = "out", unit_rows: int = 25) -> Job:
    return Job(
        model=str(checkpoint),
        input=[str(folder / "in")],
        output=str(folder / name),
        key="id",
        carry=["id"],
        task=TaskConfig(kind="choose", prompt="Which shape? {text}", labels=["circle", "square"]),
        engine=EngineSection(kind="echo"),
        commit=CommitSection(unit_rows=unit_rows),
    )


def write_input(folder: Path, bad: tuple[int, ...] = (), num_rows: int = NUM_ROWS) -> None:
    """Rows of shapes; in those that are `bad` is a poison, in each of another kind."""
    (folder / "in").mkdir()
    poisons = {row: "poison " * (LONG + kind * LONGER) for kind, row in enumerate(bad)}
    texts = [poisons.get(row, f"shape {row}") for row in range(num_rows)]
    table = pa.table({"id": [f"r{row}" for row in range(num_rows)], "text": texts})
    pq.write_table(table, folder / "in" / "a.parquet")


def records(job: Job) -> list[dict[str, Any]]:
    return [row for table in Output.at(job.output).iter_tables() for row in table.to_pylist()]


def assert_only_these_failed(
    rows: list[dict[str, Any]], code: str, bad: tuple[int, ...] = BAD_ROWS
) -> list[str]:
    """The messages of the failed rows; all others are answered, once each, in order."""
    assert [row["row_key"] for row in rows] == [f"r{row}" for row in range(NUM_ROWS)]
    failed = [index for index, row in enumerate(rows) if row["error_code"] is not None]
    assert tuple(failed) == bad
    assert {rows[index]["error_code"] for index in failed} == {code}
    assert all(row["label"] is not None for index, row in enumerate(rows) if index not in failed)
    return [rows[index]["error_message"] for index in failed]


def actor_with(engine: Callable[[], EchoEngine], starts: Path) -> type:
    """A ModelActor with another engine, that notes each of its processes in the file `starts`."""

    class Actor(ModelActor):
        def _load(self, config: Any, watchdog: Any) -> None:
            with starts.open("a") as file:
                file.write(f"{os.getpid()}\n")
            self._loop = EngineLoop(engine, watchdog)

    return Actor


def poisoned_engine(ends: Sequence[Callable[[], None]]) -> Callable[[], EchoEngine]:
    """An engine that each kind of poison ends in its own way."""

    def build() -> EchoEngine:
        class Poisoned(EchoEngine):
            def step(self) -> Any:
                for request in self._waiting.values():
                    if len(request.input_ids) >= LONG * POISON_TOKENS:
                        ends[(len(request.input_ids) // POISON_TOKENS - LONG) // LONGER]()
                return super().step()

        return Poisoned()

    return build


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crash() -> None:
    ctypes.string_at(0)


def fail() -> None:
    raise MemoryError("a matrix that nothing can hold")


def hang() -> None:
    time.sleep(300)


def test_rows_that_end_the_engine_fail_alone(
    echo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = (3, 60, 117, 118)
    ends = (kill_self, crash, fail, hang)
    words = (
        "killed without a word", "Segmentation fault", "a matrix that nothing can hold", "a step of the engine hangs",
    )  # fmt: skip
    write_input(tmp_path, bad)
    monkeypatch.setattr(
        "glm_batch.pipelines.graph.stages.HANG_LIMITS", HangLimits(first_step_s=3.0, step_s=3.0)
    )
    monkeypatch.setattr(
        "glm_batch.pipelines.graph.stages.ModelActor",
        actor_with(poisoned_engine(ends), tmp_path / "starts"),
    )
    job = make_job(echo_checkpoint, tmp_path)
    result = run(job)
    messages = assert_only_these_failed(records(job), "worker_died", bad)
    for expected, message in zip(words, messages, strict=True):
        assert expected in message
    assert result.summary.counts.errors == {"worker_died": len(bad)}
    starts = (tmp_path / "starts").read_text().splitlines()
    assert 2 * len(bad) <= len(set(starts)) <= 5 * len(bad)


class Before:
    """A step that does something first."""

    def __init__(self, step: Step, before: Callable[[pa.Table, int, int], None]) -> None:
        self.step, self.before, self.name = step, before, step.name

    def num_rows(self, table: pa.Table) -> int:
        return self.step.num_rows(table)

    def __call__(
        self, table: pa.Table, start: int, stop: int, lost: RowError | None = None
    ) -> pa.Table:
        if not lost:
            self.before(table, start, stop)
        return self.step(table, start, stop, lost)


def worker_with(
    worker: type[RowWorker], name: str, before: Callable[[pa.Table, int, int], None], starts: Path
) -> type:
    """A worker that does something before the step `name`, and notes each of its processes in the
    file `starts`.
    """

    class Noted(worker):  # type: ignore[misc, valid-type]
        def __init__(self, build: Any, *others: Any) -> None:
            with starts.open("a") as file:
                file.write(f"{os.getpid()}\n")
            super().__init__(
                lambda: [Before(s, before) if s.name == name else s for s in build()], *others
            )

    return Noted


def at_bad_rows(table: pa.Table, start: int, stop: int) -> None:
    """Of a preprocessing worker's or a committing worker's table, whatever step it is before."""
    if ORDER in table.column_names:
        first = Order.from_table(table).rows.start
        keys = [f"r{row}" for row in range(first + start, first + stop)]
    else:
        names = "in.id" if "in.text" in table.column_names else "row_key"
        keys = table[names].to_pylist()[start:stop]
    if {f"r{row}" for row in BAD_ROWS} & set(keys):
        kill_self()


@pytest.mark.parametrize(
    ("worker", "step"),
    [(Preprocessor, "reading"), (Preprocessor, "preparing"), (Committer, "parsing")],
)
def test_rows_that_end_another_worker_fail_alone(
    echo_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    worker: type[RowWorker],
    step: str,
) -> None:
    write_input(tmp_path)
    patched = worker_with(worker, step, at_bad_rows, tmp_path / "starts")
    monkeypatch.setattr(f"glm_batch.pipelines.graph.stages.{worker.__name__}", patched)
    job = make_job(echo_checkpoint, tmp_path)
    run(job)
    rows = records(job)
    if step == "reading":  # the key of a row that nobody can read is its place
        assert [rows[row]["row_key"] for row in BAD_ROWS] == [
            f"{tmp_path}/in/a.parquet:{row}" for row in BAD_ROWS
        ]
        rows = [row | {"row_key": f"r{index}"} for index, row in enumerate(rows)]
    assert_only_these_failed(rows, "worker_died")


def test_a_commit_that_always_dies_ends_the_job(
    echo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def before(table: pa.Table, start: int, stop: int) -> None:
        if table["row_key"][0].as_py() == "r25":
            kill_self()

    write_input(tmp_path)
    workers = worker_with(Committer, "committing", before, tmp_path / "starts")
    monkeypatch.setattr("glm_batch.pipelines.graph.stages.Committer", workers)
    job = make_job(echo_checkpoint, tmp_path)
    with pytest.raises(EngineError, match=r"unit 1 cannot be committed: .*killed without a word"):
        run(job)
    assert len((tmp_path / "starts").read_text().splitlines()) <= 5
    monkeypatch.undo()
    run(job)  # goes on from there
    assert len(records(job)) == NUM_ROWS
