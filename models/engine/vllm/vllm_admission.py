"""Which requests VllmEngine takes: the same ones as TorchEngine, but for what vLLM cannot do.

Owns the RowErrors of a request that can never run. Knows nothing of vLLM's objects.
"""

from __future__ import annotations

from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.engine.api.request import (
    Choose,
    Classify,
    Embed,
    Generate,
    Inspect,
    Request,
    Score,
    Tag,
)
from glm_batch.models.engine.scheduling.placeholders import PlacedMedia, place
from glm_batch.models.engine.torch_engine import choice_tree
from glm_batch.models.engine.vllm.vllm_limits import generate_problem
from glm_batch.models.errors import RowError

HEADS = {
    Generate: "causal_lm",
    Choose: "causal_lm",
    Classify: "sequence_classification",
    Tag: "token_classification",
}


def check(
    request: Request, prompt: list[int], model: ModelConfig, max_model_len: int, max_engine_len: int
) -> None:
    """Raises RowError for a request that cannot run. Lengths as in
    models.engine.vllm.vllm_core.VllmSettings.
    """
    _check_work(request, model)
    if not prompt:
        raise RowError("empty_prompt", "the prompt has no tokens")
    if min(prompt) < 0 or max(prompt) >= model.vocab_size:
        raise RowError("invalid_token", f"the prompt holds ids outside 0 to {model.vocab_size - 1}")
    longest, limit = len(prompt), max_model_len
    match request.work:
        case Generate():
            longest += 1  # at least one token must fit
        case Choose(choices=choices):
            longest += max(choice_tree(request.work).depths, default=0)
            limit = min(limit, max_engine_len - 1)  # vLLM draws a token after what it scores
            if any(not 0 <= token < model.vocab_size for choice in choices for token in choice):
                raise RowError(
                    "invalid_token", f"a choice holds ids outside 0 to {model.vocab_size - 1}"
                )
    if longest > limit:
        extra = (
            f" and {longest - len(prompt)} more to continue with" if longest > len(prompt) else ""
        )
        raise RowError(
            "prompt_too_long",
            f"the prompt has {len(prompt)} tokens{extra}; the model takes {limit}",
        )


def _check_work(request: Request, model: ModelConfig) -> None:
    if isinstance(request.work, Inspect) and request.work.what == "logits":
        raise RowError(
            "unsupported_work", "vLLM does not give the logits of a prompt; use engine.kind torch"
        )
    if isinstance(request.work, Score):
        raise RowError(
            "unsupported_work",
            "a prompt's log-probabilities are not read from vLLM; use engine.kind torch",
        )
    needed = HEADS.get(type(request.work))
    if needed and needed != model.head:
        raise RowError(
            "unsupported_work",
            f"{type(request.work).__name__} needs a {needed} head; the checkpoint is a {model.architecture}",
        )
    if isinstance(request.work, Embed | Inspect) and model.head != "causal_lm":
        raise RowError(
            "unsupported_work",
            f"vLLM gives no vectors of a {model.architecture}; use engine.kind torch",
        )
    problem = generate_problem(request.work) if isinstance(request.work, Generate) else None
    if problem:
        raise RowError("unsupported_sampling", problem)


def place_media(request: Request, prompt: list[int], model: ModelConfig) -> PlacedMedia | None:
    """Matches the request's media with its placeholders, as TorchEngine does."""
    if model.vision is None or model.media_tokens is None:
        if request.media is None:
            return None
        raise RowError(
            "unsupported_media",
            f"the prompt shows media; the checkpoint, a {model.architecture}, reads text",
        )
    if request.media is None and model.media_tokens.image not in prompt:
        return None
    return place(request.media, prompt, model.media_tokens, model.vision)
