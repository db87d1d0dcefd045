"""Runners: what a process builds once for a job, to turn its rows into requests and back.

TaskRunner asks the job's question about each row; lines of an OpenAI batch file ask for themselves,
see pipelines.openai_batch.requests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from glm_batch.glm_actors.media.media_loader import MediaLoader
from glm_batch.models import rooms
from glm_batch.models.engine.api.request import Completion, Request
from glm_batch.models.errors import ConfigError, RowError
from glm_batch.models.processing.prompt import Prompt, Prompter
from glm_batch.models.processing.scores import Scaling
from glm_batch.pipelines.input.values import Row, key_text
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.tasks.kinds import TASKS, TOKEN_COLUMNS, task_types
from glm_batch.pipelines.tasks.row_prompts import RowPrompts
from glm_batch.pipelines.tasks.task import Columns


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReadRow:
    """A row as it was read. `name` is its file and row, `first` the earlier row that has its key.

    `error` is what is wrong with a row whose key can be read. `size` counts the bytes of a row that
    was a line, and `line` is that line's number.
    """

    name: str
    row: Row | RowError
    first: str | None = None
    error: RowError | None = None
    size: int = 0
    line: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """What a row asks of the engine, or why nothing; `note` is what `columns` must know of it."""

    key: str
    requests: list[Request] = field(default_factory=list)
    error: RowError | None = None
    note: Mapping[str, Any] = field(default_factory=dict)


Prompts = Callable[[Sequence[Row]], Sequence[Prompt | RowError]]


class Runner(Protocol):
    """One job's rows on one worker. `notes` are the types of what notes may hold."""

    notes: Mapping[str, pa.DataType]

    def start(self) -> None:
        """Begins to start the processes that it will need."""
        ...

    def close(self) -> None:
        """Ends them."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """What was decided for this job and belongs into its manifest."""
        ...

    def ask(self, rows: Sequence[ReadRow], prompts: Prompts | None = None) -> Iterable[Asked]:
        """What each row asks for; `prompts` finds prompts that another job has made."""
        ...

    def columns(
        self,
        note: Mapping[str, Any],
        completions: Sequence[Completion | RowError],
        lost: RowError | None = None,
    ) -> Columns:
        """A row's output but for its key; with `lost`, it could not be looked at."""
        ...


class TaskRunner:
    """One job's task on one worker: the labels, the constraint and the limit are computed once."""

    def __init__(
        self,
        job: Job,
        model_dir: str,
        loaders: dict[str, MediaLoader] | None = None,
        scaling: Scaling | None = None,
    ) -> None:
        """`loaders` and `scaling`: see RowPrompts and Task. Raises ConfigError."""
        if job.task.kind not in TASKS:
            raise ConfigError(
                "task: it is missing; every job needs one, but for input_format: openai_batch"
            )
        self._job, self.prompter = job, Prompter(model_dir)
        self.task = TASKS[job.task.kind](job, self.prompter, scaling)
        self.prompts = RowPrompts(self.task, {} if loaders is None else loaders)
        self.notes, self.work, self.facts = self.task.notes, self.task.work, self.task.facts
        self._nulls: Columns = dict.fromkeys((*task_types(job, self.task.model), *TOKEN_COLUMNS))

    def start(self) -> None:
        self.prompts.start()

    def close(self) -> None:
        self.prompts.close()

    def preview(self, row: Row) -> str:
        """What the model reads of a row, for people. Raises RowError."""
        return self.task.preview(row, self.prompts.render(row))

    def ask(self, rows: Sequence[ReadRow], prompts: Prompts | None = None) -> list[Asked]:
        keyed = [self._keyed(row) for row in rows]
        good = [row for _, row in keyed if not isinstance(row, RowError)]
        made = iter((prompts or self.prompts)(good))
        return [
            Asked(key=key, error=row)
            if isinstance(row, RowError)
            else self.asked(key, row, next(made))
            for key, row in keyed
        ]

    def asked(self, key: str, row: Row, prompt: Prompt | RowError) -> Asked:
        """What a row with this prompt asks for."""
        if isinstance(prompt, RowError):
            return Asked(key=key, error=prompt)
        try:
            requests = self.task.requests(key, row, prompt)
            return Asked(key=key, requests=requests, note=self.task.note(row, requests))
        except RowError as error:
            return Asked(key=key, error=error)

    def columns(
        self,
        note: Mapping[str, Any],
        completions: Sequence[Completion | RowError],
        lost: RowError | None = None,
    ) -> Columns:
        if lost is not None:
            return self.error_columns(lost)
        done = [each for each in completions if isinstance(each, Completion)]
        counts = {name: getattr(done[0], name) for name in TOKEN_COLUMNS} if done else {}
        try:
            columns = self._answer(completions, note)
        except RowError as error:
            return self.error_columns(error) | counts
        return {"status": "ok", "error_code": None, "error_message": None, **columns, **counts}

    def error_columns(self, error: RowError) -> Columns:
        """The record of a row that failed: the same columns as a good one, null but for the "
        "error."""
        told = {"status": "error", "error_code": error.code, "error_message": error.message}
        return told | self._nulls

    def is_right(self, columns: Columns, gold: object) -> bool | None:
        """Whether an output agrees with the gold value; a failed row does not. None without one."""
        if gold is None:
            return None
        return columns["status"] == "ok" and self.task.is_right(columns, gold)

    def _keyed(self, read: ReadRow) -> tuple[str, Row | RowError]:
        """A row's key, and the row or what is wrong with it before its prompt is looked at."""
        row, column, key = read.row, self._job.key, read.name
        try:
            if not isinstance(row, RowError) and column is not None:
                key = key_text(row, column)
        except RowError as error:
            return key, error
        if read.first is not None and not isinstance(row, RowError):
            message = f"{column} {key!r} is the key of an earlier row: {read.first}"
            return key, RowError("duplicate_key", message)
        return key, (read.error or row) if not isinstance(row, RowError) else row

    def _answer(
        self, completions: Sequence[Completion | RowError], note: Mapping[str, Any]
    ) -> Columns:
        done: list[Completion] = []
        for each in completions:
            if isinstance(each, RowError):
                raise each
            if each.error is not None:
                raise each.error
            done.append(each)
        if done[0].finish_reason == "abort":
            raise RowError("aborted", "the request was ended before it was answered")
        return self.task.answer(done, note)


def build_runner(
    job: Job,
    model_dir: str | None = None,
    loaders: dict[str, MediaLoader] | None = None,
    scaling: Scaling | None = None,
) -> Any:
    """The job's Runner. Raises ConfigError for a job or checkpoint that cannot be used."""
    model_dir = model_dir or os.path.abspath(job.model)
    if not job.asks_by_row:
        return TaskRunner(job, model_dir, loaders, scaling)
    return rooms.load("pipelines.openai_batch.requests").RequestRunner(job, model_dir)
