"""task.kind tag: a label for each token of a text, by a token-classification head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import pyarrow as pa

from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.engine.api.request import Completion, Request, Tag
from glm_batch.models.processing.scores import softmax
from glm_batch.pipelines.input.values import Row
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.tasks.prompts import PromptTemplate
from glm_batch.pipelines.tasks.task import Columns, Task, finite

TOKEN = pa.struct(
    {
        "text": pa.string(),
        "start": pa.int32(),
        "end": pa.int32(),
        "label": pa.string(),
        "score": pa.float64(),
    }
)


class TagTask(Task):
    keys = ()
    head = "token_classification"
    engine_task = "tag"
    chats = False
    notes: ClassVar = {"text": pa.large_string()}

    @staticmethod
    def columns(job: Job, model: ModelConfig) -> dict[str, pa.DataType]:
        return {"tokens": pa.list_(TOKEN)}

    @staticmethod
    def problems(job: Job) -> Iterator[tuple[str, str]]:
        for name in ("messages", "system"):
            if getattr(job.task, name) is not None:
                message = "tag labels the tokens of one text; remove it and use task.prompt"
                yield f"task.{name}", message
                return

    def _work(self) -> Tag:
        return Tag()

    def note(self, row: Row, requests: Sequence[Request]) -> dict[str, Any]:
        return {"text": PromptTemplate.parse(self.config.prompt or "").format(row)}

    def answer(self, completions: Sequence[Completion], note: Mapping[str, Any]) -> Columns:
        """One entry for each token; the tokenizer's own special tokens are no part of the text."""
        text, tokenizer = note["text"], self.prompter.tokenizer
        ids, offsets = tokenizer.encode_raw_with_offsets(text)
        names = self.model.id2label
        # [tokens, num_labels]
        scores = softmax(finite(completions[0].array, (len(ids), len(names))))
        tokens = [
            {
                "text": text[start:end],
                "start": start,
                "end": end,
                "label": names[label],
                "score": float(row_scores[label]),
            }
            for id, (start, end), label, row_scores in zip(
                ids, offsets, scores.argmax(axis=-1).tolist(), scores, strict=True
            )
            if id not in tokenizer.special_ids
        ]
        return {"tokens": tokens}
