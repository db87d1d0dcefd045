"""What a request asks of the engine (prompts, SamplingParams, a Constraint), and what all answers
have in common, log-probabilities in OpenAI's two forms among it.
"""

from __future__ import annotations

import json
import math
import secrets
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from glm_batch.glm_actors.faults.schema_check import SchemaChecker
from glm_batch.glm_actors.serving.openai.api_errors import ApiError, bad, internal, of_row
from glm_batch.glm_actors.serving.openai.prompter import RequestPrompter
from glm_batch.glm_actors.serving.openai.protocol import (
    ChatRequest,
    CompletionRequest,
    Prompts,
    Sampled,
    StructuredOutputs,
)
from glm_batch.models.engine.api.request import (
    Completion,
    Constraint,
    Delta,
    Output,
    PromptScores,
    Request,
    SamplingParams,
    TopLogprob,
    Work,
)
from glm_batch.models.processing.prompt import Prompt
from glm_batch.models.processing.tokenizer import IncrementalDetokenizer, Tokenizer
from glm_batch.models.request_limits import CHAT_TOKENS, RequestLimits

Json = dict[str, Any]
COMPLETION_TOKENS = 16  # OpenAI's default for completions
SEEDS = 1 << 63
ANY_OBJECT = '{"type": "object"}'


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


def checked(completions: Sequence[Completion], param: str = "") -> Sequence[Completion]:
    """Raises ApiError for the first that did not come to its end; with `param` it is that of one of
    several inputs.
    """
    for index, completion in enumerate(completions):
        if completion.error is not None:
            error = of_row(completion.error)
            raise _of_input(error, param, index) if param and len(completions) > 1 else error
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
    found: list[Prompt] = []
    for each in prompts:
        if isinstance(each, str):
            found.append(prompter.raw(each, f"{param}.{len(found)}"))
        else:
            found.append(Prompt(input_ids=each))
    return found


def _of_input(error: ApiError, param: str, index: int) -> ApiError:
    place = f"{param}.{index}"
    return ApiError(error.status, f"{place}: {error.message}", error.code, place)


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
    body: Sampled, caps: RequestLimits, *, max_tokens: int, logprobs: int | None
) -> SamplingParams:
    """OpenAI's defaults where the request says nothing: temperature 1, one output, a seed of its
    own. What exceeds the context is for the engine to cut.

    `logprobs` is the number of alternatives, None for no log-probabilities at all. Raises ApiError.
    """
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    for param, asked, most in (
        ("max_tokens", max_tokens, caps.max_tokens or max_tokens),
        ("n", body.n or 1, caps.max_n),
        ("stop", len(stop), caps.max_stop),
        ("top_logprobs", logprobs or 0, caps.max_logprobs),
        ("min_tokens", body.min_tokens or 0, max_tokens),
    ):
        if asked > most:
            raise bad(param, f"{asked} is more than {most}, which is the most here")
    if any(not text or len(text) > 256 for text in stop):
        raise bad("stop", "each stop string has 1 to 256 characters")
    if any("\ud800" <= character <= "\udfff" for text in stop for character in text):
        raise bad("stop", "a stop string holds half of a surrogate pair: it is no valid text")
    temperature = 1.0 if body.temperature is None else body.temperature
    return SamplingParams(
        temperature=0.0 if body.do_sample is False else temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        seed=secrets.randbits(63) if body.seed is None else body.seed % SEEDS,
        n=body.n or 1,
        stop=tuple(stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        logprobs=0 if logprobs is None else max(1, logprobs),
    )


def chat_sampling(body: ChatRequest, caps: RequestLimits) -> SamplingParams:
    """Raises ApiError."""
    if body.top_logprobs is not None and not body.logprobs:
        raise bad("top_logprobs", "it goes with logprobs: true")
    given = body.max_completion_tokens or body.max_tokens or caps.max_tokens or CHAT_TOKENS
    return sampling_of(
        body, caps, max_tokens=given, logprobs=(body.top_logprobs or 0) if body.logprobs else None
    )


def completion_sampling(body: CompletionRequest, caps: RequestLimits) -> SamplingParams:
    """Raises ApiError."""
    default = min(COMPLETION_TOKENS, caps.max_tokens or COMPLETION_TOKENS)
    given = default if body.max_tokens is None else body.max_tokens
    if given == 0 and not body.echo:
        raise bad("max_tokens", "0 goes with echo: true")
    return sampling_of(body, caps, max_tokens=max(given, 1), logprobs=body.logprobs)


def asked_format(body: Sampled) -> tuple[str, Constraint] | None:
    """The format that an answer must have, and the field that asks for it. Raises ApiError.

    Whether decoding can follow it: `checked_constraint`.
    """
    found = [*_response_formats(body), *_structured_outputs(body)]
    if len(found) > 1:
        first, second = found[0][0], found[1][0]
        raise bad(second, f"an answer has one format, and {first} asks for another: remove one")
    return found[0] if found else None


def checked_constraint(
    param: str, constraint: Constraint, caps: RequestLimits, schemas: SchemaChecker
) -> Constraint:
    """Raises ApiError for one that is too large, or that decoding cannot follow."""
    text = constraint.text
    what = {"json_schema": "schema", "lark": "grammar"}.get(constraint.kind, constraint.kind)
    if len(text) > caps.max_schema_bytes:
        size = f"{len(text):,} bytes; this server takes {caps.max_schema_bytes:,}"
        raise bad(param, f"the {what} has {size}")
    if text != ANY_OBJECT and (problem := schemas.problem(text, constraint.kind)):
        what = "JSON schema" if what == "schema" else what
        message = f"{param}: not a {what} that decoding can follow: {problem[:300]}"
        raise ApiError(400, message, "invalid_constraint", param)
    return constraint


def _response_formats(body: Sampled) -> Iterator[tuple[str, Constraint]]:
    asked = body.response_format if isinstance(body, ChatRequest) else None
    if asked is None or asked.type == "text":
        return
    if asked.type == "json_object":
        yield "response_format", Constraint(kind="json_schema", text=ANY_OBJECT)
    elif asked.json_schema is None:
        raise bad("response_format", "type json_schema goes with a json_schema")
    else:
        yield "response_format", _of_schema("response_format", asked.json_schema.schema_)


def _structured_outputs(body: Sampled) -> Iterator[tuple[str, Constraint]]:
    """vLLM's fields, by their newer names and by those before."""
    asked = body.structured_outputs or StructuredOutputs.model_validate({})
    if asked.json_object:
        yield "structured_outputs", Constraint(kind="json_schema", text=ANY_OBJECT)
    for param, schema in (("structured_outputs", asked.json_), ("guided_json", body.guided_json)):
        if schema is not None:
            yield param, _of_schema(param, schema)
    for param, regex in (("structured_outputs", asked.regex), ("guided_regex", body.guided_regex)):
        if regex is not None:
            yield param, Constraint(kind="regex", text=regex)
    for param, ways in (
        ("structured_outputs", asked.choice),
        ("guided_choice", body.guided_choice),
    ):
        if ways is not None:
            rule = " | ".join(json.dumps(way) for way in ways)
            yield param, Constraint(kind="lark", text=f"start: {rule}")
    for param, text in (
        ("structured_outputs", asked.grammar),
        ("guided_grammar", body.guided_grammar),
    ):
        if text is not None:
            yield param, Constraint(kind="lark", text=text)


def _of_schema(param: str, schema: Json | str) -> Constraint:
    try:
        found = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(found)
    except RecursionError as error:
        raise bad(param, "the schema is nested too deeply") from error
    except ValueError as error:
        raise bad(param, f"the schema is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise bad(param, "the schema must be an object")
    return Constraint(kind="json_schema", text=text)


LOWEST = -9999.0  # JSON has no minus infinity; the number that OpenAI's own interface gives instead


def chat_logprobs(
    output: Output | Delta, tokenizer: Tokenizer, alternatives: int
) -> dict[str, Any]:
    """{"content": one entry for each token, with as many alternatives as were asked for}"""
    entries = []
    for token_id, logprob, tops in _tokens(output):
        entry = _entry(token_id, logprob, tokenizer)
        entry["top_logprobs"] = [
            _entry(top.token_id, top.logprob, tokenizer) for top in tops[:alternatives]
        ]
        entries.append(entry)
    return {"content": entries, "refusal": None}


def completion_logprobs(
    output: Output | Delta, tokenizer: Tokenizer, alternatives: int, start: int
) -> dict[str, list[Any]]:
    """`start` is where the output's text begins in the whole; half characters count as one each."""
    found: dict[str, list[Any]] = {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": [],
    }
    for token_id, logprob, tops in _tokens(output):
        text = token_text(token_id, tokenizer)
        found["tokens"].append(text)
        found["token_logprobs"].append(_number(logprob))
        pairs = [(top.token_id, top.logprob) for top in tops[:alternatives]]
        found["top_logprobs"].append(_by_text(pairs, tokenizer))
        found["text_offset"].append(start)
        start += len(text)
    return found


def prompt_logprobs(
    ids: Sequence[int], scores: PromptScores, tokenizer: Tokenizer, *, shows_special: bool
) -> dict[str, list[Any]]:
    """As of an output, of a whole prompt; the first token has nothing before it, and null where
    others have numbers.

    `shows_special`: whether special tokens stand in the prompt's text, as they do where it was
    given as ids.
    """
    tops = zip(scores.top_ids.tolist(), scores.top_logprobs.tolist(), strict=True)
    return {
        "tokens": [token_text(id, tokenizer) for id in ids],
        "token_logprobs": [None, *map(_number, scores.logprobs.tolist())],
        "top_logprobs": [None, *(_by_text(zip(*each, strict=True), tokenizer) for each in tops)],
        "text_offset": list(_offsets(ids, tokenizer, shows_special=shows_special)),
    }


def _by_text(pairs: Iterable[tuple[int, float]], tokenizer: Tokenizer) -> dict[str, float]:
    """Of tokens that look the same, such as halves of characters, the likeliest."""
    found: dict[str, float] = {}
    for token_id, logprob in pairs:
        found.setdefault(token_text(token_id, tokenizer), _number(logprob))
    return found


def _offsets(ids: Sequence[int], tokenizer: Tokenizer, *, shows_special: bool) -> Iterator[int]:
    """Where each token's text begins, or the character of which it is a half."""
    detokenizer, start = IncrementalDetokenizer(tokenizer), 0
    for id in ids:
        yield start
        start += len(detokenizer.add(id))
        if shows_special and id in tokenizer.special_ids:
            start += len(token_text(id, tokenizer))


def token_text(token_id: int, tokenizer: Tokenizer) -> str:
    """What people see of a token; bytes that are no character become U+FFFD."""
    data = tokenizer.token_bytes(token_id)
    return (
        data.decode(errors="replace")
        if data
        else tokenizer.decode([token_id], skip_special_tokens=False)
    )


def _tokens(output: Output | Delta) -> list[tuple[int, float, Sequence[TopLogprob]]]:
    logprobs = output.logprobs or ()
    tops: Sequence[Sequence[TopLogprob]] = output.top_logprobs or [()] * len(logprobs)
    return list(zip(output.token_ids, logprobs, tops, strict=True))


def _entry(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    text = token_text(token_id, tokenizer)
    data = tokenizer.token_bytes(token_id) or text.encode()
    return {"token": text, "logprob": _number(logprob), "bytes": list(data)}


def _number(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOWEST
