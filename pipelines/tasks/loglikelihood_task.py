"""task.kind loglikelihood: how likely the model finds a text, or a completion after a prompt.

As transformers and lm_eval do, a token is scored if something stands before it: the first token of
a text is, where the checkpoint's tokenizer begins every text with special tokens, which themselves
are never scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.engine.api.request import Completion, Request, Score
from glm_batch.models.errors import ConfigError, RowError
from glm_batch.models.processing.patches import Media
from glm_batch.models.processing.prompt import Prompt, Prompter
from glm_batch.models.processing.scores import Scaling
from glm_batch.pipelines.input.values import Row
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.tasks.prompts import PromptTemplate, cell_text
from glm_batch.pipelines.tasks.task import Columns, Task


class LoglikelihoodTask(Task):
    """The prompt is raw text; with a completion it may be a conversation, which that answers."""

    keys = ("completion", "image", "video")
    engine_task = "generate"
    chats = False

    def __init__(self, job: Job, prompter: Prompter, scaling: Scaling | None = None) -> None:
        super().__init__(job, prompter, scaling)
        limit = job.engine.max_model_len
        self._max_model_len = self.model.longest_context if limit == "auto" else limit
        self._is_chat = _is_conversation(job)
        if self._is_chat:
            try:
                self.prompter.chat.answer_ids("a")
            except RowError as error:
                raise ConfigError(f"task.completion: {error.message}") from error

    @staticmethod
    def columns(job: Job, model: ModelConfig) -> dict[str, pa.DataType]:
        return {"logprob": pa.float64(), "num_tokens": pa.int32(), "perplexity": pa.float64()}

    @staticmethod
    def problems(job: Job) -> Iterator[tuple[str, str]]:
        if _is_conversation(job) and job.task.completion is None:
            yield (
                "task.completion",
                "missing; a conversation is scored by what answers it: name the column with the "
                "answer, or write a task.prompt alone",
            )

    def _work(self) -> Score:
        return Score()

    def preview(self, row: Row, prompt: str) -> str:
        return prompt + ("" if self.config.completion is None else self._completion(row))

    def requests(self, key: str, row: Row, prompt: Prompt) -> list[Request]:
        """The prompt up to where scoring starts is shared with rows that begin alike."""
        ids, start, media = list(prompt.input_ids), len(prompt.input_ids), prompt.media
        if self.config.completion is None:
            ids, start = self._without_specials(ids)
        elif self._is_chat:
            answer = self._answer_ids(self._completion(row))
            ids, media = ids + list(answer), media and _longer(media, len(answer))
        else:
            ids, start = self._after_text(row)
        if len(ids) > self._max_model_len:
            raise RowError(
                "prompt_too_long",
                f"prompt and completion have {len(ids)} tokens; at most {self._max_model_len} fit",
            )
        if len(ids) <= start:
            raise RowError(
                "nothing_to_score", "the text has one token, and nothing stands before it"
            )
        return [Request(id=key, input_ids=ids, work=Score(start=start), media=media)]

    def answer(self, completions: Sequence[Completion], note: Mapping[str, Any]) -> Columns:
        scores = completions[0].scores
        if scores is None:
            raise RowError("not_scored", "the scoring of the text was ended before it was done")
        logprob, num_tokens = float(scores.logprobs.sum(dtype=np.float64)), len(scores.logprobs)
        if not math.isfinite(logprob):
            raise RowError(
                "not_finite", f"the text's log-probability is {logprob}: try engine.dtype float32"
            )
        with np.errstate(over="ignore"):
            perplexity = float(np.exp(-logprob / num_tokens))
        return {"logprob": logprob, "num_tokens": num_tokens, "perplexity": perplexity}

    def _completion(self, row: Row) -> str:
        """Raises RowError for a cell that is no text, or an empty one."""
        text = cell_text(row, self.config.completion or "")
        if not text:
            raise RowError(
                "empty_text", f"{self.config.completion!r} is empty: there is nothing to score"
            )
        return text

    def _answer_ids(self, text: str) -> tuple[int, ...]:
        try:
            return self.prompter.chat.answer_ids(text)
        except RowError as error:
            raise RowError("bad_completion", error.message) from error

    def _after_text(self, row: Row) -> tuple[list[int], int]:
        """Prompt and completion as one text: a token that spans both is the completion's."""
        text = PromptTemplate.parse(self.config.prompt or "").format(row)
        encode = self.prompter.tokenizer.encode_raw
        prompt, _ = self._without_specials(encode(text))
        ids, first = self._without_specials(encode(text + self._completion(row)))
        pairs = zip(prompt, ids, strict=False)
        shared = next((place for place, (a, b) in enumerate(pairs) if a != b), len(prompt))
        return ids, max(min(shared, len(ids)), first)

    def _without_specials(self, ids: list[int]) -> tuple[list[int], int]:
        """The text without special tokens behind it, and the first token that can be scored."""
        specials = self.prompter.tokenizer.special_ids
        text = [place for place, id in enumerate(ids) if id not in specials]
        if not text:
            return ids, len(ids)
        return ids[: text[-1] + 1], max(text[0], 1)


def _is_conversation(job: Job) -> bool:
    task = job.task
    return any(each is not None for each in (task.system, task.messages, task.image, task.video))


def _longer(media: Media, num_tokens: int) -> Media:
    """With positions for text tokens behind the prompt."""
    first = int(media.positions.max()) + 1
    more = np.broadcast_to(np.arange(first, first + num_tokens), (3, num_tokens))
    return replace(media, positions=np.concatenate([media.positions, more], axis=1))
