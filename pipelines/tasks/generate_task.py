"""task.kind generate: text that the model writes, and on demand how likely it holds the gold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar

import pyarrow as pa

from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.engine.api.request import (
    Choose,
    Completion,
    Generate,
    Output,
    Request,
    SamplingParams,
)
from glm_batch.models.errors import ConfigError, RowError
from glm_batch.models.processing.prompt import Prompt, Prompter
from glm_batch.models.processing.scores import Scaling
from glm_batch.pipelines.input.values import Row
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.tasks.task import Columns, Task

SCORED = "\0scored"  # behind a row's key, the id of the request for its gold answer


class GenerateTask(Task):
    """With task.gold_logprobs a row's second request scores its gold answer after the prompt."""

    keys = ("thinking", "gold_logprobs", "gold", "image", "video")
    engine_task = "generate"
    sampling = frozenset(field.name for field in fields(SamplingParams))
    has_right_answer = True
    notes: ClassVar = {"gold_num_tokens": pa.int32()}

    def __init__(self, job: Job, prompter: Prompter, scaling: Scaling | None = None) -> None:
        super().__init__(job, prompter, scaling)
        limit = job.engine.max_model_len
        self._max_model_len = self.model.longest_context if limit == "auto" else limit
        if self.config.gold_logprobs:
            self._check_gold_logprobs()

    @staticmethod
    def columns(job: Job, model: ModelConfig) -> dict[str, pa.DataType]:
        found: dict[str, pa.DataType] = {
            "text": pa.string(),
            "reasoning": pa.string(),
            "finish_reason": pa.string(),
            "logprobs": pa.list_(pa.float32()),
        }
        if job.sampling.n > 1:
            found = {name: pa.list_(dtype) for name, dtype in found.items()}
        scored = {"gold_logprob": pa.float64(), "gold_num_tokens": pa.int32()}
        return found | (scored if job.task.gold_logprobs else {})

    @staticmethod
    def problems(job: Job) -> Iterator[tuple[str, str]]:
        if job.task.gold_logprobs and job.task.gold is None:
            yield "task.gold_logprobs", "there is nothing to score; name the column in task.gold"

    def _work(self) -> Generate:
        return Generate(sampling=self.job.sampling)

    @property
    def num_answer_tokens(self) -> int:
        return 1

    def _check_gold_logprobs(self) -> None:
        """Raises ConfigError where this checkpoint writes no answer right after a prompt."""
        chat = self.prompter.chat
        if self.config.thinking and chat.thinking_form != "none":
            raise ConfigError(
                "task.gold_logprobs: gold answers are scored right after the prompt, where this "
                "checkpoint would begin to reason; set task.thinking: false, or leave it out"
            )
        try:
            chat.answer_ids("a")
        except RowError as error:
            raise ConfigError(f"task.gold_logprobs: {error.message}") from error

    def requests(self, key: str, row: Row, prompt: Prompt) -> list[Request]:
        """An answer of white space is none. Raises RowError for a gold answer that does not fit."""
        found = super().requests(key, row, prompt)
        gold = row.get(self.config.gold or "") if self.config.gold_logprobs else None
        if gold is None or not str(gold).strip():
            return found
        ids, num_tokens = self.prompter.chat.answer_ids(str(gold)), len(prompt.input_ids)
        if num_tokens + len(ids) > self._max_model_len:
            raise RowError(
                "gold_too_long",
                f"the prompt has {num_tokens} tokens and the gold answer {len(ids)}; at most "
                f"{self._max_model_len} fit together: shorten one of them, or leave "
                "task.gold_logprobs out",
            )
        work = Choose(choices=(ids,))
        scored = Request(id=key + SCORED, input_ids=prompt.input_ids, work=work, media=prompt.media)
        return [*found, scored]

    def note(self, row: Row, requests: Sequence[Request]) -> dict[str, Any]:
        works = [each.work for each in requests[1:]]
        lengths = [len(work.choices[0]) for work in works if isinstance(work, Choose)]
        return {"gold_num_tokens": lengths[0] if lengths else None}

    def answer(self, completions: Sequence[Completion], note: Mapping[str, Any]) -> Columns:
        columns = self._texts(completions[0].outputs)
        if self.config.gold_logprobs:
            num_tokens = note["gold_num_tokens"]
            columns["gold_logprob"] = None if num_tokens is None else _logprob(completions[1])
            columns["gold_num_tokens"] = num_tokens
        return columns

    def _texts(self, outputs: tuple[Output, ...]) -> Columns:
        split = self.prompter.chat.split_reasoning
        parts = [split(output.text, thinking=self.config.thinking) for output in outputs]
        columns: dict[str, list[Any]] = {
            "text": [answer for _, answer in parts],
            "reasoning": [reasoning for reasoning, _ in parts],
            "finish_reason": [output.finish_reason for output in outputs],
            "logprobs": [each.logprobs and list(each.logprobs) for each in outputs],
        }
        if self.job.sampling.n > 1:
            return dict(columns)
        return {name: values[0] for name, values in columns.items()}

    def is_right(self, columns: Columns, gold: object) -> bool:
        text = columns["text"]
        first = text[0] if isinstance(text, list) else text
        return bool(first.strip() == str(gold).strip())


def _logprob(scored: Completion) -> float:
    if scored.choice_logprobs is None:
        raise RowError("not_scored", "the scoring of the gold answer was ended before it was done")
    (logprob,) = scored.choice_logprobs
    if not math.isfinite(logprob):
        raise RowError(
            "not_finite",
            f"the gold answer's log-probability is {logprob}: try engine.dtype float32",
        )
    return logprob
