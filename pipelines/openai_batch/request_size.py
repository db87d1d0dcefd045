"""How heavy a line of an OpenAI batch file is on its way: by what it holds and by what it asks for.

A guess for the size of units, from the line alone. Knows nothing of what is right or wrong with a
request.
"""

from __future__ import annotations

from typing import Any

from glm_batch.pipelines.input.values import Row

ASSUMED_TOKENS = 256  # that a request writes which does not say how many
ALTERNATIVE_BYTES = 120  # a token among top_logprobs, in the engine's answer and as JSON
NUMBER_BYTES = 24  # a number of a vector, as float32 and as JSON


def answer_bytes(row: Row, hidden_size: int) -> int:
    """What the answer may weigh: vectors of `hidden_size` numbers for texts to embed, tokens for
    what is written.
    """
    body = row.get("body")
    if not isinstance(body, dict):
        return 0
    if row.get("url") == "/v1/embeddings":
        return _count(body.get("input")) * hidden_size * NUMBER_BYTES
    alternatives = max(_number(body.get("top_logprobs")), _number(body.get("logprobs")))
    tokens = (
        _number(body.get("max_completion_tokens"))
        or _number(body.get("max_tokens"))
        or ASSUMED_TOKENS
    )
    choices = _count(body.get("prompt")) * max(_number(body.get("n")), 1)
    return choices * tokens * (8 + alternatives * ALTERNATIVE_BYTES)


def _count(value: Any) -> int:
    """How many texts or token lists stand in a field; token ids by themselves are one."""
    is_many = isinstance(value, list) and value and not isinstance(value[0], int)
    return len(value) if is_many else 1


def _number(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
