"""What an engine has finished of a long unit survives it: nothing that was put aside is computed
again.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from glm_batch.glm_actors.engines.engine_loop import EngineLoop
from glm_batch.glm_actors.faults.suspects import Patience
from glm_batch.glm_actors.units.batches import request_table, to_completions
from glm_batch.glm_actors.units.model_actor import ModelActor
from glm_batch.models.engine.api.interface import EngineConfig
from glm_batch.models.engine.api.request import Classify, Completion, Request
from glm_batch.models.engine.echo import EchoEngine
from glm_batch.models.errors import RowError
from glm_batch.pipelines import run
from glm_batch.pipelines.job import CommitSection
from glm_batch.pipelines.metrics.counts import Counts
from glm_batch.pipelines.output.commit import JOURNAL, Output
from glm_batch.pipelines.output.journal import Journal, leftovers
from glm_batch.pipelines.output.state import collect
from glm_batch.pipelines.storage.storage import StorageError, Store
from glm_batch.pipelines.tasks.rows import UNIT
from tests.pipelines.graph.test_culprits import NUM_ROWS, actor_with, make_job, records, write_input
from tests.pipelines.output.test_commit import commit, make_plan, rows

TABLE = pa.table({"row_key": ["a", "b"], "value": [1.5, None]})


@pytest.fixture
def journal(store: Store) -> Journal:
    output = Output(store)
    output.begin(make_plan())
    return Journal(output=output, every_seconds=0.1)


def files(output: Output) -> list[str]:
    return sorted(entry.name for page in output.store.pages(JOURNAL) for entry in page)


def test_units_and_generations_keep_apart_until_they_are_committed(journal: Journal) -> None:
    journal.write(0, TABLE)
    journal.write(0, TABLE.slice(1))
    journal.write(1, TABLE)
    again = replace(journal, generations={0: 1})
    again.write(0, TABLE.slice(0, 1))
    assert sorted(table.num_rows for table in journal.read(0)) == [1, 2]
    assert [table.to_pylist() for table in again.read(0)] == [TABLE.slice(0, 1).to_pylist()]
    journal.forget(0)
    assert journal.read(0) == []
    assert len(again.read(0)) == len(journal.read(1)) == 1


def test_a_damaged_file_counts_for_nothing(journal: Journal) -> None:
    journal.write(0, TABLE)
    (name,) = files(journal.output)
    journal.output.store.write(name, journal.output.store.read(name)[:-1])
    assert journal.read(0) == []


def test_leftovers_of_committed_units_go(journal: Journal) -> None:
    """As after a committer that died between its record and the journal."""
    journal.write(0, TABLE)
    journal.write(1, TABLE)
    commit(journal.output, 0, "a", "b")
    replace(journal, generations={0: 1}).write(0, TABLE)  # a retry of unit 0 is at work
    (left,) = leftovers(journal.output)
    assert left.name.startswith(f"{JOURNAL}/unit-00000000-g1-")
    assert [entry.name for entry in collect(journal.output).removed] == [left.name]
    assert len(files(journal.output)) == 2
    journal.output.commit(0, rows("a", "B"), Counts(rows=2, ok=2), generation=2)
    assert [entry.name for entry in leftovers(journal.output)] != []


def test_a_store_that_fails_is_told(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(store: Any, name: str, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(journal.output.store), "write", full)
    with pytest.raises(StorageError, match="No space left on device"):
        journal.write(0, TABLE)


def put_aside(journal: Journal, unit: int) -> set[str]:
    found = [each for table in journal.read(unit) for each in to_completions(table)]
    return {each.id for each in found if isinstance(each, Completion)}


class OneByOne(EchoEngine):
    """Finishes a request a step, in the order of arrival; row c fails, row h never ends before
    `gate` says so.
    """

    def __init__(self, completed: list[str], gate: Path) -> None:
        super().__init__()
        self._completed, self._gate = completed, gate

    def step(self) -> list[Completion]:
        time.sleep(0.01)
        name = next(iter(self._waiting))
        if name == "h" and not self._gate.exists():
            return []
        self._completed.append(name)
        done = self._answer(self._waiting.pop(name))
        return [
            replace(done, error=RowError("out_of_memory", "too large")) if name == "c" else done
        ]


def test_another_actor_takes_up_what_was_put_aside(journal: Journal, tmp_path: Path) -> None:
    classify = Classify()
    requests = [Request(id=name, input_ids=[5, 6], work=classify) for name in "abcdefghij"]
    table = request_table(list("abcdefghij"), requests).append_column(
        UNIT, pa.array([3] * 10, pa.int32())
    )
    completed: list[str] = []

    class Actor(ModelActor):
        def _load(self, config: Any, watchdog: Any) -> None:
            self._loop = EngineLoop(lambda: OneByOne(completed, tmp_path / "gate"), watchdog)

    def actor() -> Actor:
        return Actor(EngineConfig(model="m"), 1, None, UNIT, None, journal)

    first = threading.Thread(target=actor(), args=(table,), daemon=True)
    first.start()
    while put_aside(journal, 3) != set("abdefg"):  # an error is no answer that should last
        time.sleep(0.01)
    assert completed == list("abcdefg")
    (tmp_path / "gate").touch()
    first.join()
    undisturbed = list(completed)
    completed.clear()
    known = put_aside(journal, 3)  # by now h and i, too, where the end took its time
    again = actor()(table)
    assert undisturbed == list("abcdefghij")
    assert completed == [name for name in undisturbed if name not in known]
    assert again["row_key"].to_pylist() == list("abcdefghij")
    assert again["error_code"].to_pylist() == [None, None, "out_of_memory", *[None] * 7]


@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_engine_costs_what_it_finished_since_the_last_write(
    echo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One unit for all rows, 20 rows in 0.1 s; the process dies after 60, 120 and 180 rows."""
    monkeypatch.setattr("glm_batch.pipelines.graph.stages.PATIENCE", Patience(backoff_s=0.1))
    write_input(tmp_path)
    plain = make_job(echo_checkpoint, tmp_path, "plain", NUM_ROWS)
    run(plain)
    noted = tmp_path / "noted"

    def build() -> EchoEngine:
        class Mortal(EchoEngine):
            def __init__(self) -> None:
                super().__init__()
                self._num_done = 0

            def step(self) -> list[Completion]:
                time.sleep(0.1)
                taken = [self._waiting.pop(name) for name in list(self._waiting)[:20]]
                with noted.open("a") as file:
                    file.writelines(f"{request.id}\n" for request in taken)
                if self._num_done == 60:
                    time.sleep(0.3)  # until the journal has been written
                    os.kill(os.getpid(), signal.SIGKILL)
                self._num_done += len(taken)
                return [self._answer(request) for request in taken]

        return Mortal()

    monkeypatch.setattr(
        "glm_batch.pipelines.graph.stages.ModelActor", actor_with(build, tmp_path / "starts")
    )
    job = replace(
        make_job(echo_checkpoint, tmp_path, "mortal", NUM_ROWS),
        commit=CommitSection(unit_rows=NUM_ROWS, every_seconds=0.2),
    )
    run(job)
    assert records(job) == records(plain)
    completed = noted.read_text().splitlines()
    assert len(set(completed)) == NUM_ROWS
    assert len(completed) - NUM_ROWS <= 3 * 20, "a death costs what came after the last write"
    assert files(Output.at(job.output)) == []
