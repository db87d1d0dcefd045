"""The page of a sweep: a table of its cells with intervals, quality against cost, and rows on which
cells disagree.

Reads what `glm-batch evaluate` has kept: results.json and the scores of each cell. Knows nothing of
how either came about.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.report import charts
from glm_batch.pipelines.report.answers import NO_ANSWER, Gold
from glm_batch.pipelines.report.head import Note, Tile
from glm_batch.pipelines.report.page import render
from glm_batch.pipelines.report.quality import classes_of, reliability_of
from glm_batch.pipelines.report.text import compact, percent, short, shown
from glm_batch.pipelines.sweep.cells import AXES, tokens_per_row

RESULTS, SCORES = "results.json", "scores"
SURE = 0.05
MORE_METRICS = {
    "macro_f1": "macro F1", "ece": "ECE", "brier": "Brier", "pass@1": "pass@1", "majority": "majority",
    "field_accuracy": "fields", "normalised": "normalised", "sample_f1": "sample F1",
}  # fmt: skip
MOST_METRICS = 2
DISAGREEMENTS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepCell:
    """A cell as the results hold it, with the short name that stands for it in plots."""

    mark: str
    name: str
    coordinates: dict[str, str]
    content: dict[str, Any]

    @property
    def question(self) -> tuple[str, str]:
        """Cells in which this is equal answer the same rows."""
        return self.coordinates["task"], self.coordinates["dataset"]

    @property
    def dataset(self) -> str:
        return self.coordinates["dataset"]

    @property
    def cost(self) -> float:
        """Tokens of a row: see tokens_per_row."""
        return tokens_per_row(
            self.content["tokens"], self.content["rows"] + self.content["without_gold"]
        )

    def metric(self, name: str) -> dict[str, float] | None:
        found = self.content["metrics"].get(name)
        return found if found is not None and found["value"] is not None else None


def is_sweep(output: Output) -> bool:
    """Whether a finished sweep lies there."""
    return output.store.size(RESULTS) is not None


def render_sweep(output: Output) -> str:
    """Raises ConfigError where the results cannot be read."""
    content = read_results(output)
    cells = sweep_cells(content)
    against = {each["cell"]: each for each in content["comparisons"]}
    groups = [_group(output, some, against) for some in by_question(cells)]
    return render(
        "sweep.html.jinja",
        title=short(output.place.rstrip("/").rpartition("/")[2], 80),
        place=output.place,
        groups=groups,
        tiles=list(_tiles(cells)),
        notes=list(_notes(cells, against)),
    )


def read_results(output: Output) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(output.store.read(RESULTS))
        if content.get("format") != 1:
            raise ValueError(f"format {content.get('format')}")
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(
            f"{output.place}/{RESULTS} cannot be read ({error}): run evaluate again"
        ) from error
    return content


def sweep_cells(content: dict[str, Any]) -> list[SweepCell]:
    return [
        SweepCell(
            mark=_mark(number), name=each["name"], coordinates=each["coordinates"], content=each
        )
        for number, each in enumerate(content["cells"])
    ]


def by_question(cells: Sequence[SweepCell]) -> list[list[SweepCell]]:
    questions = dict.fromkeys(cell.question for cell in cells)
    return [[cell for cell in cells if cell.question == question] for question in questions]


def _group(output: Output, cells: list[SweepCell], against: dict[str, Any]) -> dict[str, Any]:
    axes = [axis for axis in AXES if len({cell.coordinates.get(axis) for cell in cells}) > 1] or [
        "model"
    ]
    metrics = [name for name in MORE_METRICS if any(cell.metric(name) for cell in cells)][
        :MOST_METRICS
    ]
    known = [found for cell in cells if (found := cell.metric("accuracy"))]
    scale = _scale(known)
    best = max((found["value"] for found in known), default=math.nan)
    baselines = {each["baseline"] for each in against.values()}
    task, dataset = cells[0].question
    return {
        "title": f"{shown(task, 60)} on {shown(dataset, 60)}",
        "axes": axes,
        "metrics": [MORE_METRICS[name] for name in metrics],
        "rows": [
            _row(cell, axes, metrics, against.get(cell.name), baselines, scale, best)
            for cell in cells
        ],
        "charts": _charts(cells),
        "details": [found for cell in cells if (found := _details(cell))],
        "models": _legend(cells),
        "disagreements": disagreements(output, cells),
        "scale": (percent(scale[0]), percent(scale[1])),
    }


def _row(
    cell: SweepCell,
    axes: Sequence[str],
    metrics: Sequence[str],
    against: dict[str, Any] | None,
    baselines: set[str],
    scale: tuple[float, float],
    best: float,
) -> dict[str, Any]:
    accuracy = cell.metric("accuracy")
    failed = sum(cell.content["errors"].values())
    return {
        "mark": cell.mark,
        "cell": cell.name,
        "coordinates": [shown(str(cell.coordinates.get(axis, "")), 60) for axis in axes],
        "rows": cell.content["rows"],
        "failed": failed,
        "accuracy": accuracy,
        "best": accuracy is not None and accuracy["value"] == best,
        "bar": charts.interval(*_ends(accuracy), scale) if accuracy else "",
        "metrics": [cell.metric(name) for name in metrics],
        "cost": cell.cost,
        "is_baseline": cell.name in baselines,
        "against": None if against is None or against["value"] is None else {
            "value": against["value"], "low": against["low"], "high": against["high"],
            "p": _p_value(against["p_adjusted"]), "sure": (against["p_adjusted"] or 1.0) < SURE,
        },
    }  # fmt: skip


def _p_value(value: float | None) -> str:
    return "-" if value is None else "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def _ends(found: Mapping[str, float]) -> tuple[float, float, float]:
    return found["value"], found["low"], found["high"]


def _charts(cells: Sequence[SweepCell]) -> list[Any] | None:
    models = list(dict.fromkeys(cell.coordinates["model"] for cell in cells))
    points = [
        charts.Point(
            x=cell.cost, y=found["value"], low=found["low"], high=found["high"],
            name=cell.mark, group=models.index(cell.coordinates["model"]) % 4,
        )
        for cell in cells
        if (found := cell.metric("accuracy")) and cell.cost > 0
    ]  # fmt: skip
    if len(points) < 2:
        return None
    return [
        charts.scatter(
            points, title="Accuracy against tokens of a row", x_name="tokens of a row (logarithmic)",
            y_name="accuracy", frontier=frontier(points), width=width,
        )
        for width in (860, 420)
    ]  # fmt: skip


def frontier(points: Sequence[charts.Point]) -> list[tuple[float, float]]:
    """The points that no other one beats at the same cost or less, the cheapest first."""
    found: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda each: (each.x, -each.y)):
        if not found or point.y > found[-1][1]:
            found.append((point.x, point.y))
    return found


def _legend(cells: Sequence[SweepCell]) -> list[tuple[str, int]]:
    models = list(dict.fromkeys(cell.coordinates["model"] for cell in cells))
    return (
        [(shown(model, 60), number % 4) for number, model in enumerate(models)]
        if len(models) > 1
        else []
    )


def _details(cell: SweepCell) -> dict[str, Any] | None:
    """Confusion and reliability of a cell, as a job's own page shows them."""
    kept = cell.content.get("confusion")
    if kept is None:
        return None
    gold = Gold(rows=cell.content["rows"])
    labels = [str(label) for label in kept["labels"]]
    for truth, counts in zip(labels, kept["counts"], strict=True):
        for given, rows in zip((*labels, NO_ANSWER), counts, strict=True):
            if rows:
                gold.pairs[truth, given] += rows
    found = cell.content.get("reliability")
    if found is not None:
        rows, sure, right = (np.array([value or 0.0 for value in found[name]]) for name in
                             ("rows", "confidence", "accuracy"))  # fmt: skip
        gold.bins = np.stack([rows, rows * sure, rows * right])
    brier = cell.metric("brier")
    if brier:
        gold.brier, gold.brier_rows = brier["value"] * brier["rows"], int(brier["rows"])
    return {
        "mark": cell.mark,
        "name": cell.name,
        "classes": classes_of(gold, labels),
        "reliability": reliability_of(gold) if gold.bins[0].any() else None,
    }


def disagreements(
    output: Output, cells: Sequence[SweepCell], most: int = DISAGREEMENTS
) -> list[dict[str, Any]]:
    """Rows to which cells give the most different answers, with each answer's cells."""
    answers = answers_by_key(output, cells)
    if len(cells) < 2 or not answers:
        return []
    ranked = sorted(answers.items(), key=lambda item: -disagreement(item[1]["answers"].values()))
    found = []
    for key, row in ranked[:most]:
        if disagreement(row["answers"].values()) <= 0:
            break
        by_answer: dict[str, list[str]] = {}
        for cell in cells:
            if cell.name in row["answers"]:
                by_answer.setdefault(row["answers"][cell.name] or NO_ANSWER, []).append(cell.mark)
        sides = sorted(by_answer.items(), key=lambda item: -len(item[1]))
        found.append({
            "key": shown(key, 120),
            "gold": shown(row["gold"], 120),
            "sides": [(shown(answer, 120), marks, answer == row["gold"]) for answer, marks in sides],
        })  # fmt: skip
    return found


def answers_by_key(output: Output, cells: Sequence[SweepCell]) -> dict[str, dict[str, Any]]:
    """Each row's gold answer and what each cell answered, by row key, in the order of the input."""
    found: dict[str, dict[str, Any]] = {}
    for cell in cells:
        table = scores_of(output, cell.name)
        columns = (table[name].to_pylist() for name in ("row_key", "gold", "answer"))
        for key, gold, answer in zip(*columns, strict=True):
            row = found.setdefault(key, {"gold": gold, "answers": {}})
            row["answers"][cell.name] = answer
    return found


def disagreement(answers: Any) -> float:
    """The share of cells that do not give the most frequent answer."""
    every = list(answers)
    return 1 - max(every.count(each) for each in set(every)) / len(every) if every else 0.0


def scores_of(output: Output, cell: str) -> pa.Table:
    try:
        return pq.read_table(pa.BufferReader(output.store.read(f"{SCORES}/{cell}.parquet")))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{output.place}/{SCORES} has no {cell}.parquet: run evaluate again"
        ) from error


def _tiles(cells: Sequence[SweepCell]) -> Iterator[Tile]:
    rows = sum(cell.content["rows"] for cell in cells)
    tokens = sum(
        cell.content["tokens"]["prompt"] + cell.content["tokens"]["output"] for cell in cells
    )
    failed = sum(sum(cell.content["errors"].values()) for cell in cells)
    questions = len({cell.question for cell in cells})
    yield Tile(name="Cells", value=f"{len(cells):,}", note=f"{questions:,} tasks on data sets")
    yield Tile(name="Rows scored", value=f"{rows:,}", note=f"{failed:,} failed and count as wrong")
    yield Tile(name="Tokens", value=compact(tokens), note="read and written")
    unscored = sum(cell.content["without_gold"] for cell in cells)
    yield Tile(name="Without gold", value=f"{unscored:,}", note="these count nowhere")


def _notes(cells: Sequence[SweepCell], against: dict[str, Any]) -> Iterator[Note]:
    """The best cell of each question, and how sure that is."""
    for some in by_question(cells):
        known = [(found["value"], cell) for cell in some if (found := cell.metric("accuracy"))]
        if len(known) < 2:
            continue
        best, cell = max(known, key=lambda pair: (pair[0], -pair[1].cost))
        rivals = [each.mark for value, each in known if value == best and each is not cell]
        task, dataset = cell.question
        also = (
            f"; {', '.join(rivals)} {'is' if len(rivals) == 1 else 'are'} as good at no lower cost"
            if rivals
            else ""
        )
        sure = against.get(cell.name)
        told = ""
        if sure is not None and sure["p_adjusted"] is not None:
            told = (
                " That is more than chance."
                if sure["p_adjusted"] < SURE
                else " Its lead over the baseline may be chance."
            )
        yield Note(level="info", text=f"{short(task, 40)} on {short(dataset, 40)}: {cell.mark} answers best, "
                   f"{percent(best)} right at {compact(cell.cost)} tokens a row{also}.{told}")  # fmt: skip


def _scale(known: Sequence[dict[str, float]]) -> tuple[float, float]:
    low = min((found["low"] for found in known), default=0.0)
    high = max((found["high"] for found in known), default=1.0)
    return (low, high) if high > low else (max(low - 0.01, 0.0), min(high + 0.01, 1.0))


def _mark(number: int) -> str:
    """A, B, ... Z, AA, AB ..."""
    letters = ""
    number += 1
    while number:
        number, rest = divmod(number - 1, 26)
        letters = chr(ord("A") + rest) + letters
    return letters
