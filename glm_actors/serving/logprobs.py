"""Log-probabilities of an output in OpenAI's two forms: chat's list of tokens, and completions' parallel lists."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from models.engine.request import Delta, Output, TopLogprob
from models.processing.tokenizer import Tokenizer

LOWEST = -9999.0  # JSON has no minus infinity; the number that OpenAI's own interface gives instead


def chat_logprobs(output: Output | Delta, tokenizer: Tokenizer, alternatives: int) -> dict[str, Any]:
    """{"content": one entry for each token, with as many alternatives as were asked for}"""
    entries = []
    for token_id, logprob, tops in _tokens(output):
        entry = _entry(token_id, logprob, tokenizer)
        entry["top_logprobs"] = [_entry(top.token_id, top.logprob, tokenizer) for top in tops[:alternatives]]
        entries.append(entry)
    return {"content": entries, "refusal": None}


def completion_logprobs(
    output: Output | Delta, tokenizer: Tokenizer, alternatives: int, start: int
) -> dict[str, list[Any]]:
    """`start` is where the output's text begins in the whole; half characters count as one each."""
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token_id, logprob, tops in _tokens(output):
        text = token_text(token_id, tokenizer)
        found["tokens"].append(text)
        found["token_logprobs"].append(_number(logprob))
        found["top_logprobs"].append(
            {token_text(top.token_id, tokenizer): _number(top.logprob) for top in tops[:alternatives]}
        )
        found["text_offset"].append(start)
        start += len(text)
    return found


def token_text(token_id: int, tokenizer: Tokenizer) -> str:
    """What people see of a token; bytes that are no character become U+FFFD."""
    data = tokenizer.token_bytes(token_id)
    return data.decode(errors="replace") if data else tokenizer.decode([token_id], skip_special_tokens=False)


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
