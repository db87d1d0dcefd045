"""Refuses requests that can never run, so that everything admitted finishes."""

from __future__ import annotations

from typing import Any

from glm_batch.models.engine.api.request import Completion, Request
from glm_batch.models.engine.scheduling.placeholders import PlacedMedia, place
from glm_batch.models.engine.works.answer import Answer
from glm_batch.models.errors import RowError


def check(answer: Answer[Any], capacity: int | None = None) -> None:
    """Raises RowError. `capacity`: the tokens that the KV cache holds, if that may be too few."""
    prompt, config = answer.prompt, answer.context.config
    if answer.head not in (None, config.head):
        raise RowError(
            "unsupported_work",
            f"{type(answer.work).__name__} needs a {answer.head} head; the checkpoint is a "
            f"{config.architecture}",
        )
    if not prompt:
        raise RowError("empty_prompt", "the prompt has no tokens")
    if min(prompt) < 0 or max(prompt) >= config.vocab_size:
        raise RowError(
            "invalid_token", f"the prompt holds ids outside 0 to {config.vocab_size - 1}"
        )
    answer.check()
    check_length(len(prompt), answer.num_more, answer.context.max_model_len)
    held = len(prompt) + answer.num_held
    if capacity is not None and held > capacity:
        raise RowError(
            "prompt_too_long",
            f"prompt and output may take {held} tokens; the KV cache holds {capacity}: lower "
            "max_tokens or raise engine.kv_cache_tokens",
        )


def check_length(num_prompt: int, num_more: int, limit: int) -> None:
    """Raises RowError where prompt and `num_more` tokens are more than `limit`."""
    if num_prompt + num_more > limit:
        more = f" and {num_more} more to continue with" if num_more else ""
        raise RowError(
            "prompt_too_long", f"the prompt has {num_prompt} tokens{more}; the model takes {limit}"
        )


def place_media(answer: Answer[Any]) -> PlacedMedia | None:
    """Matches the request's media with its placeholders; a prompt without both costs one look."""
    media, config = answer.request.media, answer.context.config
    if config.vision is None or config.media_tokens is None:
        if media is None:
            return None
        raise RowError(
            "unsupported_media",
            f"the prompt shows media; the checkpoint, a {config.architecture}, reads text",
        )
    if media is None and config.media_tokens.image not in answer.prompt:
        return None
    return place(media, answer.prompt, config.media_tokens, config.vision)


def failed(request: Request, error: RowError) -> Completion:
    return Completion(
        id=request.id, finish_reason="error", prompt_tokens=len(request.input_ids), error=error
    )
