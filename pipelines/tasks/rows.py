"""The work on one unit's table: rows to requests, and completions to output columns.

Pure functions of tables, for whatever runs them. Owns what is done with keys, carried columns and
gold answers; the prompt and the answer belong to pipelines.tasks.tasks. Knows nothing of Ray or
files.

Names in travelling tables: "#..." are our own, "in...." are the input's columns, the rest is the
actors' contract.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from glm_batch.glm_actors.media.media_loader import MediaLoader
from glm_batch.glm_actors.units.batches import CONTINUATION, request_table, to_completions
from glm_batch.models.engine.api.request import Completion, Request
from glm_batch.models.errors import RowError
from glm_batch.models.processing.prompt import Prompt
from glm_batch.models.processing.scores import Scaling
from glm_batch.pipelines.input.listing import InputFile
from glm_batch.pipelines.input.values import (
    LINE,
    Row,
    column_values,
    decode_rows,
    key_text,
    parse_line,
    row_key,
)
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.metrics.counts import Counts
from glm_batch.pipelines.tasks.affinity import with_prefix_key
from glm_batch.pipelines.tasks.prompts import cell_text, prompt_columns
from glm_batch.pipelines.tasks.tasks import TOKEN_COLUMNS, TaskRunner

UNIT, ROW, FIRST, LOST = "#unit", "#row", "#first", "#lost"
GOLD, GOLD_TOKENS, PROMPT, RIGHT = "#gold", "#gold_tokens", "#prompt", "#right"
OWN_PARSED = ((UNIT, pa.int32()), (RIGHT, pa.bool_()))
INPUT = "in."
INPUT_LINE = INPUT + LINE


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """A job's task as it travels to the workers; `run_id` names the run there. `schema` is the
    output's.

    Several jobs that run together have the same `run_id`, and names of their own. `scaling` is what
    the job's calibration held when its plan was made: workers read no such file.
    """

    job: Job
    model_dir: str
    schema: pa.Schema
    run_id: str
    name: str = ""
    scaling: Scaling | None = None


class Runner(Protocol):
    """What is built once for a job in a process, and may have started other processes."""

    def close(self) -> None: ...


R = TypeVar("R", bound=Runner)
_runners: dict[tuple[str, str], Any] = {}
_loaders: dict[str, MediaLoader] = {}  # of all these runners


def task_runner(spec: TaskSpec) -> TaskRunner:
    """The runner of this process for this job."""
    return kept_runner(
        spec, lambda job, model_dir: TaskRunner(job, model_dir, _loaders, spec.scaling)
    )


def kept_runner(spec: TaskSpec, build: Callable[[Job, str], R]) -> R:
    """What `build` makes of this job, once; a process that goes on to another run forgets those of
    the first.
    """
    key = (spec.run_id, spec.name)
    if key not in _runners:
        if any(run_id != spec.run_id for run_id, _ in _runners):
            for earlier in _runners.values():
                earlier.close()
            _runners.clear()
            _loaders.clear()
        _runners[key] = build(spec.job, spec.model_dir)
    kept: R = _runners[key]
    return kept


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
    """Rows to requests: keys, prompts, token ids. Carried columns and gold answers go along.

    With `lost` these rows get that error instead of a prompt.
    """
    rendered = render_rows(spec, table, lost)
    result = request_table(rendered.keys, rendered.requests).append_column(UNIT, table[UNIT])
    for name, column in rendered.beside.items():
        result = result.append_column(name, column)
    return with_prefix_key(result)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """Rows as the engine takes them: key and request of each, and the columns that go along."""

    keys: list[str]
    requests: list[Request | RowError]
    beside: dict[str, pa.Array]


Prompts = Callable[[TaskRunner, list[Row]], Sequence[Prompt | RowError]]


def render_rows(
    spec: TaskSpec,
    table: pa.Table,
    lost: RowError | None = None,
    prompts: Prompts = TaskRunner.prompts,
) -> Rendered:
    """As `render_unit`; `prompts` makes prompts of rows, or finds those that another job has made."""
    runner = task_runner(spec)
    rows = _with_lost(_rows(spec.job, table), table)
    carried, misfits = _carried(spec, table, rows)
    if lost:
        misfits = [lost] * table.num_rows
    names = zip(rows, table[ROW].to_pylist(), table[FIRST].to_pylist(), misfits, strict=True)
    checked = [_checked(spec.job, *name) for name in names]
    keys = [key for key, _ in checked]
    good = prompts(runner, [row for _, row in checked if not isinstance(row, RowError)])
    requests, continuations = _requests(runner, checked, good)
    beside = _beside(spec.job, rows) | carried
    if spec.job.task.gold_logprobs:
        beside |= _scored(continuations)
    return Rendered(keys=keys, requests=requests, beside=beside)


def parse_unit(spec: TaskSpec, table: pa.Table, lost: RowError | None = None) -> pa.Table:
    """Completions to the job's output columns and OWN_PARSED; RIGHT says whether a row agrees with
    its gold answer.

    With `lost` these rows get that error, whatever their completions say.
    """
    runner = task_runner(spec)
    completions: list[Completion | RowError] = (
        [lost] * table.num_rows if lost else to_completions(table)
    )
    golds = _from_json(table, GOLD)
    prompts = _from_json(table, PROMPT)
    gold_tokens = (
        table[GOLD_TOKENS].to_pylist()
        if GOLD_TOKENS in table.column_names
        else [None] * table.num_rows
    )
    outputs: list[dict[str, Any]] = []
    for completion, prompt, scored in zip(completions, prompts, gold_tokens, strict=True):
        if isinstance(completion, RowError):
            outputs.append(runner.error_columns(completion))
        else:
            outputs.append(runner.to_columns(completion, prompt or {}, scored))
    right = [
        None if gold is None else runner.is_right(row, gold)
        for row, gold in zip(outputs, golds, strict=True)
    ]
    given = {"row_key": table["row_key"], "attempts": pa.array([1] * table.num_rows, pa.int32())}
    given |= {name: table[INPUT + name] for name in spec.job.carry}
    columns = {
        field.name: given[field.name]
        if field.name in given
        else pa.array([row[field.name] for row in outputs], field.type)
        for field in spec.schema
    }
    own = {UNIT: table[UNIT], RIGHT: pa.array(right, pa.bool_())}
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


def _checked(
    job: Job, row: Row | RowError, default: str, first: str | None, misfit: RowError | None
) -> tuple[str, Row | RowError]:
    """A row's key, and the row or what is wrong with it before its prompt is looked at."""
    key = default
    try:
        if isinstance(row, RowError):
            raise row
        if job.key is not None:
            key = key_text(row, job.key)
        if first is not None:
            raise RowError(
                "duplicate_key", f"{job.key} {key!r} is the key of an earlier row: {first}"
            )
        if misfit is not None:
            raise misfit
        return key, row
    except RowError as error:
        return key, error


def _requests(
    runner: TaskRunner,
    rows: Sequence[tuple[str, Row | RowError]],
    good: Sequence[Prompt | RowError],
) -> tuple[list[Request | RowError], list[Sequence[int] | None]]:
    """A request for each row, and what to score beside it; `good` are the prompts of those without
    an error.
    """
    prompts = iter(good)
    requests: list[Request | RowError] = []
    continuations: list[Sequence[int] | None] = []
    for key, row in rows:
        continuation = None
        try:
            if isinstance(row, RowError):
                raise row
            prompt = next(prompts)
            if isinstance(prompt, RowError):
                raise prompt
            continuation = runner.gold_ids(row, prompt)
            requests.append(runner.request(key, prompt))
        except RowError as error:
            requests.append(error)
        continuations.append(continuation)
    return requests, continuations


def _scored(continuations: Sequence[Sequence[int] | None]) -> dict[str, pa.Array]:
    lengths = [None if ids is None else len(ids) for ids in continuations]
    return {
        CONTINUATION: pa.array(continuations, pa.list_(pa.int32())),
        GOLD_TOKENS: pa.array(lengths, pa.int32()),
    }


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
    looked_at = {*prompt_columns(job.task), job.task.gold, job.key}
    names = [name for name in table.column_names if name.removeprefix(INPUT) in looked_at]
    picked = table.select(names).rename_columns([name.removeprefix(INPUT) for name in names])
    return decode_rows(picked) if names else [{} for _ in range(table.num_rows)]


def _beside(job: Job, rows: Sequence[Row | RowError]) -> dict[str, pa.Array]:
    """What the parse stage needs of the rows, as JSON texts: gold answers, and for tag the prompt's
    cells.
    """
    columns = {}
    if (gold := job.task.gold) is not None:
        values = [None if isinstance(row, RowError) else row.get(gold) for row in rows]
        columns[GOLD] = pa.array(
            [None if value is None else _json_text(value) for value in values], pa.string()
        )
    if job.task.kind == "tag":
        columns[PROMPT] = pa.array(
            [_cells(row, prompt_columns(job.task)) for row in rows], pa.string()
        )
    return columns


def _cells(row: Row | RowError, columns: Sequence[str]) -> str | None:
    """The prompt's cells as texts: the template makes the same prompt of them as of the row."""
    try:
        return (
            None
            if isinstance(row, RowError)
            else json.dumps({name: cell_text(row, name) for name in columns})
        )
    except RowError:
        return None


def _from_json(table: pa.Table, name: str) -> list[Any]:
    if name not in table.column_names:
        return [None] * table.num_rows
    return [None if text is None else json.loads(text) for text in table[name].to_pylist()]


def _json_text(value: Any) -> str:
    return json.dumps(value, default=str)


def _carried(
    spec: TaskSpec, table: pa.Table, rows: Sequence[Row | RowError]
) -> tuple[dict[str, pa.Array], list[RowError | None]]:
    """The carried columns in the output's types, and for each row what could not be carried (null
    stands for it).
    """
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
    """JSON values as an Arrow column. A column of text takes any value, as JSON text where it is
    none.
    """
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
