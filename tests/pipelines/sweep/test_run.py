"""A sweep's cells come out as the same jobs alone, whatever they share, and whenever the sweep was
interrupted.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines import run
from glm_batch.pipelines.metrics.counts import Progress
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.report.sweep_page import read_results, render_sweep, sweep_cells
from glm_batch.pipelines.sweep.cells import Sweep
from glm_batch.pipelines.sweep.results import compare, evaluate, keep, results_table, to_json
from glm_batch.pipelines.sweep.sweep_run import Ran, run_sweep
from tests.pipelines.report.world import Page
from tests.pipelines.sweep.conftest import NUM_ROWS, make_sweep, write_input

pytestmark = pytest.mark.usefixtures("ray_cluster")


def rows(output: Output) -> list[dict[str, Any]]:
    return [row for table in output.iter_tables() for row in table.to_pylist()]


def by_cell(ran: Ran) -> dict[str, list[dict[str, Any]]]:
    return {each.cell.name: rows(each.output) for each in ran.cells}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A sweep that was run to its end."""
    folder = tmp_path_factory.mktemp("sweep")
    write_input(folder)
    sweep = make_sweep(folder)
    run_sweep(sweep)
    return sweep


def test_every_cell_is_as_the_job_alone(whole: Sweep, tmp_path: Path) -> None:
    together = by_cell(run_sweep(whole))
    for number in (1, 6):
        cell = whole.cells[number]
        alone = run(replace(cell.job, output=str(tmp_path / "alone" / cell.name)))
        assert together[cell.name] == rows(alone.output), cell.name
    codes = [row["error_code"] for row in together["shape-short-7056"]]
    assert (codes[7], codes[11], len(codes)) == ("bad_image", "duplicate_key", NUM_ROWS)


def test_the_page_shows_what_evaluate_keeps(whole: Sweep) -> None:
    results = evaluate(whole, run_sweep(whole).cells)
    keep(whole, results)
    output = Output.at(whole.output)
    page = Page.read(render_sweep(output))
    tables = [table for table in page.tables if table[0][0].strip() == "cell"]
    shown = [line[1].split()[0] for table in tables for line in table[1:]]
    assert shown == [f"{each.accuracy:.3f}" for each in results.cells]
    for cell, each in zip(sweep_cells(read_results(output)), results.cells, strict=True):
        assert cell.cost == each.tokens_per_row > 0
        assert cell.name in page.text
    counts = results.cells[0].score
    assert results.cells[0].tokens_per_row == sum(
        results.cells[0].tokens[kind] for kind in ("prompt", "output")
    ) / (counts.rows + counts.without_gold)


def test_interrupted_sweeps_go_on_unit_by_unit(whole: Sweep) -> None:
    """Some units of some cells, and one cell, are lost, as if the sweep had died before it
    committed them.
    """
    seen: list[Progress] = []
    ran = run_sweep(whole, seen.append)
    # a finished sweep starts nothing
    assert {progress.phase for progress in seen} == {"planning", "done"}
    before, results = by_cell(ran), results_of(whole, ran)
    for number, cell in enumerate(whole.cells):
        for path in sorted((Path(cell.job.output) / "commits").iterdir())[number % 3 :: 2]:
            path.unlink()
    shutil.rmtree(Path(whole.cells[1].job.output))
    kept = {
        path: path.read_bytes()
        for cell in whole.cells
        for path in Path(cell.job.output).glob("commits/*")
    }
    ran = run_sweep(whole, seen.append)
    assert by_cell(ran) == before
    assert {path: path.read_bytes() for path in kept} == kept
    assert 0 < ran.summary.resumed_rows < ran.summary.counts.rows == NUM_ROWS * len(whole.cells)
    assert seen[-1].units_done == seen[-1].units_total
    assert results_of(whole, ran) == results


def results_of(sweep: Sweep, ran: Ran) -> str:
    results = evaluate(sweep, ran.cells)
    keep(sweep, results)
    return json.dumps(to_json(results)) + str(results_table(results).to_pylist())


def test_results_are_kept_and_can_be_compared(whole: Sweep) -> None:
    sweep = replace(whole, baseline={"prompt": "shape-long-14112"})
    ran = run_sweep(sweep)
    results = evaluate(sweep, ran.cells)
    keep(sweep, results)
    table = pq.read_table(Path(sweep.output) / "results.parquet")
    assert table["cell"].to_pylist() == [cell.name for cell in sweep.cells]
    content = json.loads((Path(sweep.output) / "results.json").read_bytes())
    first = content["cells"][0]
    assert first["errors"] == {"duplicate_key": 1, "bad_image": 1}
    assert sum(map(sum, first["confusion"]["counts"])) == first["rows"]
    assert [each["baseline"] for each in content["comparisons"][:3]] == ["shape-long-14112"] * 3
    scored = {
        name: each["value"]
        for name, each in content["cells"][6]["metrics"].items()
        if name.startswith("gold")
    }
    logprobs, tokens = (
        math.log(0.8) * NUM_ROWS,
        sum(row["gold_num_tokens"] for row in rows(ran.cells[6].output)),
    )
    assert scored == {  # the echo engine gives a single continuation four fifths
        "gold_log_likelihood": pytest.approx(math.log(0.8), abs=1e-4),
        "gold_token_log_likelihood": pytest.approx(logprobs / tokens, abs=1e-4),
        "gold_perplexity": pytest.approx(math.exp(-logprobs / tokens), abs=1e-4),
    }
    difference = compare(sweep.output, sweep.cells[0].name, "shape-long-14112", sweep)
    assert difference == results.comparisons[0].difference
    with pytest.raises(ConfigError, match="no scores of a cell 'nothing'"):
        compare(sweep.output, "nothing", "team", sweep)


def test_a_jobs_output_is_no_place_for_a_sweep(sweep: Sweep) -> None:
    (Path(sweep.output) / "parts").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds a job's output"):
        run_sweep(sweep)


def test_another_sweeps_cell_is_refused_by_name(whole: Sweep) -> None:
    cell = whole.cells[4]
    changed = replace(
        cell, job=replace(cell.job, task=replace(cell.job.task, prompt="Who? {text}"))
    )
    with pytest.raises(ConfigError, match=r"team: output: .* was begun by another job"):
        run_sweep(replace(whole, cells=(changed,)))
