"""A prompt and its media in vLLM's own engine form, so that neither its processor nor its renderer ever runs.

Knows nothing of requests.
"""

from __future__ import annotations

from typing import Any

from vllm.inputs.engine import tokens_input

from models.engine.media import PlacedMedia


def engine_input(tokens: list[int], media: PlacedMedia | None) -> Any:
    """A prompt's tokens and media as vLLM's engine takes them."""
    assert media is None
    return tokens_input(tokens)
