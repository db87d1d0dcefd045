"""The work on a unit's table: rows to requests, and completions to output columns.

A row may ask for several things at once: it travels as one row for each of its requests, which come
back together, and what belongs to the row itself stands on the first of them. Names in travelling
tables: "#..." are our own, "in...." are the input's columns, the rest is the actors' contract.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from glm_batch.glm_actors.media.media_loader import MediaLoader
from glm_batch.glm_actors.units.batches import request_table, to_completions
from glm_batch.models.engine.api.request import Request
from glm_batch.models.errors import RowError
from glm_batch.models.processing.scores import Scaling
from glm_batch.pipelines.input.listing import InputFile
from glm_batch.pipelines.input.values import (
    LINE,
    NUMBER,
    Row,
    column_values,
    decode_rows,
    parse_line,
    row_key,
)
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.metrics.counts import Counts
from glm_batch.pipelines.tasks.affinity import with_prefix_key
from glm_batch.pipelines.tasks.kinds import TOKEN_COLUMNS
from glm_batch.pipelines.tasks.prompts import task_columns
from glm_batch.pipelines.tasks.task_runner import Asked, Prompts, ReadRow, Runner, build_runner

UNIT, ROW, FIRST, LOST = "#unit", "#row", "#first", "#lost"
KEY, GOLD, RIGHT = "#key", "#gold", "#right"  # only a row's first request has a KEY
NOTE = "#note."
OWN_PARSED = ((UNIT, pa.int32()), (RIGHT, pa.bool_()))
INPUT = "in."
INPUT_LINE, INPUT_NUMBER = INPUT + LINE, INPUT + NUMBER


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """A job's task as it travels to the workers; `schema` is the output's.

    `run_id` names the run there; jobs that run together have the same, and names of their own.
    `scaling` is what the job's calibration held when its plan was made: workers read no such file.
    """

    job: Job
    model_dir: str
    schema: pa.Schema
    run_id: str
    name: str = ""
    scaling: Scaling | None = None


_runners: dict[tuple[str, str], Any] = {}
_loaders: dict[str, MediaLoader] = {}  # of all these runners


def runner_of(spec: TaskSpec) -> Any:
    """The Runner of this process for this job, built once.

    A process that goes on to another run forgets those of the first.
    """
    key = (spec.run_id, spec.name)
    if key not in _runners:
        if any(run_id != spec.run_id for run_id, _ in _runners):
            for earlier in _runners.values():
                earlier.close()
            _runners.clear()
            _loaders.clear()
        _runners[key] = build_runner(spec.job, spec.model_dir, _loaders, spec.scaling)
    return _runners[key]


def unit_table(
    table: pa.Table, unit: int, file: InputFile, start: int, earlier: Mapping[int, str]
) -> pa.Table:
    """What was read of a unit, as it travels: with the unit's number and each row's default key.

    `start` is the row of the file with which the table begins. `earlier` names, for a row of the
    table whose key an earlier row has, that row.
    """
    num_rows = table.num_rows
    own = {
        UNIT: pa.array([unit] * num_rows, pa.int32()),
        ROW: pa.array([row_key(file, row) for row in range(start, start + num_rows)], pa.string()),
        FIRST: pa.array([earlier.get(row) for row in range(num_rows)], pa.string()),
        LOST: pa.nulls(num_rows, pa.string()),
    }
    return pa.table(own | {INPUT + name: table[name] for name in table.column_names})


def lost_table(table: pa.Table, error: RowError) -> pa.Table:
    """A unit's table of rows that could not be read."""
    lost = pa.array([json.dumps([error.code, error.message])] * table.num_rows, pa.string())
    return table.set_column(table.schema.get_field_index(LOST), LOST, lost)


def render_unit(spec: TaskSpec, table: pa.Table, lost: RowError | None = None) -> pa.Table:
    """Rows to requests. Keys, carried columns and gold answers go along.

    With `lost` these rows get that error instead of a prompt.
    """
    rendered = render_rows(spec, table, lost)
    result = request_table(rendered.ids, rendered.requests)
    result = result.append_column(UNIT, table[UNIT].take(rendered.owners))
    for name in rendered.beside.column_names:
        result = result.append_column(name, rendered.beside[name])
    return with_prefix_key(result)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """What rows ask of the engine: id and request of each travelling row, and what goes along.

    `owners` are the rows' numbers, in order; a row that failed has one that is an error.
    """

    ids: list[str]
    requests: list[Request | RowError]
    owners: pa.Array
    beside: pa.Table


def render_rows(
    spec: TaskSpec, table: pa.Table, lost: RowError | None = None, prompts: Prompts | None = None
) -> Rendered:
    """As `render_unit`; `prompts` finds prompts that another job has made."""
    runner: Runner = runner_of(spec)
    rows: list[Row | RowError]
    if lost is not None and spec.job.asks_by_row:
        rows = [lost for _ in range(table.num_rows)]  # whose lines are not looked at again
    else:
        rows = _with_lost(_rows(spec.job, table), table)
    carried, misfits = _carried(spec, table, rows)
    asked = list(runner.ask(_read_rows(table, rows, misfits, lost), prompts))
    counts = [max(len(each.requests), 1) for each in asked]
    heads = [row if place == 0 else None for row, n in enumerate(counts) for place in range(n)]
    ids: list[str] = []
    requests: list[Request | RowError] = []
    for each in asked:
        if each.error is not None:
            ids.append(each.key)
            requests.append(each.error)
        ids += [request.id for request in each.requests]
        requests += each.requests
    beside = pa.table(_beside(spec.job, runner, rows, asked) | carried)
    return Rendered(
        ids=ids,
        requests=requests,
        owners=pa.array([row for row, n in enumerate(counts) for _ in range(n)], pa.int32()),
        beside=beside if len(ids) == len(rows) else beside.take(pa.array(heads, pa.int64())),
    )


def num_rows(table: pa.Table) -> int:
    """How many rows of the input the travelling rows of a table stand for."""
    return table.num_rows - table[KEY].null_count  # type: ignore[no-any-return]


def rows_of(table: pa.Table, start: int, stop: int | None) -> pa.Table:
    """The travelling rows that stand for rows [start, stop) of the input."""
    starts = _starts(table)[start : None if stop is None else stop + 1]
    return table.slice(starts[0], starts[-1] - starts[0])


def parse_unit(
    spec: TaskSpec,
    table: pa.Table,
    start: int = 0,
    stop: int | None = None,
    lost: RowError | None = None,
) -> pa.Table:
    """Completions of rows [start, stop) to output columns and OWN_PARSED.

    RIGHT says whether a row agrees with its gold answer. With `lost` these rows get that error,
    whatever their completions say.
    """
    runner: Runner = runner_of(spec)
    table = rows_of(table, start, stop)
    starts = _starts(table)
    heads = table.take(pa.array(starts[:-1], pa.int64()))
    notes = heads.select([NOTE + name for name in runner.notes]).rename_columns(list(runner.notes))
    completions = to_completions(table)
    outputs = [
        runner.columns(note, completions[begin:end], lost)
        for note, (begin, end) in zip(_dicts(notes), pairwise(starts), strict=True)
    ]
    given = {"row_key": heads[KEY], "attempts": pa.array([1] * heads.num_rows, pa.int32())}
    given |= {name: heads[INPUT + name] for name in spec.job.carry}
    columns = {
        field.name: given[field.name]
        if field.name in given
        else pa.array([row[field.name] for row in outputs], field.type)
        for field in spec.schema
    }
    own = {UNIT: heads[UNIT], RIGHT: pa.array(_right(runner, outputs, heads), pa.bool_())}
    return pa.table(columns | own, schema=pa.schema([*spec.schema, *OWN_PARSED]))


def count_rows(table: pa.Table) -> Counts:
    """What the rows of a parsed unit add up to."""
    status = Counter(table["status"].to_pylist())
    codes = Counter(table["error_code"].to_pylist())
    codes.pop(None, None)
    right = Counter(table[RIGHT].to_pylist())
    tokens = {name: pc.sum(table[name]).as_py() or 0 for name in TOKEN_COLUMNS}
    return Counts(
        rows=table.num_rows,
        ok=status["ok"],
        filtered=status["filtered"],
        errors=dict(codes),
        gold_rows=right[True] + right[False],
        gold_correct=right[True],
        **tokens,
    )


def _read_rows(
    table: pa.Table,
    rows: Sequence[Row | RowError],
    misfits: Sequence[RowError | None],
    lost: RowError | None,
) -> list[ReadRow]:
    names, firsts = table[ROW].to_pylist(), table[FIRST].to_pylist()
    sizes, numbers = [0] * len(rows), [None] * len(rows)
    if INPUT_LINE in table.column_names:
        sizes = [len(line or b"") for line in table[INPUT_LINE].to_pylist()]
    if INPUT_NUMBER in table.column_names:
        numbers = table[INPUT_NUMBER].to_pylist()
    return [
        ReadRow(name=name, row=row, first=first, error=lost or misfit, size=size, line=number)
        for name, row, first, misfit, size, number in zip(
            names, rows, firsts, misfits, sizes, numbers, strict=True
        )
    ]


def _with_lost(rows: list[Row | RowError], table: pa.Table) -> list[Row | RowError]:
    if table[LOST].null_count == table.num_rows:
        return rows
    return [
        row if lost is None else RowError(*json.loads(lost))
        for row, lost in zip(rows, table[LOST].to_pylist(), strict=True)
    ]


def _rows(job: Job, table: pa.Table) -> list[Row | RowError]:
    """The rows with the columns that are looked at here: carried columns of Parquet are not."""
    if INPUT_LINE in table.column_names:
        return [parse_line(line) for line in table[INPUT_LINE].to_pylist()]
    looked_at = {*task_columns(job.task), job.key}
    names = [name for name in table.column_names if name.removeprefix(INPUT) in looked_at]
    picked = table.select(names).rename_columns([name.removeprefix(INPUT) for name in names])
    return decode_rows(picked) if names else [{} for _ in range(table.num_rows)]


def _beside(
    job: Job, runner: Runner, rows: Sequence[Row | RowError], asked: Sequence[Asked]
) -> dict[str, pa.Array]:
    """Keys, gold answers as JSON texts, and what the runner has noted."""
    columns = {KEY: pa.array([each.key for each in asked], pa.string())}
    if (gold := job.task.gold) is not None:
        values = [None if isinstance(row, RowError) else row.get(gold) for row in rows]
        columns[GOLD] = pa.array(
            [None if value is None else _json_text(value) for value in values], pa.string()
        )
    for name, dtype in runner.notes.items():
        columns[NOTE + name] = pa.array([each.note.get(name) for each in asked], dtype)
    return columns


def _starts(table: pa.Table) -> list[int]:
    """The travelling row with which each row begins, and the end."""
    is_first = table[KEY].is_valid().to_pylist()
    return [*(place for place, first in enumerate(is_first) if first), table.num_rows]


def _right(runner: Any, outputs: Sequence[Mapping[str, Any]], heads: pa.Table) -> list[bool | None]:
    if GOLD not in heads.column_names:
        return [None] * heads.num_rows
    golds = [None if text is None else json.loads(text) for text in heads[GOLD].to_pylist()]
    return [runner.is_right(row, gold) for row, gold in zip(outputs, golds, strict=True)]


def _dicts(table: pa.Table) -> list[dict[str, Any]]:
    return table.to_pylist() if table.num_columns else [{} for _ in range(table.num_rows)]


def _json_text(value: Any) -> str:
    return json.dumps(value, default=str)


def _carried(
    spec: TaskSpec, table: pa.Table, rows: Sequence[Row | RowError]
) -> tuple[dict[str, pa.Array], list[RowError | None]]:
    """The carried columns in the output's types, and which rows do not fit (null there)."""
    misfits: list[RowError | None] = [None] * table.num_rows
    columns: dict[str, pa.Array] = {}
    for name in spec.job.carry:
        dtype = spec.schema.field(name).type
        if INPUT_LINE in table.column_names:
            values = [None if isinstance(row, RowError) else row.get(name) for row in rows]
            columns[INPUT + name] = _typed(values, dtype, name, misfits)
        else:
            columns[INPUT + name] = _valid(table[INPUT + name].cast(dtype), name, misfits)
    return columns, misfits


def _typed(
    values: list[Any], dtype: pa.DataType, name: str, misfits: list[RowError | None]
) -> pa.Array:
    """JSON values as an Arrow column; one of text takes any value, as JSON text."""
    if pa.types.is_string(dtype):
        values = [
            value if value is None or isinstance(value, str) else _json_text(value)
            for value in values
        ]
    try:
        return pa.array(values, dtype)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):
        return pa.array(
            [_fitting(values, index, dtype, name, misfits) for index in range(len(values))], dtype
        )


def _fitting(
    values: list[Any], index: int, dtype: pa.DataType, name: str, misfits: list[RowError | None]
) -> Any:
    try:
        pa.array([values[index]], dtype)
    except UnicodeEncodeError:
        misfits[index] = RowError(
            "not_utf8", f"the carried column {name!r} holds a lone surrogate: it is no valid text"
        )
        return None
    except (pa.ArrowException, OverflowError):
        held = type(values[index]).__name__
        misfits[index] = RowError(
            "wrong_type", f"the carried column {name!r} holds {held} where others hold {dtype}"
        )
        return None
    return values[index]


def _valid(column: pa.ChunkedArray, name: str, misfits: list[RowError | None]) -> pa.ChunkedArray:
    """A Parquet column with null for each value that is not UTF-8."""
    try:
        column.validate(full=True)
        return column
    except pa.ArrowInvalid:
        kept: list[Any] = []
        for index, value in enumerate(column_values(column)):
            broken = isinstance(value, bytes) and not pa.types.is_binary(column.type)
            if broken:
                misfits[index] = RowError("not_utf8", f"the carried column {name!r} is not UTF-8")
            kept.append(None if broken else value)
        return pa.chunked_array([pa.array(kept, column.type)])
