"""A finished sweep's results: scores and comparisons of cells, and the files that keep them.

    OUTPUT/results.parquet     a row for each cell: coordinates, counts, metrics with intervals
    OUTPUT/results.json        the same with confusion matrices, reliability and comparisons
    OUTPUT/scores/CELL.parquet a row for each row with a gold answer: what it was worth

They depend on the committed rows alone: however often a sweep was killed on the way, they come out
the same. What varies from run to run (seconds, shares of caches) is not in them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from glm_batch.models.errors import ConfigError, RowError
from glm_batch.pipelines.evaluation.intervals import Difference, Estimate, holm, paired_difference
from glm_batch.pipelines.evaluation.scoring import RowScores, Score, score
from glm_batch.pipelines.input.source import Source
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.sweep.cells import AXES, Cell, Sweep, tokens_per_row
from glm_batch.pipelines.sweep.sweep_run import Finished

RESULTS, TABLE, SCORES = "results.json", "results.parquet", "scores"
FORMAT = 1
SCORED_COLUMNS = (
    "row_key", "status", "error_code", "label", "label_probs", "off_set_mass", "label_logprobs",
    "text", "json", "scores", "gold_logprob", "gold_num_tokens",
)  # fmt: skip
# A row's probabilities differ by some 1e-7 with the rows that it meets in a batch: what is kept
# must not show that.
DECIMALS = 4
DIGITS = 6  # significant ones, of p-values: these depend on answers alone


@dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    """A cell's score and what it cost."""

    cell: Cell
    score: Score
    rows: RowScores
    tokens: Mapping[str, int]
    error_rate: float

    @property
    def tokens_per_row(self) -> float:
        return tokens_per_row(self.tokens, self.score.rows + self.score.without_gold)

    @property
    def accuracy(self) -> float:
        return self.score.metrics["accuracy"].value


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How far a cell's accuracy is above the baseline's; `adjusted` is Holm's p-value."""

    cell: str
    baseline: str
    difference: Difference
    adjusted: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    cells: tuple[CellResult, ...]
    comparisons: tuple[Comparison, ...]


def evaluate(sweep: Sweep, finished: Sequence[Finished]) -> Results:
    """Scores every cell and compares it with its baseline. ConfigError for a damaged part."""
    golds: dict[tuple[str, str, str], list[Any]] = {}
    cells = []
    for each in finished:
        question = each.cell.question
        if question not in golds:
            golds[question] = list(gold_answers(each))
        cells.append(cell_result(each, golds[question], sweep.confidence))
    return Results(cells=tuple(cells), comparisons=tuple(compared(sweep, cells)))


def cell_result(each: Finished, golds: Sequence[Any], confidence: float) -> CellResult:
    """Scores the committed rows against the gold answers, which stand in the same order."""
    wanted = [name for name in each.manifest.schema.names if name in SCORED_COLUMNS]
    table = pa.concat_tables([part.select(wanted) for part in each.output.iter_tables()])
    if table.num_rows != len(golds):
        raise ConfigError(
            f"{each.cell.name}: {table.num_rows} rows are committed and the input has "
            f"{len(golds)} now"
        )
    rows, found = score(each.cell.rules(each.manifest.facts), table, golds, confidence)
    counts = each.manifest.counts
    return CellResult(
        cell=each.cell,
        score=found,
        rows=rows,
        tokens={
            "prompt": counts.prompt_tokens,
            "output": counts.output_tokens,
            "media": counts.media_tokens,
        },
        error_rate=counts.error_rate,
    )


def gold_answers(each: Finished) -> Iterator[Any]:
    """A cell's gold column in the order of its rows; None where there is none to read."""
    plan, gold = each.output.standing_plan(), each.cell.job.task.gold
    assert gold is not None
    source = Source(storage=each.cell.job.storage, columns=(gold,))
    for unit in plan.units():
        rows = source.read_rows(plan.files[unit.file].file, unit.rows)
        yield from (None if isinstance(row, RowError) else row.get(gold) for row in rows)


def compared(sweep: Sweep, cells: Sequence[CellResult]) -> list[Comparison]:
    """Each cell with its question's baseline; all p-values are adjusted together."""
    pairs: list[tuple[CellResult, CellResult]] = []
    for question in dict.fromkeys(each.cell.question for each in cells):
        some = [each for each in cells if each.cell.question == question]
        baseline = baseline_of(sweep, some)
        if baseline is not None:
            pairs += [(each, baseline) for each in some if each is not baseline]
    differences = [difference(*pair) for pair in pairs]
    adjusted = holm([each.p_value for each in differences])
    return [
        Comparison(cell=one.cell.name, baseline=other.cell.name, difference=each, adjusted=p)
        for (one, other), each, p in zip(pairs, differences, adjusted, strict=True)
    ]


def baseline_of(sweep: Sweep, cells: Sequence[CellResult]) -> CellResult | None:
    """The first cell with the baseline's coordinates; for BEST the first most accurate one.

    A coordinate that none of these cells has says nothing about them.
    """
    if isinstance(sweep.baseline, str):
        known = [each for each in cells if not math.isnan(each.accuracy)]
        return max(known, key=lambda each: each.accuracy) if known else None
    found = list(cells)
    for axis, value in sweep.baseline.items():
        found = [each for each in found if each.cell.coordinates[axis] == value] or found
    return found[0] if found else None


def difference(one: CellResult, other: CellResult) -> Difference:
    """One's accuracy minus the other's on the rows of both, by their keys."""
    return paired(
        one.rows.keys, one.rows.values["accuracy"], other.rows.keys, other.rows.values["accuracy"]
    )


def compare(output: str, one: str, other: str, sweep: Sweep) -> Difference:
    """The same of two cells' kept scores. Raises ConfigError for a cell that is not there."""
    tables = [_kept_scores(output, name, sweep) for name in (one, other)]
    keys = [table["row_key"].to_pylist() for table in tables]
    values = [table["accuracy"].to_numpy() for table in tables]
    return paired(keys[0], values[0], keys[1], values[1])


def paired(
    keys: Sequence[str], values: Any, other_keys: Sequence[str], other_values: Any
) -> Difference:
    """The difference of values that belong to equal keys; keys that one has alone do not count."""
    if list(keys) != list(other_keys):
        places = {key: place for place, key in enumerate(other_keys)}
        common = [(place, places[key]) for place, key in enumerate(keys) if key in places]
        values = np.array([values[place] for place, _ in common], np.float64)
        other_values = np.array([other_values[place] for _, place in common], np.float64)
    return paired_difference(values, other_values, np.random.default_rng(0))


def keep(sweep: Sweep, results: Results) -> None:
    """Writes the files. Raises StorageError."""
    output = Output.at(sweep.output, sweep.storage)
    with output.writable():
        output.store.prepare((SCORES,))
        for each in results.cells:
            output.store.write(f"{SCORES}/{each.cell.name}.parquet", _parquet(each.rows.to_table()))
        output.store.write(TABLE, _parquet(results_table(results)))
        output.store.write(
            RESULTS, json.dumps(to_json(results), indent=1, ensure_ascii=False).encode()
        )


def results_table(results: Results) -> pa.Table:
    """A row for each cell; metrics that a task does not have are null."""
    against = {each.cell: each for each in results.comparisons}
    rows = [_flat(each, against.get(each.cell.name)) for each in results.cells]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})


def to_json(results: Results) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "cells": [_cell_json(each) for each in results.cells],
        "comparisons": [
            {
                "cell": each.cell,
                "baseline": each.baseline,
                "metric": "accuracy",
                "p_adjusted": rounded_p(each.adjusted),
            }
            | {name: rounded(value) for name, value in asdict(each.difference).items()}
            | {"p_value": rounded_p(each.difference.p_value)}
            for each in results.comparisons
        ],
    }


def rounded(value: Any) -> Any:
    """A number as the files hold it: DECIMALS behind the point, null for what is undefined."""
    if not isinstance(value, float):
        return value
    return round(value, DECIMALS) if math.isfinite(value) else None


def rounded_p(value: float) -> float | None:
    """A p-value as the files hold it: DIGITS significant digits."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _flat(each: CellResult, against: Comparison | None) -> dict[str, Any]:
    found = each.score
    row: dict[str, Any] = {
        "cell": each.cell.name,
        **{axis: each.cell.coordinates[axis] for axis in AXES},
    }
    row |= {
        "rows": found.rows,
        "errors": sum(found.errors.values()),
        "without_gold": found.without_gold,
    }
    row |= {f"{name}_tokens": count for name, count in each.tokens.items()}
    for name, estimate in found.metrics.items():
        row |= {name: rounded(estimate.value)}
        row |= {f"{name}_low": rounded(estimate.low), f"{name}_high": rounded(estimate.high)}
    row |= {name: rounded(value) for name, value in found.quantiles.items()}
    if against is not None:
        row |= {"baseline": against.baseline, "difference": rounded(against.difference.value)}
        row |= {
            "difference_low": rounded(against.difference.low),
            "difference_high": rounded(against.difference.high),
        }
        row |= {
            "p_value": rounded_p(against.difference.p_value),
            "p_adjusted": rounded_p(against.adjusted),
        }
    return row


def _cell_json(each: CellResult) -> dict[str, Any]:
    found = each.score
    content: dict[str, Any] = {
        "name": each.cell.name,
        "coordinates": dict(each.cell.coordinates),
        "output": each.cell.job.output,
        "rows": found.rows,
        "without_gold": found.without_gold,
        "errors": found.errors,
        "tokens": dict(each.tokens),
        "metrics": {name: _estimate(estimate) for name, estimate in found.metrics.items()},
        "quantiles": {name: rounded(value) for name, value in found.quantiles.items()},
    }
    if found.confusion is not None:
        content["confusion"] = {
            "labels": found.confusion.labels,
            "counts": found.confusion.counts.tolist(),
        }
    if found.reliability is not None:
        content["reliability"] = {
            name: [rounded(value) for value in getattr(found.reliability, name).tolist()]
            for name in ("rows", "confidence", "accuracy")
        }
    return content


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {name: rounded(value) for name, value in asdict(estimate).items()}


def _kept_scores(output: str, name: str, sweep: Sweep) -> pa.Table:
    store = Output.at(output, sweep.storage).store
    try:
        return pq.read_table(pa.BufferReader(store.read(f"{SCORES}/{name}.parquet")))
    except FileNotFoundError as error:
        known = ", ".join(each.name for each in sweep.cells)
        raise ConfigError(f"{output} has no scores of a cell {name!r}; known: {known}") from error


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data
