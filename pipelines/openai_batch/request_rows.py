"""The work on one unit of an OpenAI batch file: lines to requests, and completions to output
columns.

A line may ask for several things at once (texts to embed, prompts to complete): it travels as one
row for each of them, which come back together. Owns these rows and what stands in an output's
columns; what a line means is pipelines.openai_batch.requests'. Knows nothing of Ray or files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from glm_batch.glm_actors.units.batches import request_table, to_completions
from glm_batch.models.engine.api.request import Completion, Request
from glm_batch.models.errors import RowError
from glm_batch.pipelines.input.values import NUMBER, parse_line
from glm_batch.pipelines.tasks.affinity import with_prefix_key
from glm_batch.pipelines.tasks.rows import (
    FIRST,
    INPUT,
    INPUT_LINE,
    LOST,
    OWN_PARSED,
    RIGHT,
    ROW,
    UNIT,
    TaskSpec,
    kept_runner,
)
from glm_batch.pipelines.tasks.tasks import TOKEN_COLUMNS, Columns

if TYPE_CHECKING:
    from glm_batch.glm_actors.serving.openai.api_errors import ApiError
    from glm_batch.pipelines.openai_batch.requests import Asked, RequestRunner

INPUT_NUMBER = INPUT + NUMBER
# of travelling rows: the line's name, and on its first row what it asks for
NAME, ASKED = "#name", "#asked"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Line:
    """A line as it was read. `name` is its file and row."""

    name: str
    number: int | None
    content: bytes
    first: str | None
    lost: RowError | None


def request_runner(spec: TaskSpec) -> RequestRunner:
    """The runner of this process for this job."""
    from glm_batch.pipelines.openai_batch.requests import RequestRunner

    return kept_runner(spec, RequestRunner)


def render_requests(spec: TaskSpec, table: pa.Table, lost: RowError | None = None) -> pa.Table:
    """Lines to requests, one row each; a line with an error has one row. With `lost` all get that
    error.
    """
    runner = request_runner(spec)
    names: list[str] = []
    notes: list[str | None] = []
    ids: list[str] = []
    requests: list[Request | RowError] = []
    counts = []
    for line in _lines(table, lost):
        asked = _ask(runner, line)
        found = (
            asked.requests
            if asked.error is None
            else [RowError(asked.error.code or "", asked.error.message)]
        )
        counts.append(len(found))
        names += [line.name] * len(found)
        notes += [_note(asked, line.number), *[None] * (len(found) - 1)]
        ids += [f"{line.name}#{number}" for number in range(len(found))]
        requests += found
    units = [
        unit
        for unit, count in zip(table[UNIT].to_pylist(), counts, strict=True)
        for _ in range(count)
    ]
    result = request_table(ids, requests).append_column(UNIT, pa.array(units, pa.int32()))
    result = result.append_column(NAME, pa.array(names, pa.string()))
    return with_prefix_key(result.append_column(ASKED, pa.array(notes, pa.string())))


def num_lines(table: pa.Table) -> int:
    """How many lines the travelling rows of a table stand for."""
    return len(_starts(table)) - 1


def parse_requests(
    spec: TaskSpec, table: pa.Table, start: int, stop: int, lost: RowError | None = None
) -> pa.Table:
    """The completions of lines [start, stop) to the job's output columns and OWN_PARSED, one row
    for each line.

    With `lost` these lines get that error, whatever their completions say.
    """
    runner, starts = request_runner(spec), _starts(table)[start : stop + 1]
    table = table.slice(starts[0], starts[-1] - starts[0])
    starts = [each - starts[0] for each in starts]
    names, notes, completions = (
        table[NAME].to_pylist(),
        table[ASKED].to_pylist(),
        to_completions(table),
    )
    rows = [
        _columns(runner, names[begin], json.loads(notes[begin]), completions[begin:end], lost)
        for begin, end in pairwise(starts)
    ]
    columns = {
        field.name: pa.array([row[field.name] for row in rows], field.type) for field in spec.schema
    }
    firsts = pa.array(starts[:-1], pa.int64())
    own = {UNIT: table[UNIT].take(firsts), RIGHT: pa.nulls(len(rows), pa.bool_())}
    return pa.table(columns | own, schema=pa.schema([*spec.schema, *OWN_PARSED]))


def _lines(table: pa.Table, lost: RowError | None) -> Iterator[_Line]:
    columns = [table[name].to_pylist() for name in (ROW, INPUT_NUMBER, INPUT_LINE, FIRST, LOST)]
    for name, number, content, first, unread in zip(*columns, strict=True):
        error = lost if unread is None else RowError(*json.loads(unread))
        yield _Line(name=name, number=number, content=content, first=first, lost=error)


def _ask(runner: RequestRunner, line: _Line) -> Asked:
    from glm_batch.pipelines.openai_batch.requests import Asked

    if line.lost is not None:
        return Asked(error=line.lost)
    asked = runner.ask(parse_line(line.content), len(line.content), line.name)
    if line.first is None or asked.custom_id is None:
        return asked
    message = f"custom_id {asked.custom_id!r} is that of an earlier line (row {line.first}); give each its own"
    return replace(asked, requests=[], body=None, error=RowError("duplicate_custom_id", message))


def _note(asked: Asked, number: int | None) -> str:
    """What of a line is to be known when its completions have come, as JSON."""
    known = {"custom_id": asked.custom_id, "line": number, "url": asked.url}
    note = known | (
        {"body": asked.body} if asked.error is None else {"refused": _refused(asked.error)}
    )
    return json.dumps(note)


def _columns(
    runner: RequestRunner,
    name: str,
    note: dict[str, Any],
    completions: Sequence[Completion | RowError],
    lost: RowError | None,
) -> Columns:
    """A line's record."""
    from glm_batch.glm_actors.serving.openai.api_errors import ApiError
    from glm_batch.pipelines.openai_batch.requests import fault

    known: Columns = {"row_key": note["custom_id"] or name, "attempts": 1}
    known |= {column: note[column] for column in ("custom_id", "line", "url")}
    done = [each for each in completions if isinstance(each, Completion)]
    known |= {
        column: sum(getattr(each, column) for each in done) if done else None
        for column in TOKEN_COLUMNS
    }
    if "refused" in note:
        refused: Columns = note["refused"]
        return known | refused
    failed = lost or next((each for each in completions if isinstance(each, RowError)), None)
    try:
        if failed is not None:
            raise fault(failed)
        body = runner.answer(note["url"], note["body"], done)
    except ApiError as error:
        return known | _refused(error)
    # What the answer says: a prompt that is echoed and gone on with is asked about twice and counts
    # once.
    usage = body["usage"]
    known |= {"prompt_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]}
    known |= {"cached_tokens": usage["prompt_tokens_details"]["cached_tokens"]}
    return known | {
        "status": "ok",
        "error_code": None,
        "error_message": None,
        "status_code": 200,
        "response": json_text(body),
    }


def _refused(error: RowError | ApiError) -> Columns:
    """The columns of a line that failed. A RowError is of the line: it has no response."""
    columns = {"status": "error", "error_code": error.code, "error_message": error.message}
    if isinstance(error, RowError):
        return columns | {"status_code": None, "response": None}
    code = error.code or f"http_{error.status}"
    return columns | {
        "error_code": code,
        "status_code": error.status,
        "response": json_text(error.body()),
    }


def json_text(value: Any) -> str:
    """As the server writes it: plain ASCII."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _starts(table: pa.Table) -> list[int]:
    """The travelling row with which each line begins, and the end."""
    notes = table[ASKED].is_valid().to_pylist()
    return [*(row for row, valid in enumerate(notes) if valid), table.num_rows]
