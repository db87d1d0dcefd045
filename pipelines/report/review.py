"""The rows of an output or a sweep that are most worth a person's look, as a table with their
prompts and media.

A row is worth it for a small margin, a large off_set_mass, or because samples or cells disagree on
it; the reasons take turns, so that each has its share of the rows. Rows that failed are not among
them: the report lists these by code.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.planning.plan import Plan
from glm_batch.pipelines.report.answers import sureness, to_floats
from glm_batch.pipelines.report.cards import asked
from glm_batch.pipelines.report.collect import parts
from glm_batch.pipelines.report.input_rows import InputRows, Place
from glm_batch.pipelines.report.sweep_page import (
    SweepCell,
    answers_by_key,
    by_question,
    disagreement,
    scores_of,
)
from glm_batch.pipelines.report.tallies import Floats, Lowest, Picked
from glm_batch.pipelines.tasks.prompts import prompt_columns
from glm_batch.pipelines.tasks.schema import ROW_COLUMNS
from glm_batch.pipelines.tasks.tasks import TOKEN_COLUMNS

PARQUET, JSONL = "review.parquet", "review.jsonl"
MARGIN, MASS, SAMPLES, CELLS = (
    "low margin",
    "large off_set_mass",
    "samples disagree",
    "cells disagree",
)
MAGIC = {
    b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"BM": "image/bmp",
    b"\x1aE\xdf\xa3": "video/webm",
}  # fmt: skip


@dataclass(slots=True)
class Choice:
    """A row that was chosen: why, and by which numbers."""

    picked: Picked
    reasons: list[str] = field(default_factory=list)


def review_table(output: Output, job: Job, k: int) -> pa.Table:
    """The k rows of one output, the most worthy first. Raises ConfigError for answers that tell
    nothing of doubt.
    """
    plan = output.standing_plan()
    lists = {name: Lowest(k) for name in (MARGIN, MASS, SAMPLES)}
    schema = None
    for unit, _, part in parts(output, plan):
        schema = schema or part.schema
        for name, scores in _doubts(job, part).items():
            lists[name].offer(unit.index, part, scores)
    if schema is None:
        raise ConfigError(f"--review: {output.place} has no committed rows yet")
    if not any(chosen.rows for chosen in lists.values()):
        raise ConfigError(
            f"--review: answers of kind {job.task.kind} tell nothing about doubt here; for texts set "
            "sampling.logprobs or sampling.n above 1"
        )
    return _table(job, plan, schema, _in_turns(lists, k))


def sweep_review_table(
    output: Output, cells: Sequence[SweepCell], jobs: Mapping[str, tuple[Output, Job]], k: int
) -> pa.Table:
    """k rows of each task on each data set. `jobs` holds the output and the job of each cell."""
    tables = []
    for some in by_question(cells):
        owner, job = jobs[some[0].name]
        answers = answers_by_key(output, some)
        doubts = _sweep_doubts(output, some, answers)
        tables.append(_sweep_table(owner, job, some, answers, doubts, k))
    return pa.concat_tables(tables, promote_options="permissive")


def to_jsonl(table: pa.Table) -> bytes:
    """One object a line; bytes become data: URLs, which this program and labelling tools read as
    media.
    """
    return b"".join(json.dumps(_plain(row)).encode() + b"\n" for row in table.to_pylist())


def to_parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _doubts(job: Job, part: pa.Table) -> dict[str, Floats]:
    """For each reason the rows' scores, lowest first; NaN for rows that it says nothing about."""
    failed = ~pc.equal(part["status"], "ok").to_numpy()
    found = {MARGIN: sureness(job.task.kind, part)[1]}
    if "off_set_mass" in part.column_names:
        found[MASS] = -to_floats(part["off_set_mass"])
    if job.task.kind == "generate" and pa.types.is_list(part["text"].type):
        shares = [
            math.nan if texts is None else -disagreement(texts)
            for texts in part["text"].to_pylist()
        ]
        found[SAMPLES] = np.array(shares, np.float64)
    return {name: np.where(failed, np.nan, scores) for name, scores in found.items()}


def _in_turns(lists: Mapping[str, Lowest], k: int) -> list[Choice]:
    """The first of each list, the second of each, and so on, each row once with all its reasons."""
    chosen: dict[Place, Choice] = {}
    for turn in range(k):
        for found in lists.values():
            if turn < len(found.rows) and len(chosen) < k:
                picked = found.rows[turn]
                chosen.setdefault((picked.unit, picked.row), Choice(picked))
    for name, found in lists.items():
        for picked in found.rows:
            if (picked.unit, picked.row) in chosen:
                chosen[picked.unit, picked.row].reasons.append(name)
    return list(chosen.values())


def _table(job: Job, plan: Plan, schema: pa.Schema, choices: Sequence[Choice]) -> pa.Table:
    rows = [choice.picked.columns for choice in choices]
    margins = sureness(job.task.kind, pa.Table.from_pylist(rows, schema))[1]
    left_out = {"row_key", *ROW_COLUMNS, *TOKEN_COLUMNS}
    columns: dict[str, pa.Array] = {
        "rank": pa.array(range(1, len(rows) + 1), pa.int32()),
        "row_key": pa.array([row["row_key"] for row in rows], pa.string()),
        "reasons": pa.array([choice.reasons for choice in choices], pa.list_(pa.string())),
        "margin": pa.array(margins, pa.float64(), from_pandas=True),
    }
    columns |= {
        each.name: pa.array([row[each.name] for row in rows], each.type)
        for each in schema
        if each.name not in left_out
    }
    return pa.table(
        columns | _input_columns(job, plan, [choice.picked for choice in choices], columns)
    )


def _input_columns(
    job: Job, plan: Plan, picked: Sequence[Picked], taken: Iterable[str]
) -> dict[str, pa.Array]:
    """Prompt, gold and the input's own cells, media among them; nothing of rows whose input is
    gone.
    """
    gold = job.task.gold
    names = tuple(dict.fromkeys((*prompt_columns(job.task), *((gold,) if gold else ()))))
    places = [(each.unit, each.row) for each in picked]
    found = InputRows(job, plan).some(sorted(set(places)), names)
    rows = [found.get(place) for place in places]
    texts = [None if row is None else asked(job, row).prompt for row in rows]
    columns = {"prompt": pa.array(texts, pa.string())} if "prompt" not in taken else {}
    for name in names:
        values = [row.get(name) if isinstance(row, dict) else None for row in rows]
        if name not in taken:
            columns[name if name not in columns else f"input.{name}"] = _typed(
                values, plan.schema.field(name).type
            )
    return columns


def _typed(values: list[Any], dtype: pa.DataType) -> pa.Array:
    """Cells of JSONL may have other types than most: then all of them stand as JSON texts."""
    try:
        return pa.array(values, dtype)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):
        return pa.array(
            [None if value is None else json.dumps(_plain(value)) for value in values], pa.string()
        )


# ---- sweeps


def _sweep_doubts(
    output: Output, cells: Sequence[SweepCell], answers: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, float]]:
    """For each row key its disagreement, mean confidence and mean off_set_mass, where the cells
    have them.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for cell in cells:
        table = scores_of(output, cell.name)
        for name in ("confidence", "off_set_mass"):
            if name in table.column_names:
                for key, value in zip(
                    table["row_key"].to_pylist(), table[name].to_pylist(), strict=True
                ):
                    if value is not None:
                        found.setdefault(key, {}).setdefault(name, []).append(value)
    means = {
        key: {name: float(np.mean(each)) for name, each in values.items()}
        for key, values in found.items()
    }
    return {
        key: {**means.get(key, {}), CELLS: disagreement(row["answers"].values())}
        for key, row in answers.items()
    }


def _sweep_table(
    owner: Output,
    job: Job,
    cells: Sequence[SweepCell],
    answers: Mapping[str, Mapping[str, Any]],
    doubts: Mapping[str, Mapping[str, float]],
    k: int,
) -> pa.Table:
    plan = owner.standing_plan()
    lists = {name: Lowest(k) for name in (CELLS, "low confidence", MASS)}
    nothing = (math.nan, math.nan, math.nan)
    for unit, _, part in parts(owner, plan):
        scores = [
            _sweep_scores(doubts.get(key, {})) or nothing for key in part["row_key"].to_pylist()
        ]
        for chosen, values in zip(lists.values(), np.array(scores, np.float64).T, strict=True):
            chosen.offer(unit.index, part, values)
    choices = _in_turns(lists, k)
    keys = [choice.picked.columns["row_key"] for choice in choices]
    first = cells[0]
    columns: dict[str, pa.Array] = {
        "rank": pa.array(range(1, len(keys) + 1), pa.int32()),
        "task": pa.array([first.coordinates["task"]] * len(keys), pa.string()),
        "dataset": pa.array([first.dataset] * len(keys), pa.string()),
        "row_key": pa.array(keys, pa.string()),
        "reasons": pa.array([choice.reasons for choice in choices], pa.list_(pa.string())),
        "disagreement": pa.array([doubts[key][CELLS] for key in keys], pa.float64()),
        "confidence": pa.array([doubts[key].get("confidence") for key in keys], pa.float64()),
        "off_set_mass": pa.array([doubts[key].get("off_set_mass") for key in keys], pa.float64()),
        "answers": pa.array(
            [
                [
                    {"cell": name, "answer": answer}
                    for name, answer in answers[key]["answers"].items()
                ]
                for key in keys
            ],
            pa.list_(pa.struct({"cell": pa.string(), "answer": pa.string()})),
        ),
    }
    return pa.table(
        columns | _input_columns(job, plan, [choice.picked for choice in choices], columns)
    )


def _sweep_scores(doubt: Mapping[str, float]) -> tuple[float, float, float] | None:
    if not doubt:
        return None
    differ = -doubt[CELLS] if doubt[CELLS] > 0 else math.nan
    return differ, doubt.get("confidence", math.nan), -doubt.get("off_set_mass", math.nan)


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    if isinstance(value, bytes):
        return f"data:{_media_type(value)};base64,{base64.b64encode(value).decode()}"
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _media_type(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    if data[4:8] == b"ftyp":
        return "video/mp4"
    return next(
        (name for magic, name in MAGIC.items() if data.startswith(magic)),
        "application/octet-stream",
    )
