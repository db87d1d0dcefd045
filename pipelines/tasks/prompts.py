"""Prompts: what a row says to the model, as a text or as a conversation with images and videos.

Rows are plain dicts; media stay what the cell held.
"""

from __future__ import annotations

import datetime
import decimal
import json
import math
import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from glm_batch.models.errors import ConfigError, RowError
from glm_batch.pipelines.job import COLUMN, Job, TaskConfig

Row = Mapping[str, Any]
Message = dict[str, Any]

_COLUMN_NAME = re.compile(r"\w[\w \-]*")


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """A text with "{column}" fields; "{{" and "}}" stand for literal braces."""

    parts: tuple[tuple[str, str | None], ...]

    @classmethod
    def parse(cls, text: str) -> PromptTemplate:
        """Raises ConfigError for stray braces and fields that are no plain column name."""
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ConfigError(
                f"task.prompt: {error}; write {{{{ and }}}} for literal braces"
            ) from error
        for _, field, spec, conversion in parsed:
            if field is not None and (spec or conversion or not _COLUMN_NAME.fullmatch(field)):
                raise ConfigError(
                    f"task.prompt: the field {{{field}}} is not a plain column name; "
                    "write {{ and }} for literal braces, and {column} for a column's value"
                )
        return cls(tuple((literal, field) for literal, field, _, _ in parsed))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the template reads, each once, in the order of their first use."""
        return tuple(dict.fromkeys(column for _, column in self.parts if column is not None))

    def format(self, row: Row) -> str:
        """The prompt of one row. Raises RowError for values of no use, or if all are blank."""
        values = {column: cell_text(row, column) for column in self.columns}
        if values and not any(value.strip() for value in values.values()):
            raise RowError(
                "empty_text",
                f"nothing but white space in {_quoted(values)}: there is nothing to ask about",
            )
        return "".join(
            literal + (values[column] if column is not None else "")
            for literal, column in self.parts
        )


def conversation(task: TaskConfig, template: PromptTemplate | None, row: Row) -> list[Message]:
    """The row's chat messages, its media as parts before the prompt's text. Raises RowError."""
    if task.messages is not None:
        given = _messages_cell(row, task.messages)
    else:
        assert template is not None, "a task has a prompt or messages"
        media = list(_media_parts(task, row))
        text = template.format(row)
        given = [
            {"role": "user", "content": [*media, {"type": "text", "text": text}] if media else text}
        ]
    return given if task.system is None else _with_system(task.system, given)


def cell_text(row: Row, column: str) -> str:
    """A text, number, boolean, date or UTF-8 bytes as prompt text; RowError for anything else."""
    value = _cell(row, column)
    match value:
        case None:
            raise RowError("null_prompt", f"column {column!r} is null: a prompt needs its value")
        case str():
            return _valid_text(value, column)
        case bytes():
            return _decoded(value, column)
        case float() if not math.isfinite(value):
            raise RowError(
                "not_a_number", f"column {column!r} is {value}: a prompt needs a finite number"
            )
        case bool() | int() | float() | decimal.Decimal():
            return str(value)
        case datetime.date() | datetime.time():
            return value.isoformat()
    raise RowError(
        "wrong_type",
        f"column {column!r} holds {type(value).__name__}; a prompt takes text, numbers and dates",
    )


def media_columns(task: TaskConfig) -> tuple[str, ...]:
    """The columns that hold images and videos, images first, as they come in the prompt."""
    return (*_names(task.image), *_names(task.video))


def input_columns(job: Job) -> tuple[str, ...]:
    """Every input column that the job reads, each once; lines of batch files are read whole."""
    if job.asks_by_row:
        return ()
    named = (*task_columns(job.task), *_single(job.key), *job.carry)
    return tuple(dict.fromkeys(named))


def column_keys(task: TaskConfig) -> Iterator[tuple[str, str]]:
    """(key of the task section, input column that it names), for each column."""
    if task.prompt is not None:
        yield from (("prompt", column) for column in PromptTemplate.parse(task.prompt).columns)
    for key in fields(task):
        if key.metadata == COLUMN:
            yield from ((key.name, column) for column in _names(getattr(task, key.name)))


def task_columns(task: TaskConfig) -> tuple[str, ...]:
    """The input columns that the task names, each once."""
    return tuple(dict.fromkeys(column for _, column in column_keys(task)))


def prompt_columns(task: TaskConfig) -> tuple[str, ...]:
    """The input columns that become the prompt."""
    fields = PromptTemplate.parse(task.prompt).columns if task.prompt is not None else ()
    return tuple(dict.fromkeys((*fields, *_single(task.messages), *media_columns(task))))


def _media_parts(task: TaskConfig, row: Row) -> Iterator[Message]:
    for kind, columns in (("image", _names(task.image)), ("video", _names(task.video))):
        for column in columns:
            value = _cell(row, column)
            values = value if isinstance(value, list) else [value]
            if not values:
                raise RowError(
                    "null_media", f"column {column!r} is an empty list: the prompt needs its {kind}"
                )
            if any(each is None or each == {"bytes": None, "path": None} for each in values):
                raise RowError(
                    "null_media", f"column {column!r} is null: the prompt needs its {kind}"
                )
            yield from ({"type": kind, kind: each} for each in values)


def _cell(row: Row, column: str) -> Any:
    if column not in row:
        raise RowError("missing_column", f"the row has no column {column!r}")
    return row[column]


def _names(columns: str | list[str] | None) -> tuple[str, ...]:
    return (columns,) if isinstance(columns, str) else tuple(columns or ())


def _single(*columns: str | None) -> tuple[str, ...]:
    return tuple(column for column in columns if column is not None)


def _valid_text(value: str, column: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            "not_utf8",
            f"column {column!r} holds a lone surrogate at character {error.start}: it is no valid "
            "text",
        ) from error
    return value


def _decoded(value: bytes, column: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise RowError(
            "not_utf8", f"column {column!r} is not UTF-8 at byte {error.start}"
        ) from error


def _messages_cell(row: Row, column: str) -> list[Message]:
    """A column of chat messages: a list of structs, or a JSON text of the same."""
    value = _cell(row, column)
    if value is None:
        raise RowError("null_prompt", f"column {column!r} is null: a prompt needs its messages")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(
                "bad_messages", f"column {column!r} is text but not JSON: {error}"
            ) from error
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise RowError(
            "bad_messages", f"column {column!r} must hold a list of messages with role and content"
        )
    return value


def _with_system(system: str, messages: list[Message]) -> list[Message]:
    if messages and messages[0].get("role") == "system":
        raise RowError(
            "bad_messages",
            "the messages begin with a system message and the job sets task.system: keep one of "
            "them",
        )
    return [{"role": "system", "content": system}, *messages]


def _quoted(columns: Mapping[str, str]) -> str:
    return " and ".join(repr(column) for column in columns)
