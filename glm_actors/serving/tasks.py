"""Tasks: a request's work for the engine, and what becomes of the engine's answer.

`build_task` chooses. A task has the engine's requests and turns their completions into OpenAI's objects; one that
streams turns each delta into chunks as well. Built in a worker thread; knows nothing of HTTP or of other requests.
"""

from __future__ import annotations

import base64
import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from glm_actors.serving.errors import ApiError, bad, internal, of_row
from glm_actors.serving.logprobs import chat_logprobs, completion_logprobs
from glm_actors.serving.prompts import Prompt, Prompter
from glm_actors.serving.protocol import (
    Body,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
    Prompts,
    ScoreRequest,
)
from glm_actors.serving.reasoning import ReasoningStream
from glm_actors.serving.sampling import chat_sampling, completion_sampling, constraint_of
from glm_actors.serving.schema_check import SchemaChecker
from glm_actors.serving.settings import Caps
from models.engine.request import (
    Choose,
    Classify,
    Completion,
    Delta,
    Embed,
    Generate,
    Output,
    Request,
    Work,
)
from models.errors import RowError

Json = dict[str, Any]
MULTI_LABEL_THRESHOLD = 0.5


class Task(Protocol):
    """What is asked, and how it is answered."""

    requests: list[Request]

    def answer(self, completions: Sequence[Completion]) -> Json:
        """The whole response. Raises ApiError where the engine could not do the work."""
        ...


class StreamTask(Task, Protocol):
    """A task whose answer can come in chunks."""

    def chunks(self, delta: Delta) -> list[Json]:
        """What a delta adds to the stream."""
        ...


def build_task(body: Body, prompter: Prompter, schemas: SchemaChecker, caps: Caps, *, thinking: bool) -> Task:
    """The task of a request. `thinking` is the model's default. Raises ApiError and RowError."""
    match body:
        case ChatRequest():
            return ChatTask(body, prompter, schemas, caps, thinking=thinking)
        case CompletionRequest():
            return CompletionTask(body, prompter, caps)
        case EmbeddingRequest():
            return EmbeddingTask(body, prompter, caps)
        case ScoreRequest():
            return ScoreTask(body, prompter, caps)
        case ClassifyRequest():
            return ClassifyTask(body, prompter, caps)
    raise ApiError(400, f"{type(body).__name__} is no work for an engine")


class ChatTask:
    """POST /v1/chat/completions"""

    def __init__(
        self, body: ChatRequest, prompter: Prompter, schemas: SchemaChecker, caps: Caps, *, thinking: bool
    ) -> None:
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model, self._tokenizer, self._chat = body.model, prompter.tokenizer, prompter.chat
        self._gives_ids, self._alternatives = bool(body.return_token_ids), body.top_logprobs or 0
        sampling, constraint = chat_sampling(body, caps), constraint_of(body.response_format, caps, schemas)
        self._thinking = _thinks(body, thinking, constrained=constraint is not None)
        prompt = prompter.conversation(
            body.messages, thinking=self._thinking, start_answer=constraint is not None and not self._thinking
        )
        work = Generate(sampling=sampling, constraint=constraint)
        self.requests = [_request(self._id, prompt, work, stream=bool(body.stream))]
        self._streams: dict[int, ReasoningStream] = {}

    def answer(self, completions: Sequence[Completion]) -> Json:
        (completion,) = _checked(completions)
        choices = [self._choice(index, output) for index, output in enumerate(completion.outputs)]
        return self._envelope("chat.completion", choices) | {"usage": usage_of(completions)}

    def chunks(self, delta: Delta) -> list[Json]:
        stream = self._streams.get(delta.index)
        message: Json = {}
        if stream is None:
            stream = self._streams[delta.index] = ReasoningStream(self._chat, thinking=self._thinking)
            message = {"role": "assistant", "content": ""}
        reasoning, content = stream.add(delta.text, last=delta.finish_reason is not None)
        message |= {"reasoning_content": reasoning} if reasoning else {}
        message |= {"content": content} if content else {}
        choice: Json = {"index": delta.index, "delta": message, "finish_reason": delta.finish_reason, "logprobs": None}
        if delta.logprobs:
            choice["logprobs"] = chat_logprobs(delta, self._tokenizer, self._alternatives)
        if self._gives_ids:
            choice["token_ids"] = list(delta.token_ids)
        if not message and not delta.logprobs and not self._gives_ids and delta.finish_reason is None:
            return []
        return [self._envelope("chat.completion.chunk", [choice])]

    def _choice(self, index: int, output: Output) -> Json:
        reasoning, content = self._chat.split_reasoning(output.text, thinking=self._thinking)
        message: Json = {"role": "assistant", "content": content}
        message |= {"reasoning_content": reasoning} if reasoning else {}
        choice: Json = {"index": index, "message": message, "finish_reason": output.finish_reason, "logprobs": None}
        if output.logprobs is not None:
            choice["logprobs"] = chat_logprobs(output, self._tokenizer, self._alternatives)
        if self._gives_ids:
            choice["token_ids"] = list(output.token_ids)
        return choice

    def _envelope(self, object_: str, choices: list[Json]) -> Json:
        return {
            "id": self._id,
            "object": object_,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }


class CompletionTask:
    """POST /v1/completions: each of the prompts has n choices, in the prompts' order."""

    def __init__(self, body: CompletionRequest, prompter: Prompter, caps: Caps) -> None:
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model, self._tokenizer = body.model, prompter.tokenizer
        self._gives_ids, self._alternatives = bool(body.return_token_ids), body.logprobs or 0
        sampling = completion_sampling(body, caps)
        prompts = _raw_prompts(body.prompt, prompter, caps, "prompt")
        self._n = sampling.n
        work = Generate(sampling=sampling)
        self.requests = _requests(self._id, prompts, work, stream=bool(body.stream))
        self._number = {request.id: number for number, request in enumerate(self.requests)}
        self._shown: dict[int, int] = {}  # characters that a choice's chunks have shown

    def answer(self, completions: Sequence[Completion]) -> Json:
        outputs = [output for completion in _checked(completions) for output in completion.outputs]
        choices = [self._choice(index, output, 0) for index, output in enumerate(outputs)]
        return self._envelope(choices) | {"usage": usage_of(completions)}

    def chunks(self, delta: Delta) -> list[Json]:
        if not delta.text and not delta.logprobs and not self._gives_ids and delta.finish_reason is None:
            return []
        index = self._number[delta.id] * self._n + delta.index
        start = self._shown.get(index, 0)
        self._shown[index] = start + len(delta.text)
        return [self._envelope([self._choice(index, delta, start)])]

    def _choice(self, index: int, output: Output | Delta, start: int) -> Json:
        choice: Json = {"index": index, "text": output.text, "finish_reason": output.finish_reason, "logprobs": None}
        if output.logprobs:
            choice["logprobs"] = completion_logprobs(output, self._tokenizer, self._alternatives, start)
        if self._gives_ids:
            choice["token_ids"] = list(output.token_ids)
        return choice

    def _envelope(self, choices: list[Json]) -> Json:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }


class EmbeddingTask:
    """POST /v1/embeddings"""

    def __init__(self, body: EmbeddingRequest, prompter: Prompter, caps: Caps) -> None:
        self._model, self._as_text = body.model, body.encoding_format == "base64"
        prompts = _raw_prompts(body.input, prompter, caps, "input")
        self.requests = _requests(_new_id("embd"), prompts, Embed(pooling=body.pooling, normalize=body.normalize))

    def answer(self, completions: Sequence[Completion]) -> Json:
        data = []
        for index, completion in enumerate(_checked(completions)):
            vector = _finite(completion)
            shown: Any = base64.b64encode(vector.astype("<f4").tobytes()).decode() if self._as_text else vector.tolist()
            data.append({"object": "embedding", "index": index, "embedding": shown})
        return {"object": "list", "model": self._model, "data": data, "usage": usage_of(completions)}


class ScoreTask:
    """POST /v1/score: what the batch path's kind choose computes for a row."""

    def __init__(self, body: ScoreRequest, prompter: Prompter, caps: Caps) -> None:
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
        work = Choose(choices=choices, count_end=prompter.chat.count_end(choices, body.end_of_label))
        self.requests = [_request(_new_id("score"), prompter.conversation(messages), work)]

    def answer(self, completions: Sequence[Completion]) -> Json:
        """softmax over the labels' joint log-probabilities; `off_set_mass` is 1 - the sum of what they stand for."""
        (completion,) = _checked(completions)
        logprobs = completion.choice_logprobs or ()
        highest = max(logprobs)
        if not math.isfinite(highest):
            raise of_row(RowError("not_finite", "the model's label log-probabilities are not finite"))
        weights = [math.exp(value - highest) for value in logprobs]
        total = sum(weights)
        best = logprobs.index(highest)
        return {
            "object": "score",
            "model": self._model,
            "label": self._labels[best],
            "probability": weights[best] / total,
            "label_probs": [weight / total for weight in weights],
            "off_set_mass": 1.0 - math.exp(highest) * total,
            "usage": usage_of(completions),
        }


class ClassifyTask:
    """POST /v1/classify: what the batch path's kind classify computes for a row."""

    def __init__(self, body: ClassifyRequest, prompter: Prompter, caps: Caps) -> None:
        self._model, self._config = body.model, prompter.config
        prompts = _raw_prompts(body.input, prompter, caps, "input")
        self.requests = _requests(_new_id("cls"), prompts, Classify())

    def answer(self, completions: Sequence[Completion]) -> Json:
        data = [{"index": i} | self._scores(_finite(each)) for i, each in enumerate(_checked(completions))]
        labels = list(self._config.id2label)
        return {
            "object": "list",
            "model": self._model,
            "labels": labels,
            "data": data,
            "usage": usage_of(completions),
        }

    def _scores(self, array: np.ndarray[Any, np.dtype[np.float32]]) -> Json:
        logits, names = array.astype(np.float64), self._config.id2label
        match self._config.inferred_problem_type:
            case "regression":
                return {"scores": logits.tolist(), "label": float(logits[0])}
            case "multi_label_classification":
                scores = 1.0 / (1.0 + np.exp(-logits))
                chosen = [name for name, score in zip(names, scores, strict=True) if score > MULTI_LABEL_THRESHOLD]
                return {"scores": scores.tolist(), "label": chosen}
            case "single_label_classification":
                weights = np.exp(logits - logits.max())
                return {"scores": (weights / weights.sum()).tolist(), "label": names[int(logits.argmax())]}


def usage_of(completions: Sequence[Completion]) -> Json:
    """OpenAI's token counts over all of a request's prompts."""
    prompt = sum(completion.prompt_tokens for completion in completions)
    written = sum(completion.output_tokens for completion in completions)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": sum(completion.cached_tokens for completion in completions)},
    }


def _checked(completions: Sequence[Completion]) -> Sequence[Completion]:
    """Raises ApiError for the first that did not come to its end."""
    for completion in completions:
        if completion.error is not None:
            raise of_row(completion.error)
        if completion.finish_reason == "abort":
            raise internal()
    return completions


def _finite(completion: Completion) -> np.ndarray[Any, np.dtype[np.float32]]:
    array = completion.array
    if array is None or not np.isfinite(array).all():
        raise of_row(RowError("not_finite", "the model's output holds NaN or infinity"))
    return array


def _thinks(body: ChatRequest, default: bool, *, constrained: bool) -> bool:
    """Whether the model reasons before it answers. A constrained answer begins at once."""
    asked = None
    if body.thinking is not None:
        asked = body.thinking.type == "enabled"
    if body.chat_template_kwargs is not None and body.chat_template_kwargs.enable_thinking is not None:
        if asked not in (None, body.chat_template_kwargs.enable_thinking):
            raise bad("thinking", "it contradicts chat_template_kwargs.enable_thinking")
        asked = body.chat_template_kwargs.enable_thinking
    if asked and constrained:
        raise bad("thinking", "an answer in a response_format is written without reasoning; leave one of them out")
    return (default if asked is None else asked) and not constrained


def _raw_prompts(prompts: Prompts, prompter: Prompter, caps: Caps, param: str) -> list[Prompt]:
    """A text, texts, token ids or lists of these."""
    if isinstance(prompts, str):
        return [prompter.raw(prompts, param)]
    if isinstance(prompts[0], int):
        return [Prompt(input_ids=prompts)]
    if len(prompts) > caps.max_inputs:
        raise bad(param, f"{len(prompts)} of them; this server takes {caps.max_inputs} at a time")
    return [prompter.raw(each, param) if isinstance(each, str) else Prompt(input_ids=each) for each in prompts]


def _new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


def _requests(id: str, prompts: Sequence[Prompt], work: Work, *, stream: bool = False) -> list[Request]:
    return [_request(f"{id}-{i}", prompt, work, stream=stream) for i, prompt in enumerate(prompts)]


def _request(id: str, prompt: Prompt, work: Work, *, stream: bool = False) -> Request:
    request = Request(id=id, input_ids=prompt.input_ids, work=work, media=prompt.media)
    return replace(request, stream=True) if stream else request
