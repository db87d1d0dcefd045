"""How a request wants its text written: SamplingParams and a Constraint out of OpenAI's fields,
within the caps.

Knows nothing of prompts or of answers.
"""

from __future__ import annotations

import json
import secrets

from glm_batch.glm_actors.serving.openai.api_errors import ApiError, bad
from glm_batch.glm_actors.serving.openai.protocol import (
    ChatRequest,
    CompletionRequest,
    ResponseFormat,
    Sampled,
)
from glm_batch.glm_actors.serving.openai.schema_check import SchemaChecker
from glm_batch.models.engine.api.request import Constraint, SamplingParams
from glm_batch.models.request_limits import RequestLimits

COMPLETION_TOKENS = 16  # OpenAI's default for completions
SEEDS = 1 << 63


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
    """The schema that the answer must match. Raises ApiError for one that decoding cannot follow."""
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
