"""The page of a sweep, from the files that evaluate keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.report import charts
from glm_batch.pipelines.report.review import CELLS, sweep_review_table
from glm_batch.pipelines.report.sweep_page import (
    frontier,
    is_sweep,
    read_results,
    render_sweep,
    sweep_cells,
)
from tests.pipelines.report.test_hostile_text import HOSTILE, check
from tests.pipelines.report.world import LABELS, Page, choose_job, chosen, commit_rows

ANSWERS = {
    "one": ["red", "red", "blue"],
    "two": ["red", "green", "blue"],
    "three": ["red", "blue", None],
}
GOLD = ["red", "green", "blue"]


def estimate(value: float | None) -> dict[str, Any]:
    return {"value": value, "low": None if value is None else value - 0.1, "high": 0.9, "rows": 3}


def write_sweep(root: Path, names: list[str], text: str = "") -> Output:
    output = Output.at(str(root))
    output.store.prepare(("scores", "tmp"))
    cells, comparisons = [], []
    for number, name in enumerate(names):
        answers = list(ANSWERS.values())[number % 3]
        keys = [f"{key}{text}" for key in "abc"]
        own = {"row_key": keys, "answered": [True] * 3, "gold": GOLD, "answer": answers, "accuracy": [1.0, 0.0, 1.0],
               "confidence": [0.9, 0.4, 0.8]}  # fmt: skip
        pq.write_table(pa.table(own), root / "scores" / f"{name}.parquet")
        cells.append({
            "name": name, "output": str(root / "cells" / name), "rows": 3, "without_gold": 1,
            "errors": {"odd" + text: 1},
            "coordinates": {"model": f"m{number % 2}{text}", "dataset": "d" + text, "task": "t" + text,
                            "prompt": f"p{number}{text}"},
            "tokens": {"prompt": 100 * (number + 1), "output": 0, "media": 0},
            "metrics": {"accuracy": estimate([0.5, 0.8, 0.7][number % 3]), "macro_f1": estimate(None),
                        "ece": estimate(0.2)},
            "quantiles": {},
            "confusion": {"labels": [label + text for label in LABELS], "counts": [[1, 0, 0, 0]] * 3},
            "reliability": {"rows": [0] * 14 + [3], "confidence": [0] * 14 + [0.95], "accuracy": [0] * 14 + [0.66]},
        })  # fmt: skip
        if number:
            comparisons.append({"cell": name, "baseline": names[0], "metric": "accuracy", "value": 0.3, "low": 0.1,
                                "high": 0.5, "p_value": 0.01, "p_adjusted": 0.02, "rows": 3})  # fmt: skip
    content = {"format": 1, "cells": cells, "comparisons": comparisons}
    (root / "results.json").write_text(json.dumps(content))
    return output


@pytest.fixture
def sweep(tmp_path: Path) -> Output:
    return write_sweep(tmp_path, list(ANSWERS))


def test_the_table_holds_each_cell_with_its_interval(sweep: Output) -> None:
    assert is_sweep(sweep)
    page = Page.read(render_sweep(sweep))
    rows = page.table_with("accuracy")
    assert [cells[0] for cells in rows] == ["A", "B", "C"]
    assert [cells[1].split()[0] for cells in rows] == ["0.500", "0.800", "0.700"]
    assert rows[1][1].split() == ["0.800", "0.700", "to", "0.900"]
    assert [cells[5].split()[0] for cells in rows] == ["baseline", "+0.300*", "+0.300*"]
    values = [
        float(each["data-value"] or "nan") for tag, each in page.elements if each.get("data-value")
    ]
    assert 25.0 in values  # tokens of a row: 100 over three rows with gold and one without
    assert "B answers best, 80.0 % right at 50 tokens a row. That is more than chance." in page.text


def test_disagreements_stand_with_their_cells(sweep: Output) -> None:
    rows = Page.read(render_sweep(sweep)).table_with("answers")
    assert [cells[0] for cells in rows] == ["b", "c"]
    assert rows[0][1] == "green"
    assert "red wrong: A" in " ".join(rows[0][2].split())
    assert "green right: B" in " ".join(rows[0][2].split())


def test_disagreements_stand_with_the_text_of_their_rows(sweep: Output, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    job = choose_job(folder)
    rows = pa.table({"id": ["a", "b", "c"], "text": ["x", "why?", "z" * 999], "gold": GOLD})
    output = commit_rows(job, rows, [chosen([0.9, 0.05, 0.05])] * 3)
    shown = Page.read(render_sweep(sweep, lambda cell: (output, job))).table_with("answers")
    assert [cells[0] for cells in shown] == ["b", "c"]
    assert shown[0][1] == "why?"
    assert shown[1][1].startswith("zzz")
    assert "300 of 999 characters" in shown[1][1]


def test_what_no_cell_beats() -> None:
    points = [
        charts.Point(x=x, y=y, low=y, high=y, name="")
        for x, y in ((3, 0.5), (1, 0.4), (2, 0.3), (4, 0.6), (1, 0.2))
    ]
    assert frontier(points) == [(1, 0.4), (3, 0.5), (4, 0.6)]


@pytest.mark.parametrize("start", range(0, 1000, 250))
def test_hostile_names_in_a_sweep(start: int, tmp_path: Path) -> None:
    for number, text in enumerate(HOSTILE[start : start + 250 : 10]):
        folder = tmp_path / str(number)
        folder.mkdir()
        check(Page.read(render_sweep(write_sweep(folder, ["x1", "x2"], text))))


def test_results_of_another_format_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"format": 9}')
    with pytest.raises(ConfigError, match="run evaluate again"):
        read_results(Output.at(str(tmp_path)))


def test_review_of_a_sweep_begins_with_disagreement(sweep: Output, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    job = choose_job(folder)
    rows = pa.table({"id": ["a", "b", "c"], "text": ["x", "y", "z"], "gold": GOLD})
    output = commit_rows(job, rows, [chosen([0.9, 0.05, 0.05])] * 3)
    cells = sweep_cells(read_results(sweep))
    table = sweep_review_table(sweep, cells, dict.fromkeys(ANSWERS, (output, job)), 2)
    first = table.to_pylist()[0]
    assert (first["row_key"], first["prompt"], first["disagreement"]) == (
        "b",
        "Which? y",
        pytest.approx(2 / 3),
    )
    assert CELLS in first["reasons"]
    assert {each["cell"]: each["answer"] for each in first["answers"]} == {
        "one": "red", "two": "green", "three": "blue"
    }  # fmt: skip
    assert table.num_rows == 2
