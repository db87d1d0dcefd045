"""The Arrow schema of a job's output.

Owns column names, types and their order. The schema depends on the job and its checkpoint's
configuration alone, never on the rows: a part in which every row failed has the same columns and
types. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.tasks.tasks import TASK_COLUMNS, TOKEN_COLUMNS, columns_on_demand

ROW_COLUMNS: dict[str, pa.DataType] = {
    "row_key": pa.string(),
    "status": pa.string(),
    "error_code": pa.string(),
    "error_message": pa.string(),
    "attempts": pa.int32(),
}
TOKEN = pa.struct(
    {
        "text": pa.string(),
        "start": pa.int32(),
        "end": pa.int32(),
        "label": pa.string(),
        "score": pa.float64(),
    }
)

ON_DEMAND: dict[str, pa.DataType] = {
    "label_logprobs": pa.list_(pa.float64()),
    "gold_logprob": pa.float64(),
    "gold_num_tokens": pa.int32(),
}


def output_schema(job: Job, config: ModelConfig, carried: Mapping[str, pa.DataType]) -> pa.Schema:
    """Row columns, the task's columns, token counts, then the carried columns in the job's order.

    `carried` holds the input's types of the columns in `job.carry`. Raises ConfigError when a
    carried column's name is taken by an output column.
    """
    own = ROW_COLUMNS | task_types(job, config) | dict.fromkeys(TOKEN_COLUMNS, pa.int32())
    for column in job.carry:
        if column in own:
            raise ConfigError(
                f"carry: the column {column!r} has the name of an output column of task.kind {job.task.kind}; "
                "leave it out of carry and join it by row_key, or rename it in the input"
            )
    return pa.schema(own | {column: carried[column] for column in job.carry})


def task_types(job: Job, config: ModelConfig) -> dict[str, pa.DataType]:
    """The task's own columns and their types."""
    types = dict(zip(TASK_COLUMNS[job.task.kind], _types(job, config), strict=True))
    if job.task.kind == "generate" and job.sampling.n > 1:
        types = {name: pa.list_(dtype) for name, dtype in types.items()}
    return types | {name: ON_DEMAND[name] for name in columns_on_demand(job.task)}


def _types(job: Job, config: ModelConfig) -> tuple[pa.DataType, ...]:
    match job.task.kind:
        case "choose":
            return pa.string(), pa.float64(), pa.list_(pa.float64()), pa.float64()
        case "generate":
            return pa.string(), pa.string(), pa.string(), pa.list_(pa.float32())
        case "extract":
            return (pa.string(),)
        case "classify":
            label = {
                "regression": pa.float64(),
                "multi_label_classification": pa.list_(pa.string()),
            }
            return pa.list_(pa.float64()), label.get(config.inferred_problem_type, pa.string())
        case "tag":
            return (pa.list_(TOKEN),)
        case "embed":
            return (pa.list_(pa.float32(), config.hidden_size),)
        case "requests":
            return pa.string(), pa.int64(), pa.string(), pa.int32(), pa.string()
