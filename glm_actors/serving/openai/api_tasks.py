"""Tasks: a request's work for the engine, and what becomes of the engine's answer.

`build_task` chooses. A task has the engine's requests and turns their completions into OpenAI's
objects; one that streams turns each delta into chunks as well. Built in a worker thread; knows
nothing of HTTP or of other requests.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from glm_batch.glm_actors.faults.schema_check import SchemaChecker
from glm_batch.glm_actors.serving.openai.api_errors import ApiError, bad, of_row
from glm_batch.glm_actors.serving.openai.chat_task import ChatTask
from glm_batch.glm_actors.serving.openai.completion_task import CompletionTask
from glm_batch.glm_actors.serving.openai.prompter import RequestPrompter
from glm_batch.glm_actors.serving.openai.protocol import (
    Body,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
    ScoreRequest,
)
from glm_batch.glm_actors.serving.openai.work import (
    Json,
    checked,
    new_id,
    raw_prompts,
    request_of,
    requests_of,
    usage_of,
)
from glm_batch.models.engine.api.request import Choose, Classify, Completion, Delta, Embed, Request
from glm_batch.models.errors import RowError
from glm_batch.models.processing.scores import class_scores, label_scores
from glm_batch.models.request_limits import RequestLimits

__all__ = ["Json", "StreamTask", "Task", "build_task", "usage_of"]


class Task(Protocol):
    """What is asked, and how it is answered."""

    requests: list[Request]

    def answer(self, completions: Sequence[Completion]) -> Json:
        """The whole response. Raises ApiError where the engine could not do the work."""
        ...


class StreamTask(Task, Protocol):
    """A task that can answer in chunks, after the completions of the requests in `first`."""

    first: Sequence[Request]

    def begin(self, completions: Sequence[Completion]) -> list[Json]:
        """What the completions of `first` put at the stream's beginning. Raises ApiError."""
        ...

    def chunks(self, delta: Delta) -> list[Json]:
        """What a delta adds to the stream."""
        ...


def build_task(
    body: Body,
    prompter: RequestPrompter,
    schemas: SchemaChecker,
    caps: RequestLimits,
    *,
    thinking: bool,
) -> Task:
    """The task of a request. `thinking` is the model's default. Raises ApiError and RowError."""
    match body:
        case ChatRequest():
            return ChatTask(body, prompter, schemas, caps, thinking=thinking)
        case CompletionRequest():
            return CompletionTask(body, prompter, schemas, caps)
        case EmbeddingRequest():
            return EmbeddingTask(body, prompter, caps)
        case ScoreRequest():
            return ScoreTask(body, prompter, caps)
        case ClassifyRequest():
            return ClassifyTask(body, prompter, caps)
    raise ApiError(400, f"{type(body).__name__} is no work for an engine")


class EmbeddingTask:
    """POST /v1/embeddings"""

    def __init__(
        self, body: EmbeddingRequest, prompter: RequestPrompter, caps: RequestLimits
    ) -> None:
        self._model, self._as_text = body.model, body.encoding_format == "base64"
        size = prompter.config.hidden_size
        if body.dimensions not in (None, size):
            raise bad("dimensions", f"this model's vectors have {size}, and cannot be cut")
        prompts = raw_prompts(body.input, prompter, caps, "input")
        self.requests = requests_of(
            new_id("embd"),
            prompts,
            Embed(pooling=body.pooling or "last", normalize=body.normalize is not False),
        )

    def answer(self, completions: Sequence[Completion]) -> Json:
        data = []
        for index, completion in enumerate(checked(completions, "input")):
            vector = _finite(completion)
            shown: Any = (
                base64.b64encode(vector.astype("<f4").tobytes()).decode()
                if self._as_text
                else vector.tolist()
            )
            data.append({"object": "embedding", "index": index, "embedding": shown})
        return {
            "object": "list",
            "model": self._model,
            "data": data,
            "usage": usage_of(completions),
        }


class ScoreTask:
    """POST /v1/score: what the batch path's kind choose computes for a row."""

    def __init__(self, body: ScoreRequest, prompter: RequestPrompter, caps: RequestLimits) -> None:
        if len(body.labels) > caps.max_labels:
            raise bad("labels", f"{len(body.labels)} labels; this server takes {caps.max_labels}")
        if (body.prompt is None) == (body.messages is None):
            raise bad("prompt", "give either a prompt or messages")
        if body.system is not None and body.messages is not None:
            raise bad("system", "it goes with a prompt; put it into the messages")
        self._model, self._labels = body.model, body.labels
        messages = body.messages or [{"role": "user", "content": body.prompt}]
        if body.system is not None:
            messages = [{"role": "system", "content": body.system}, *messages]
        choices = prompter.choices(body.labels)
        work = Choose(
            choices=choices, count_end=prompter.chat.count_end(choices, body.end_of_label or "auto")
        )
        self.requests = [request_of(new_id("score"), prompter.conversation(messages), work)]

    def answer(self, completions: Sequence[Completion]) -> Json:
        """softmax over the labels' joint log-probabilities; `off_set_mass` is 1 - the sum of what
        they stand for.
        """
        (completion,) = checked(completions)
        try:
            found = label_scores(completion.choice_logprobs or ())
        except RowError as error:
            raise of_row(error) from error
        return {
            "object": "score",
            "model": self._model,
            "label": self._labels[found.best],
            "probability": found.probabilities[found.best],
            "label_probs": found.probabilities,
            "off_set_mass": found.off_set_mass,
            "usage": usage_of(completions),
        }


class ClassifyTask:
    """POST /v1/classify: what the batch path's kind classify computes for a row."""

    def __init__(
        self, body: ClassifyRequest, prompter: RequestPrompter, caps: RequestLimits
    ) -> None:
        self._model, self._config = body.model, prompter.config
        prompts = raw_prompts(body.input, prompter, caps, "input")
        self.requests = requests_of(new_id("cls"), prompts, Classify())

    def answer(self, completions: Sequence[Completion]) -> Json:
        data = [
            {"index": i} | self._scores(_finite(each))
            for i, each in enumerate(checked(completions, "input"))
        ]
        labels = list(self._config.id2label)
        return {
            "object": "list",
            "model": self._model,
            "labels": labels,
            "data": data,
            "usage": usage_of(completions),
        }

    def _scores(self, array: np.ndarray[Any, np.dtype[np.float32]]) -> Json:
        names, kind = self._config.id2label, self._config.inferred_problem_type
        scores, label = class_scores(array.astype(np.float64), names, kind)
        return {"scores": scores, "label": label}


def _finite(completion: Completion) -> np.ndarray[Any, np.dtype[np.float32]]:
    array = completion.array
    if array is None or not np.isfinite(array).all():
        raise of_row(RowError("not_finite", "the model's output holds NaN or infinity"))
    return array
