"""Log-probabilities in OpenAI's two forms: chat's list of tokens, and completions' parallel lists,
prompts included.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from glm_batch.models.engine.api.request import Delta, Output, PromptScores, TopLogprob
from glm_batch.models.processing.tokenizer import IncrementalDetokenizer, Tokenizer

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
