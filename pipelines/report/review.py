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
from itertools import zip_longest
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.report.cards import asked, asked_columns
from glm_batch.pipelines.report.committed_rows import CommittedRows
from glm_batch.pipelines.report.input_rows import InputRows, Place
from glm_batch.pipelines.report.sweep_page import (
    SweepCell,
    SweepScores,
    by_question,
    places_of,
    sweep_scores,
)
from glm_batch.pipelines.tasks.schema import ROW_COLUMNS
from glm_batch.pipelines.tasks.tasks import TOKEN_COLUMNS

Row = TypeVar("Row", Place, str)  # how a row is named: by its place, or by its key

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


def review_table(rows: CommittedRows, k: int) -> pa.Table:
    """The k rows of one output, the most worthy first. Raises ConfigError for answers that tell
    nothing of doubt.
    """
    if rows.schema is None:
        raise ConfigError(f"--review: {rows.output.place} has no committed rows yet")
    lists = {
        MARGIN: rows.lowest("margin", k),
        MASS: rows.lowest("-off_set_mass", k),
        SAMPLES: rows.lowest("-disagreement", k),
    }
    if not any(lists.values()):
        raise ConfigError(
            f"--review: answers of kind {rows.question.kind} tell nothing about doubt here; for "
            "texts set sampling.logprobs or sampling.n above 1"
        )
    reasons = _in_turns(lists, k)
    found = rows.picked(reasons)
    picked = [found[place] for place in reasons]
    left_out = {"row_key", *ROW_COLUMNS, *TOKEN_COLUMNS}
    columns: dict[str, pa.Array] = {
        "rank": pa.array(range(1, len(picked) + 1), pa.int32()),
        "row_key": pa.array([each.columns["row_key"] for each in picked], pa.string()),
        "reasons": pa.array(list(reasons.values()), pa.list_(pa.string())),
        "margin": pa.array([each.margin for each in picked], pa.float64()),
    }
    columns |= {
        field.name: pa.array([each.columns[field.name] for each in picked], field.type)
        for field in rows.schema
        if field.name not in left_out
    }
    return pa.table(columns | _input_columns(rows.job, rows.input_rows, list(reasons), columns))


def sweep_review_table(
    output: Output, cells: Sequence[SweepCell], jobs: Mapping[str, tuple[Output, Job]], k: int
) -> pa.Table:
    """k rows of each task on each data set. `jobs` holds the output and the job of each cell."""
    tables = []
    for some in by_question(cells):
        with sweep_scores(output, some) as scores:
            tables.append(_question_table(scores, some[0], *jobs[some[0].name], k))
    return pa.concat_tables(tables, promote_options="permissive")


def _question_table(
    scores: SweepScores, first: SweepCell, owner: Output, job: Job, k: int
) -> pa.Table:
    lists = {
        CELLS: scores.lowest("-disagreement", k, "disagreement > 0"),
        "low confidence": scores.lowest("confidence", k),
        MASS: scores.lowest("-off_set_mass", k),
    }
    reasons = _in_turns(lists, k)
    known = scores.rows(reasons)
    rows, plan = [known[key] for key in reasons], owner.standing_plan()
    places = places_of(owner, plan, reasons)
    answers = pa.list_(pa.struct({"cell": pa.string(), "answer": pa.string()}))
    columns: dict[str, pa.Array] = {
        "rank": pa.array(range(1, len(rows) + 1), pa.int32()),
        "task": pa.array([first.coordinates["task"]] * len(rows), pa.string()),
        "dataset": pa.array([first.dataset] * len(rows), pa.string()),
        "row_key": pa.array(list(reasons), pa.string()),
        "reasons": pa.array(list(reasons.values()), pa.list_(pa.string())),
        **{
            name: pa.array([getattr(row, name) for row in rows], pa.float64())
            for name in ("disagreement", "confidence", "off_set_mass")
        },
        "answers": pa.array(
            [
                [{"cell": name, "answer": answer} for name, answer in row.answers.items()]
                for row in rows
            ],
            answers,
        ),
    }
    in_order = [places.get(key) for key in reasons]
    return pa.table(columns | _input_columns(job, InputRows(job, plan), in_order, columns))


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


def _in_turns(lists: Mapping[str, Sequence[Row]], k: int) -> dict[Row, list[str]]:
    """The first of each list, the second of each, and so on, each row once with all its reasons."""
    turns = [row for some in zip_longest(*lists.values()) for row in some if row is not None]
    chosen: dict[Row, list[str]] = {row: [] for row in list(dict.fromkeys(turns))[:k]}
    for name, rows in lists.items():
        for row in rows:
            if row in chosen:
                chosen[row].append(name)
    return chosen


def _input_columns(
    job: Job, input_rows: InputRows, places: Sequence[Place | None], taken: Iterable[str]
) -> dict[str, pa.Array]:
    """Prompt, gold and the input's own cells, media among them; nothing of rows whose input is
    gone.
    """
    names = asked_columns(job)
    found = input_rows.some([place for place in places if place is not None], names)
    rows = [None if place is None else found.get(place) for place in places]
    texts = [None if row is None else asked(job, row).prompt for row in rows]
    columns = {"prompt": pa.array(texts, pa.string())} if "prompt" not in taken else {}
    for name in names:
        values = [row.get(name) if isinstance(row, dict) else None for row in rows]
        if name not in taken:
            columns[name if name not in columns else f"input.{name}"] = _typed(
                values, input_rows.plan.schema.field(name).type
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
