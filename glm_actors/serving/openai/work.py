"""What all kinds of tasks need: a request's prompts, requests for the engine, and the sums over
what comes back.

Knows nothing of routes or of the form of answers.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from glm_batch.glm_actors.serving.openai.api_errors import bad, internal, of_row
from glm_batch.glm_actors.serving.openai.prompter import Prompt, Prompter
from glm_batch.glm_actors.serving.openai.protocol import Prompts
from glm_batch.models.engine.api.request import Completion, Request, Work
from glm_batch.models.request_limits import RequestLimits

Json = dict[str, Any]


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
    prompts: Prompts, prompter: Prompter, caps: RequestLimits, param: str
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
    request = Request(id=id, input_ids=prompt.input_ids, work=work, media=prompt.media)
    return replace(request, stream=True) if stream else request
