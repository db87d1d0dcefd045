"""What to go on with by hand: rows that are most worth a look, and probabilities for cleanlab.

review.parquet, .jsonl   rows with prompts, media and answers. A row is worth it for a small
                         margin, a large off_set_mass, or because samples or cells disagree; the
                         reasons take turns. Rows that failed are not among them.
FILE.npy                 [rows, labels] float64, each row sums to 1
FILE.json                the labels in the order of the columns, and which rows were left out
FILE.rows.parquet        row_key of each row, in the same order
FILE.labels.npy          [rows] int64, the given label's number; only with gold answers
"""

from __future__ import annotations

import base64
import json
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.input.values import decode_rows
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.manifest import is_finished
from glm_batch.pipelines.planning.plan import Plan
from glm_batch.pipelines.report.answers import label_names, matrix
from glm_batch.pipelines.report.cards import asked, asked_columns
from glm_batch.pipelines.report.committed_rows import CommittedRows, committed_parts
from glm_batch.pipelines.report.input_rows import InputRows, Place
from glm_batch.pipelines.report.sweep_page import (
    SweepCell,
    SweepScores,
    by_question,
    places_of,
    sweep_scores,
)
from glm_batch.pipelines.tasks.kinds import ROW_COLUMNS, TOKEN_COLUMNS

Row = TypeVar("Row", Place, str)  # how a row is named: by its place, or by its key

PARQUET, JSONL = "review.parquet", "review.jsonl"
MARGIN, MASS, SAMPLES, CELLS = (
    "low margin",
    "large off_set_mass",
    "samples disagree",
    "cells disagree",
)
MAGIC = {
    b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif",
    b"BM": "image/bmp", b"\x1aE\xdf\xa3": "video/webm",
}  # fmt: skip
KEYS = pa.schema({"row_key": pa.string()})
PROBABILITIES = {"choose": "label_probs", "classify": "scores"}
Write = Callable[[npt.NDArray[Any]], None]
FAILED, NO_GOLD, UNKNOWN_GOLD = "failed", "without_gold", "gold_outside_of_the_labels"


def review_table(rows: CommittedRows, k: int) -> pa.Table:
    """The k rows most worth a look. Raises ConfigError for answers that tell nothing of doubt."""
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
    """One object a line; bytes become data: URLs, which this program and labelling tools read."""
    return b"".join(json_text(row).encode() + b"\n" for row in decode_rows(table))


def json_text(value: Any) -> str:
    """A value as JSON; with data: URLs for bytes, and null for NaN and infinity."""
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return json.dumps(_plain(value))


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
    """Prompt, gold and the input's own cells, media too; null for rows whose input is gone."""
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
            [None if value is None else json_text(value) for value in values], pa.string()
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


def write_pred_probs(output: Output, job: Job, path: str) -> dict[str, Any]:
    """Writes the files, returns FILE.json's content. ConfigError for a job without these."""
    file = Path(path)
    if file.suffix != ".npy":
        raise ConfigError(f"--pred-probs: {path}: name a file that ends in .npy")
    labels = probability_labels(output, job)
    plan, num_rows, left_out = output.standing_plan(), 0, Counter[str]()
    with ExitStack() as stack:
        write_probs = stack.enter_context(npy_file(file, np.float64, (len(labels),)))
        write_given = (
            stack.enter_context(npy_file(file.with_suffix(".labels.npy"), np.int64, ()))
            if job.task.gold
            else None
        )
        keys = stack.enter_context(pq.ParquetWriter(file.with_suffix(".rows.parquet"), KEYS))
        for rows, numbers in usable_rows(output, job, plan, labels, left_out):
            write_probs(matrix(rows[PROBABILITIES[job.task.kind]]).reshape(-1, len(labels)))
            keys.write_table(rows.select(KEYS.names))
            if write_given is not None:
                write_given(numbers)
            num_rows += rows.num_rows
    said = {
        "labels": list(labels),
        "rows": num_rows,
        "left_out": {name: rows for name, rows in left_out.items() if rows},
        "row_keys": file.with_suffix(".rows.parquet").name,
        "given_labels": file.with_suffix(".labels.npy").name if job.task.gold else None,
        "output": output.place,
        "fingerprint": plan.fingerprint,
    }
    file.with_suffix(".json").write_text(
        json.dumps(said, indent=1, ensure_ascii=False), encoding="utf-8"
    )
    return said


def usable_rows(
    output: Output, job: Job, plan: Plan, labels: Sequence[str], left_out: Counter[str]
) -> Iterator[tuple[pa.Table, npt.NDArray[np.int64]]]:
    """Each part's rows with probabilities, and a known gold label if any; others are counted."""
    codes = {label: number for number, label in enumerate(labels)}
    input_rows = InputRows(job, plan)
    for unit, _, part in committed_parts(output, plan):
        kept = pc.equal(part["status"], "ok").to_numpy()
        left_out[FAILED] += int((~kept).sum())
        numbers = np.zeros(part.num_rows, np.int64)
        if job.task.gold is not None:
            numbers = _numbers(input_rows.golds(unit, part), codes, part.num_rows)
            left_out[NO_GOLD] += int((kept & (numbers == -1)).sum())
            left_out[UNKNOWN_GOLD] += int((kept & (numbers == -2)).sum())
            kept = kept & (numbers >= 0)
        yield part.filter(pa.array(kept)), numbers[kept]


@contextmanager
def npy_file(path: Path, dtype: npt.DTypeLike, row_shape: tuple[int, ...]) -> Iterator[Write]:
    """A function that takes rows [n, *row_shape] for an .npy file of unknown length."""
    kind, num_rows = np.dtype(dtype), 0
    with tempfile.TemporaryFile(dir=path.absolute().parent) as data:

        def write(rows: npt.NDArray[Any]) -> None:
            nonlocal num_rows
            data.write(np.ascontiguousarray(rows, kind).tobytes())
            num_rows += len(rows)

        yield write
        data.seek(0)
        shape = (num_rows, *row_shape)
        header = {
            "descr": np.lib.format.dtype_to_descr(kind),
            "fortran_order": False,
            "shape": shape,
        }
        with path.open("wb") as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            shutil.copyfileobj(data, stream, 1 << 20)


def probability_labels(output: Output, job: Job) -> Sequence[str]:
    plan = output.standing_plan()
    facts = output.manifest().facts if is_finished(output, plan) else {}
    if job.task.kind == "choose" or facts.get("problem_type") == "single_label_classification":
        return label_names(job.task.kind, job.task.labels, facts)
    if job.task.kind == "classify" and not facts:
        raise ConfigError(
            f"--pred-probs: {output.place} is not finished, so its labels are not known yet"
        )
    raise ConfigError(
        "--pred-probs: only choose and single-label classify give one probability for each label"
    )


def _numbers(
    golds: Sequence[Any] | None, codes: dict[str, int], num_rows: int
) -> npt.NDArray[np.int64]:
    """Each row's gold label; -1 for a row without one, -2 for one that is no label of the job."""
    found = golds if golds is not None else [None] * num_rows
    return np.array([-1 if gold is None else codes.get(str(gold), -2) for gold in found], np.int64)
