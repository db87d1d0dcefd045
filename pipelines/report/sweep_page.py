"""The page of a sweep: cells with intervals, quality against cost, rows on which cells disagree.

Reads what `glm-batch evaluate` has kept: results.json and the scores of each cell.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, product
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from markupsafe import Markup

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.evaluation.agreement import NUM_BINS
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.planning.plan import Plan
from glm_batch.pipelines.report import charts
from glm_batch.pipelines.report.cards import asked_columns, row_text
from glm_batch.pipelines.report.charts import compact, percent, short, shown
from glm_batch.pipelines.report.committed_rows import Gold, LabelRows, committed_parts, database
from glm_batch.pipelines.report.input_rows import InputRows, Place
from glm_batch.pipelines.report.page import Note, Tile, render
from glm_batch.pipelines.report.quality import NO_ANSWER, classes_of, reliability_of
from glm_batch.pipelines.sweep.cells import AXES, tokens_per_row

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

RESULTS, SCORES = "results.json", "scores"
SURE = 0.05
MORE_METRICS = {
    "macro_f1": "macro F1", "ece": "ECE", "brier": "Brier", "pass@1": "pass@1",
    "majority": "majority", "field_accuracy": "fields", "normalised": "normalised",
    "sample_f1": "sample F1",
}  # fmt: skip
MOST_METRICS = 2
DISAGREEMENTS = 12
TEXT_SHOWN = 300
SCORES_READ = pa.schema(
    {
        "cell": pa.string(), "number": pa.int32(), "position": pa.int64(), "row_key": pa.string(),
        "gold": pa.string(), "answer": pa.string(), "confidence": pa.float64(),
        "off_set_mass": pa.float64(),
    }
)  # fmt: skip


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


JobOf = Callable[[SweepCell], tuple[Output, Job]]


def is_sweep(output: Output) -> bool:
    """Whether a finished sweep lies there."""
    return output.store.size(RESULTS) is not None


def render_sweep(output: Output, job_of: JobOf | None = None) -> str:
    """With the text of rows where `job_of` tells a cell's output and job. Raises ConfigError where
    the results cannot be read.
    """
    content = read_results(output)
    cells = sweep_cells(content)
    against = {each["cell"]: each for each in content["comparisons"]}
    groups = [_group(output, some, against, job_of) for some in by_question(cells)]
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
    marks = map("".join, chain.from_iterable(product(ascii_uppercase, repeat=n) for n in (1, 2, 3)))
    return [
        SweepCell(mark=mark, name=each["name"], coordinates=each["coordinates"], content=each)
        for mark, each in zip(marks, content["cells"], strict=False)
    ]


def by_question(cells: Sequence[SweepCell]) -> list[list[SweepCell]]:
    questions = dict.fromkeys(cell.question for cell in cells)
    return [[cell for cell in cells if cell.question == question] for question in questions]


def _group(
    output: Output, cells: list[SweepCell], against: dict[str, Any], job_of: JobOf | None
) -> dict[str, Any]:
    def texts(keys: Sequence[str]) -> Mapping[str, str]:
        try:
            return row_texts(*job_of(cells[0]), keys) if job_of else {}
        except ConfigError:  # the cell's output is gone: the page does without
            return {}

    with sweep_scores(output, cells) as scores:
        disagreements = _disagreements(scores, cells, texts)
    axes = [axis for axis in AXES if len({cell.coordinates.get(axis) for cell in cells}) > 1]
    axes = axes or ["model"]
    metrics = [name for name in MORE_METRICS if any(cell.metric(name) for cell in cells)]
    metrics = metrics[:MOST_METRICS]
    models = list(dict.fromkeys(cell.coordinates["model"] for cell in cells))
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
        "charts": _charts(cells, models),
        "details": [found for cell in cells if (found := _details(cell))],
        "models": [(shown(model, 60), k % 4) for k, model in enumerate(models[1:] and models)],
        "disagreements": disagreements,
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
        "bar": _bar(accuracy, scale) if accuracy else "",
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


def _bar(found: Mapping[str, float], scale: tuple[float, float]) -> Markup:
    return charts.interval(found["value"], found["low"], found["high"], scale)


def _charts(cells: Sequence[SweepCell], models: Sequence[str]) -> list[Any] | None:
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
            points, title="Accuracy against tokens of a row",
            x_name="tokens of a row (logarithmic)", y_name="accuracy",
            frontier=frontier(points), width=width,
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


def _details(cell: SweepCell) -> dict[str, Any] | None:
    """Confusion and reliability of a cell, as a job's own page shows them."""
    kept = cell.content.get("confusion")
    if kept is None:
        return None
    names = [str(label) for label in kept["labels"]]
    counts = np.array(kept["counts"], np.int64).reshape(len(names), len(names) + 1)
    sums = (counts.sum(1), counts[:, :-1].sum(0), np.diagonal(counts))
    found, brier = cell.content.get("reliability"), cell.metric("brier")
    bins = np.zeros((3, NUM_BINS))
    if found is not None:
        rows, sure, right = (np.array([value or 0.0 for value in found[name]]) for name in
                             ("rows", "confidence", "accuracy"))  # fmt: skip
        bins = np.stack([rows, rows * sure, rows * right])
    gold = Gold(
        rows=cell.content["rows"],
        labels={name: LabelRows(*map(int, own)) for name, *own in zip(names, *sums, strict=True)},
        different=len(names),
        pairs={
            (names[truth], None if given == len(names) else names[given]): int(counts[truth, given])
            for truth, given in np.argwhere(counts).tolist()
        },
        bins=bins,
        brier=brier["value"] if brier else None,
    )
    return {
        "mark": cell.mark,
        "name": cell.name,
        "classes": classes_of(gold),
        "reliability": reliability_of(gold),
    }


def _disagreements(
    scores: SweepScores,
    cells: Sequence[SweepCell],
    texts: Callable[[Sequence[str]], Mapping[str, str]],
) -> list[dict[str, Any]]:
    """Rows with the most different answers; `texts` gives what the rows with some keys say."""
    keys = scores.lowest("-disagreement", DISAGREEMENTS, "disagreement > 0")
    said, found = texts(keys), []
    for key, row in scores.rows(keys).items():
        by_answer: dict[str, list[str]] = {}
        for cell in cells:
            if cell.name in row.answers:
                answer = row.answers[cell.name] or NO_ANSWER
                by_answer.setdefault(answer, []).append(cell.mark)
        sides = sorted(by_answer.items(), key=lambda item: -len(item[1]))
        found.append({
            "key": shown(key, 120),
            "text": said.get(key, ""),
            "gold": shown(row.gold, 120),
            "sides": [(shown(answer, 120), marks, answer == row.gold) for answer, marks in sides],
        })  # fmt: skip
    return found


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """A row as some cells answered it: means over them; null where none has any."""

    gold: str
    disagreement: float
    confidence: float | None
    off_set_mass: float | None
    answers: dict[str, str | None] = field(default_factory=dict)  # by cell


class SweepScores:
    """What cells that answer the same rows have answered: table `scores` has a row for each cell
    and row, `doubts` one for each row.
    """

    def __init__(self, output: Output, cells: Sequence[SweepCell], db: DuckDBPyConnection) -> None:
        self.db = db
        db.from_arrow(SCORES_READ.empty_table()).create("scores")
        for number, cell in enumerate(cells):
            table = kept_scores(output, cell.name)
            own = {"cell": [cell.name] * len(table), "number": [number] * len(table),
                   "position": list(range(len(table)))}  # fmt: skip
            columns = own | {
                name: table[name] for name in SCORES_READ.names if name in table.column_names
            }
            nothing = pa.nulls(len(table))
            every = [columns.get(name, nothing) for name in SCORES_READ.names]
            db.from_arrow(pa.table(every, SCORES_READ.names).cast(SCORES_READ)).insert_into(
                "scores"
            )
        db.execute(
            "CREATE TABLE doubts AS SELECT row_key, min(position) AS position, "
            "arg_min(gold, number) AS gold, favg(confidence) AS confidence, "
            "favg(off_set_mass) AS off_set_mass, any_value(disagreement) AS disagreement "
            "FROM scores JOIN (SELECT row_key, 1 - max(n) / sum(n) AS disagreement FROM "
            "(SELECT row_key, count(*) AS n FROM scores GROUP BY row_key, answer) "
            "GROUP BY row_key) USING (row_key) GROUP BY row_key"
        )

    def lowest(self, score: str, most: int, where: str = "true") -> list[str]:
        """The keys of the rows with the lowest scores, which are SQL; of equal ones the first."""
        query = f"SELECT row_key FROM doubts WHERE {where} AND isfinite({score})"
        found = self.db.execute(f"{query} ORDER BY {score}, position, row_key LIMIT {most}")
        return [key for (key,) in found.fetchall()]

    def rows(self, keys: Iterable[str]) -> dict[str, ScoredRow]:
        """In the order of the keys."""
        some = list(keys)
        known = {key: ScoredRow(*row) for key, *row in self.db.execute(
            "SELECT row_key, gold, disagreement, confidence, off_set_mass FROM doubts "
            "WHERE list_contains(?, row_key)", [some]).fetchall()}  # fmt: skip
        for key, cell, answer in self.db.execute(
            "SELECT row_key, cell, answer FROM scores WHERE list_contains(?, row_key) "
            "ORDER BY number",
            [some],
        ).fetchall():
            known[key].answers[cell] = answer
        return {key: known[key] for key in some}


@contextmanager
def sweep_scores(output: Output, cells: Sequence[SweepCell]) -> Iterator[SweepScores]:
    """Raises ConfigError where the scores of a cell are gone."""
    with database() as db:
        yield SweepScores(output, cells, db)


def kept_scores(output: Output, cell: str) -> pa.Table:
    try:
        return pq.read_table(pa.BufferReader(output.store.read(f"{SCORES}/{cell}.parquet")))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{output.place}/{SCORES} has no {cell}.parquet: run evaluate again"
        ) from error


def places_of(output: Output, plan: Plan, keys: Iterable[str]) -> dict[str, Place]:
    """Where the first row with each key stands in a cell's output."""
    wanted, found = pa.array(list(keys), pa.string()), dict[str, Place]()
    for _, record, part in committed_parts(output, plan):
        rows = np.flatnonzero(pc.is_in(part["row_key"], wanted))
        for row, key in zip(
            rows.tolist(), part["row_key"].take(pa.array(rows)).to_pylist(), strict=True
        ):
            found.setdefault(key, (record.unit, row))
    return found


def row_texts(output: Output, job: Job, keys: Sequence[str]) -> dict[str, str]:
    """What the rows of a cell's input say, by key; those whose input is gone are left out."""
    plan = output.standing_plan()
    places = places_of(output, plan, keys) if keys else {}
    rows = InputRows(job, plan).some(places.values(), asked_columns(job))
    return {
        key: row_text(job, rows[place], TEXT_SHOWN)
        for key, place in places.items()
        if place in rows
    }


def _tiles(cells: Sequence[SweepCell]) -> Iterator[Tile]:
    def total(number: Callable[[dict[str, Any]], int]) -> int:
        return sum(number(cell.content) for cell in cells)

    questions, tokens = (
        len({cell.question for cell in cells}),
        total(lambda each: each["tokens"]["prompt"] + each["tokens"]["output"]),
    )
    failed = total(lambda each: sum(each["errors"].values()))
    yield Tile("Cells", f"{len(cells):,}", f"{questions:,} tasks on data sets")
    rows = total(lambda each: each["rows"])
    yield Tile("Rows scored", f"{rows:,}", f"{failed:,} failed and count as wrong")
    yield Tile("Tokens", compact(tokens), "read and written")
    unscored = total(lambda each: each["without_gold"])
    yield Tile("Without gold", f"{unscored:,}", "these count nowhere")


def _notes(cells: Sequence[SweepCell], against: dict[str, Any]) -> Iterator[Note]:
    """The best cell of each question, and how sure that is."""
    for some in by_question(cells):
        known = [(found["value"], cell) for cell in some if (found := cell.metric("accuracy"))]
        if len(known) < 2:
            continue
        best, cell = max(known, key=lambda pair: (pair[0], -pair[1].cost))
        rivals = [each.mark for value, each in known if value == best and each is not cell]
        also, told = "", ""
        if rivals:
            verb = "is" if len(rivals) == 1 else "are"
            also = f"; {', '.join(rivals)} {verb} as good at no lower cost"
        p_value = (against.get(cell.name) or {}).get("p_adjusted")
        if p_value is not None:
            told = " Its lead over the baseline may be chance."
            told = " That is more than chance." if p_value < SURE else told
        where = f"{short(cell.question[0], 40)} on {short(cell.question[1], 40)}"
        cost = f"{percent(best)} right at {compact(cell.cost)} tokens a row"
        yield Note(f"{where}: {cell.mark} answers best, {cost}{also}.{told}")


def _scale(known: Sequence[dict[str, float]]) -> tuple[float, float]:
    low = min((found["low"] for found in known), default=0.0)
    high = max((found["high"] for found in known), default=1.0)
    return (low, high) if high > low else (max(low - 0.01, 0.0), min(high + 0.01, 1.0))
