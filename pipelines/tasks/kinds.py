"""The table of kinds of tasks, and the columns of a job's output.

The schema depends on the job and its checkpoint's configuration alone, never on the rows: a part in
which every row failed has the same columns and types.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.job import Job, TaskConfig
from glm_batch.pipelines.tasks.choose_task import ChooseTask
from glm_batch.pipelines.tasks.classify_task import ClassifyTask
from glm_batch.pipelines.tasks.embed_task import EmbedTask
from glm_batch.pipelines.tasks.extract_task import ExtractTask
from glm_batch.pipelines.tasks.generate_task import GenerateTask
from glm_batch.pipelines.tasks.loglikelihood_task import LoglikelihoodTask
from glm_batch.pipelines.tasks.prompts import media_columns
from glm_batch.pipelines.tasks.tag_task import TagTask
from glm_batch.pipelines.tasks.task import Task

TASKS: dict[str, type[Task]] = {
    "choose": ChooseTask,
    "generate": GenerateTask,
    "extract": ExtractTask,
    "classify": ClassifyTask,
    "tag": TagTask,
    "embed": EmbedTask,
    "loglikelihood": LoglikelihoodTask,
}
ROW_COLUMNS: dict[str, pa.DataType] = {
    "row_key": pa.string(),
    "status": pa.string(),
    "error_code": pa.string(),
    "error_message": pa.string(),
    "attempts": pa.int32(),
}
TOKEN_COLUMNS = ("prompt_tokens", "cached_tokens", "output_tokens", "media_tokens")
REQUEST_COLUMNS: dict[str, pa.DataType] = {  # of a line of an OpenAI batch file
    "custom_id": pa.string(),
    "line": pa.int64(),
    "url": pa.string(),
    "status_code": pa.int32(),
    "response": pa.string(),
}


def output_schema(job: Job, model: ModelConfig, carried: Mapping[str, pa.DataType]) -> pa.Schema:
    """Row columns, the task's columns, token counts, then the carried columns in the job's order.

    `carried` holds the input's types of the columns in `job.carry`. Raises ConfigError when a
    carried column's name is taken by an output column.
    """
    own = ROW_COLUMNS | task_types(job, model) | dict.fromkeys(TOKEN_COLUMNS, pa.int32())
    for column in job.carry:
        if column in own:
            raise ConfigError(
                f"carry: the column {column!r} has the name of an output column of task.kind "
                f"{job.task.kind}; leave it out of carry and join it by row_key, or rename it in "
                "the input"
            )
    return pa.schema(own | {column: carried[column] for column in job.carry})


def task_types(job: Job, model: ModelConfig) -> dict[str, pa.DataType]:
    """The task's own columns and their types."""
    return REQUEST_COLUMNS if job.asks_by_row else TASKS[job.task.kind].columns(job, model)


def uses_chat(task: TaskConfig) -> bool:
    """Whether the prompt goes through the chat template; else it is raw text."""
    is_conversation = (
        task.system is not None or task.messages is not None or bool(media_columns(task))
    )
    return TASKS[task.kind].chats or is_conversation
