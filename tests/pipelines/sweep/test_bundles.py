"""What cells share on their way: rows, decoded media, prompts; and that pieces of a bundle are the
bundle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from glm_batch.glm_actors.media.media_loader import MediaLoader
from glm_batch.glm_actors.units.batches import to_requests, with_completions
from glm_batch.models.engine import EngineConfig, build_engine
from glm_batch.models.errors import RowError
from glm_batch.pipelines.input.source import Source
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.journal import Journal
from glm_batch.pipelines.planning.plan import job_source
from glm_batch.pipelines.runs.prepared import Prepared, prepare
from glm_batch.pipelines.sweep.bundles import (
    CELL,
    PARSED,
    BundleJournal,
    ParseBundle,
    ReadBundle,
    RenderBundle,
    _from_bytes,
    cell_and_key,
    make_bundles,
    request_id,
)
from glm_batch.pipelines.sweep.cells import Sweep
from glm_batch.pipelines.tasks.prompts import input_columns
from glm_batch.pipelines.tasks.row_prompts import RowPrompts
from glm_batch.pipelines.tasks.rows import TaskSpec, num_rows, runner_of
from tests.pipelines.sweep.conftest import NUM_ROWS


@pytest.fixture
def specs(sweep: Sweep) -> Iterator[list[TaskSpec]]:
    found = [
        replace(each.spec, run_id="one", name=str(n)) for n, each in enumerate(prepared(sweep))
    ]
    yield found
    for spec in found:
        runner_of(spec).close()


def prepared(sweep: Sweep) -> list[Prepared]:
    return [prepare(cell.job, None) for cell in sweep.cells]


def read(sweep: Sweep, cells: range) -> pa.Table:
    """The rows of the first bundle of some cells."""
    plans = [each.plan for each in prepared(sweep)]
    pending = [range(plan.num_units) for plan in plans]
    bundle = make_bundles([cell.dataset for cell in sweep.cells], plans, pending, cells)[0]
    jobs = [sweep.cells[cell].job for cell in cells]
    columns = tuple(dict.fromkeys(column for job in jobs for column in input_columns(job)))
    source = Source(storage=jobs[0].storage, columns=columns)
    step, table = ReadBundle({bundle.dataset: source}), bundle.to_table()
    return step(table, 0, step.num_rows(table))


def requests(table: pa.Table) -> list[tuple[str, list[int], object]]:
    return [(each.id, each.input_ids, each.work) for each in to_requests(table)]


def test_media_are_decoded_once_for_each_budget_and_travel_once(
    sweep: Sweep, specs: list[TaskSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    decode = MediaLoader._decode

    def counted(self: MediaLoader, kind: object, data: object, digest: str) -> object:
        decoded.append(digest)
        return decode(self, kind, data, digest)  # type: ignore[arg-type]

    monkeypatch.setattr(MediaLoader, "_decode", counted)
    step, rows = RenderBundle(specs), read(sweep, range(4))
    table = step(rows, 0, step.num_rows(rows))
    assert len(decoded) == len(set(decoded)) == 2 * 5  # two budgets, five pictures
    held = [item["patches"] for items in table["media"].to_pylist() for item in items]
    assert sum(patches is not None for patches in held) == 2 * 5
    assert table[CELL].to_pylist() == [0, 1, 2, 3] * 5
    keys = [cell_and_key(id)[1] for id in table["row_key"].to_pylist()]
    assert keys == [key for key in keys[::4] for _ in range(4)]


def test_equal_prompts_are_made_once(
    sweep: Sweep, specs: list[TaskSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two generating cells differ in sampling alone."""
    made: list[int] = []
    prompts = RowPrompts.__call__

    def counted(self: RowPrompts, rows: list[object]) -> object:
        made.append(len(rows))
        return prompts(self, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(RowPrompts, "__call__", counted)
    step, rows = RenderBundle(specs), read(sweep, range(4, 7))
    table = step(rows, 0, step.num_rows(rows))
    assert made == [5, 5]
    asked = requests(table)
    assert asked[1][1] == asked[2][1] != asked[0][1]
    assert asked[1][2] != asked[2][2]


def test_pieces_of_a_bundle_are_the_bundle(sweep: Sweep, specs: list[TaskSpec]) -> None:
    """As a suspect bundle is taken through the step: split at any pair of a row and a cell."""
    step, rows = RenderBundle(specs), read(sweep, range(4, 7))
    total = step.num_rows(rows)
    whole = requests(step(rows, 0, total))
    for cut in range(1, total):
        assert requests(step(rows, 0, cut)) + requests(step(rows, cut, total)) == whole
    lost = step(rows, 4, 5, RowError("worker_died", "so it did"))
    assert (lost.num_rows, lost["error_code"].to_pylist()) == (1, ["worker_died"])
    assert lost["row_key"][0].as_py() == whole[5][0]  # the first row's third cell asks twice


def test_a_cell_scores_its_gold_answers_beside_one_that_does_not(
    sweep: Sweep, specs: list[TaskSpec]
) -> None:
    step, rows = RenderBundle(specs), read(sweep, range(5, 7))
    table = step(rows, 0, step.num_rows(rows))
    assert table[CELL].to_pylist() == [5, 6, 6] * 5
    assert num_rows(table) == 10
    asked = to_requests(table)
    assert asked[0].input_ids == asked[1].input_ids == asked[2].input_ids
    engine = build_engine(EngineConfig(model=sweep.cells[5].job.model, kind="echo"))
    engine.submit(asked)
    completed = with_completions(table, engine.step())
    parsed = [
        _from_bytes(piece.as_buffer())
        for piece in ParseBundle(specs)(completed, 0, num_rows(completed))[PARSED]
    ]
    assert "gold_logprob" not in parsed[0].column_names
    # as the echo engine has it
    assert parsed[1]["gold_logprob"].to_pylist() == [pytest.approx(math.log(0.8))] * 5
    assert [each["status"].to_pylist() for each in parsed] == [["ok"] * 5] * 2


def test_bundles_hold_what_is_pending(sweep: Sweep) -> None:
    plans = [each.plan for each in prepared(sweep)]
    datasets = [cell.dataset for cell in sweep.cells]
    pending = [{0, 1}, {1, 2, 3, 4}, set[int](), {1}, {0}, {0}, {4}]
    bundles = make_bundles(datasets, plans, pending, range(7))
    assert [(each.dataset, each.order.rows.start, each.cells) for each in bundles] == [
        ("pictures", 0, ((0, 0),)),
        ("pictures", 5, ((0, 1), (1, 1), (3, 1))),
        ("pictures", 10, ((1, 2),)),
        ("pictures", 15, ((1, 3),)),
        ("pictures", 20, ((1, 4),)),
        ("texts", 0, ((4, 0), (5, 0))),
        ("texts", 20, ((6, 4),)),
    ]
    assert [each.number for each in bundles] == list(range(7))
    assert bundles[2].order.earlier == {1: job_row(sweep, 3)}
    assert sum(plan.unit_sizes[unit] for plan in plans for unit in range(5)) == NUM_ROWS * 7


def job_row(sweep: Sweep, row: int) -> str:
    (file,) = job_source(sweep.cells[0].job).list_files(sweep.cells[0].job.input)
    return f"{file.name}:{row}"


def test_what_a_bundle_puts_aside_lies_with_its_cells(tmp_path: Path) -> None:
    outputs = [Output.at(str(tmp_path / name)) for name in ("a", "b")]
    for output in outputs:
        output.store.prepare(("journal", "tmp"))
    journals = {
        cell: Journal(output=output, every_seconds=1.0) for cell, output in enumerate(outputs)
    }
    journal = BundleJournal(journals=journals, cells={7: ((0, 3), (1, 4))}, every_seconds=1.0)
    ids = [request_id(cell, key) for key in ("x/1", "y") for cell in (0, 1)]
    journal.write(7, pa.table({"row_key": ids[:3], "n": [0, 1, 2]}))
    found = {
        id: n
        for table in journal.read(7)
        for id, n in zip(*table.to_pydict().values(), strict=True)
    }
    assert found == dict(zip(ids[:3], range(3), strict=True))
    assert [table["row_key"].to_pylist() for table in journals[0].read(3)] == [["x/1", "y"]]
    assert [table["row_key"].to_pylist() for table in journals[1].read(4)] == [["x/1"]]
