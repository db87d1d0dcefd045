"""What a request asks of the engine (prompts, SamplingParams, a Constraint), and what all answers
have in common.
"""

from __future__ import annotations

import json
import secrets
import time
import uuid
from collections.abc import Sequence
from typing import Any

from glm_batch.glm_actors.faults.schema_check import SchemaChecker
from glm_batch.glm_actors.serving.openai.api_errors import ApiError, bad, internal, of_row
from glm_batch.glm_actors.serving.openai.prompter import RequestPrompter
from glm_batch.glm_actors.serving.openai.protocol import (
    ChatRequest,
    CompletionRequest,
    Prompts,
    ResponseFormat,
    Sampled,
)
from glm_batch.models.engine.api.request import (
    Completion,
    Constraint,
    Request,
    SamplingParams,
    Work,
)
from glm_batch.models.processing.prompt import Prompt
from glm_batch.models.request_limits import RequestLimits

Json = dict[str, Any]
COMPLETION_TOKENS = 16  # OpenAI's default for completions
SEEDS = 1 << 63


def envelope(id: str, object_: str, model: str) -> Json:
    """What all answers and chunks of one request begin with."""
    return {"id": id, "object": object_, "created": int(time.time()), "model": model}


def usage_of(completions: Sequence[Completion]) -> Json:
    """OpenAI's token counts over all of a request's prompts."""
    prompt = sum(completion.prompt_tokens for completion in completions)
    written = sum(completion.output_tokens for completion in completions)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {
            "cached_tokens": sum(completion.cached_tokens for completion in completions)
        },
    }


def checked(completions: Sequence[Completion]) -> Sequence[Completion]:
    """Raises ApiError for the first that did not come to its end."""
    for completion in completions:
        if completion.error is not None:
            raise of_row(completion.error)
        if completion.finish_reason == "abort":
            raise internal()
    return completions


def raw_prompts(
    prompts: Prompts, prompter: RequestPrompter, caps: RequestLimits, param: str
) -> list[Prompt]:
    """A text, texts, token ids or lists of these."""
    if isinstance(prompts, str):
        return [prompter.raw(prompts, param)]
    if isinstance(prompts[0], int):
        return [Prompt(input_ids=prompts)]
    if len(prompts) > caps.max_inputs:
        raise bad(param, f"{len(prompts)} of them; this server takes {caps.max_inputs} at a time")
    return [
        prompter.raw(each, param) if isinstance(each, str) else Prompt(input_ids=each)
        for each in prompts
    ]


def new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


def requests_of(
    id: str, prompts: Sequence[Prompt], work: Work, *, stream: bool = False
) -> list[Request]:
    return [
        request_of(f"{id}-{i}", prompt, work, stream=stream) for i, prompt in enumerate(prompts)
    ]


def request_of(id: str, prompt: Prompt, work: Work, *, stream: bool = False) -> Request:
    return Request(id=id, input_ids=prompt.input_ids, work=work, media=prompt.media, stream=stream)


def sampling_of(
    body: Sampled, caps: RequestLimits, *, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """OpenAI's defaults where the request says nothing: temperature 1, one output, a seed of its
    own.

    `logprobs` is the number of alternatives, None for no log-probabilities at all. Raises ApiError.
    """
    stop = (
        ()
        if body.stop is None
        else (body.stop,)
        if isinstance(body.stop, str)
        else tuple(body.stop)
    )
    wanted = caps.max_tokens if max_tokens is None else max_tokens
    for param, asked, most in (
        ("max_tokens", wanted, caps.max_tokens),
        ("n", body.n or 1, caps.max_n),
        ("stop", len(stop), caps.max_stop),
        ("top_logprobs", logprobs or 0, caps.max_logprobs),
        ("min_tokens", body.min_tokens or 0, wanted),
    ):
        if asked > most:
            raise bad(param, f"{asked} is more than {most}, which is the most here")
    if any(not text or len(text) > 256 for text in stop):
        raise bad("stop", "each stop string has 1 to 256 characters")
    if any("\ud800" <= character <= "\udfff" for text in stop for character in text):
        raise bad("stop", "a stop string holds half of a surrogate pair: it is no valid text")
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        max_tokens=wanted,
        min_tokens=body.min_tokens or 0,
        seed=secrets.randbits(63) if body.seed is None else body.seed % SEEDS,
        n=body.n or 1,
        stop=stop,
        ignore_eos=bool(body.ignore_eos),
        logprobs=0 if logprobs is None else max(1, logprobs),
    )


def chat_sampling(body: ChatRequest, caps: RequestLimits) -> SamplingParams:
    """Raises ApiError."""
    if body.top_logprobs is not None and not body.logprobs:
        raise bad("top_logprobs", "it goes with logprobs: true")
    given = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return sampling_of(
        body, caps, max_tokens=given, logprobs=(body.top_logprobs or 0) if body.logprobs else None
    )


def completion_sampling(body: CompletionRequest, caps: RequestLimits) -> SamplingParams:
    """Raises ApiError."""
    given = min(COMPLETION_TOKENS, caps.max_tokens) if body.max_tokens is None else body.max_tokens
    if given == 0 and not body.echo:
        raise bad("max_tokens", "0 goes with echo: true")
    return sampling_of(body, caps, max_tokens=max(given, 1), logprobs=body.logprobs)


def constraint_of(
    format_: ResponseFormat | None, caps: RequestLimits, schemas: SchemaChecker
) -> Constraint | None:
    """The schema that the answer must match. Raises ApiError for one that cannot be followed."""
    if format_ is None or format_.type == "text":
        return None
    if format_.type == "json_object":
        return Constraint(kind="json_schema", text='{"type": "object"}')
    if format_.json_schema is None:
        raise bad("response_format", "type json_schema goes with a json_schema")
    try:
        text = json.dumps(format_.json_schema.schema_)
    except (RecursionError, ValueError) as error:
        raise bad("response_format", "the schema is nested too deeply") from error
    if len(text) > caps.max_schema_bytes:
        raise bad(
            "response_format",
            f"the schema has {len(text):,} bytes; this server takes {caps.max_schema_bytes:,}",
        )
    problem = schemas.problem(text)
    if problem:
        message = f"response_format: not a JSON schema that decoding can follow: {problem[:300]}"
        raise ApiError(400, message, "invalid_constraint", "response_format")
    return Constraint(kind="json_schema", text=text)
