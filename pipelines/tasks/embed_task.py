"""task.kind embed: a vector for each row's text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.engine.api.request import Completion, Embed
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.tasks.task import Columns, Task, finite


class EmbedTask(Task):
    keys = ("pooling", "normalize", "image", "video")
    head = None
    engine_task = "embed"
    chats = False

    @staticmethod
    def columns(job: Job, model: ModelConfig) -> dict[str, pa.DataType]:
        return {"vector": pa.list_(pa.float32(), model.hidden_size)}

    def _work(self) -> Embed:
        return Embed(pooling=self.config.pooling, normalize=self.config.normalize)

    def answer(self, completions: Sequence[Completion], note: Mapping[str, Any]) -> Columns:
        return {"vector": finite(completions[0].array, (self.model.hidden_size,))}
