"""EchoEngine: answers every request at once from its prompt alone. No model, no torch; for dry runs
and tests.

Answers are a function of the prompt's token ids, its media and the work, so that reruns agree. A
generated text is the prompt's last tokens (decoded by the tokenizer when one is given) and the
first bytes of its media's digests; the label scores favour a choice picked by the sum of the prompt
and of these bytes. Every prompt token is the likeliest.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain
from typing import Protocol

import numpy as np

from glm_batch.models.engine.api.request import (
    Choose,
    Classify,
    Completion,
    Delta,
    Embed,
    FinishReason,
    Generate,
    Inspect,
    Output,
    PromptScores,
    Request,
    Score,
    Tag,
    refuse_known_ids,
)
from glm_batch.models.errors import RowError

# length of vectors, class logits and hidden states where no checkpoint says otherwise
ECHO_WIDTH = 8
DIGEST_BYTES = 4  # of each item's digest, as much as answers depend on


class Decoder(Protocol):
    """The one thing EchoEngine asks of a tokenizer."""

    def decode(self, ids: list[int]) -> str: ...


class EchoEngine:
    """Completes everything in the step after it was submitted."""

    def __init__(
        self,
        *,
        max_model_len: int = 1 << 20,
        tokenizer: Decoder | None = None,
        hidden_size: int = ECHO_WIDTH,
        num_labels: int = ECHO_WIDTH,
        merge_size: int | None = None,
    ) -> None:
        """`merge_size` is that of the checkpoint's vision tower; without one, prompts with media
        are refused.
        """
        self._max_model_len = max_model_len
        self._tokenizer = tokenizer
        self._hidden_size = hidden_size
        self._num_labels = num_labels
        self._merge_size = merge_size
        self._waiting: dict[str, Request] = {}
        self._aborted: list[Completion] = []
        self._deltas: list[Delta] = []

    def submit(self, requests: list[Request]) -> None:
        """Queues requests; raises ValueError for an id that is in flight already."""
        refuse_known_ids(
            requests, chain(self._waiting, (completion.id for completion in self._aborted))
        )
        self._waiting |= {request.id: request for request in requests}

    def step(self) -> list[Completion]:
        answers = [self._answer(request) for request in self._waiting.values()]
        for request, answer in zip(self._waiting.values(), answers, strict=True):
            if request.stream:
                self._deltas += [
                    _delta(request.id, index, output) for index, output in enumerate(answer.outputs)
                ]
        done = self._aborted + answers
        self._waiting.clear()
        self._aborted = []
        return done

    def deltas(self) -> list[Delta]:
        gained, self._deltas = self._deltas, []
        return gained

    def abort(self, ids: list[str]) -> None:
        for request_id in ids:
            request = self._waiting.pop(request_id, None)
            if request is not None:
                self._aborted.append(self._done(request, "abort"))

    def has_work(self) -> bool:
        return bool(self._waiting or self._aborted)

    def close(self) -> None:
        self._waiting.clear()
        self._aborted = []

    def _answer(self, request: Request) -> Completion:
        ids = list(request.input_ids)
        error = self._error(request)
        if error is not None:
            return Completion(
                id=request.id, finish_reason="error", prompt_tokens=len(ids), error=error
            )
        items = request.media.items if request.media else ()
        seen = [item.digest[:DIGEST_BYTES] for item in items]
        digest = sum(ids) + sum(int.from_bytes(each) for each in seen)
        done = self._done(request, "scored")
        match request.work:
            case Generate(sampling=sampling):
                echoed = ids[-sampling.max_tokens :]
                text = (
                    self._tokenizer.decode(echoed)
                    if self._tokenizer
                    else " ".join(map(str, echoed))
                )
                text += "".join(
                    f" {item.kind} {each.hex()}" for item, each in zip(items, seen, strict=True)
                )
                logprobs = (0.0,) * len(echoed) if sampling.logprobs else None
                output = Output(
                    token_ids=tuple(echoed), text=text, finish_reason="stop", logprobs=logprobs
                )
                outputs = (output,) * sampling.n
                return replace(
                    done,
                    finish_reason="stop",
                    output_tokens=len(echoed) * sampling.n,
                    outputs=outputs,
                )
            case Choose(choices=choices):
                rest = 0.1 / max(len(choices) - 1, 1)
                picked = digest % len(choices)
                scores = tuple(math.log(0.8 if i == picked else rest) for i in range(len(choices)))
                return replace(done, choice_logprobs=scores)
            case Score(top=top):
                return replace(done, scores=_echo_scores(ids, top, shift=(digest - sum(ids)) % 97))
            case Classify() | Embed():
                width = self._hidden_size if isinstance(request.work, Embed) else self._num_labels
                array = np.cos(np.arange(width, dtype=np.float32) + digest % 97)
            case Tag() | Inspect():
                width = self._hidden_size if isinstance(request.work, Inspect) else self._num_labels
                shift = (digest - sum(ids)) % 97
                array = np.cos(
                    np.arange(width, dtype=np.float32) + np.array(ids, np.float32)[:, None] + shift
                )
        return replace(done, array=array.astype(np.float32))

    def _done(self, request: Request, reason: FinishReason) -> Completion:
        items = request.media.items if request.media and self._merge_size else ()
        media_tokens = sum(
            math.prod(item.grid_thw) // (self._merge_size or 1) ** 2 for item in items
        )
        num_tokens = len(request.input_ids)
        return Completion(
            id=request.id, finish_reason=reason, prompt_tokens=num_tokens, media_tokens=media_tokens
        )

    def _error(self, request: Request) -> RowError | None:
        num_tokens = len(request.input_ids)
        if num_tokens == 0:
            return RowError("empty_prompt", "the prompt has no tokens")
        if num_tokens >= self._max_model_len:
            return RowError(
                "prompt_too_long",
                f"the prompt has {num_tokens} tokens, the model takes fewer than {self._max_model_len}",
            )
        if request.media is not None and self._merge_size is None:
            return RowError(
                "unsupported_media", "the prompt shows media; the checkpoint reads text"
            )
        return None


def _echo_scores(ids: list[int], top: int, *, shift: int) -> PromptScores:
    logprobs = np.full(len(ids) - 1, -1.0 - shift / 97, np.float32)
    ranks = np.arange(top)
    return PromptScores(
        logprobs=logprobs,
        top_ids=np.array(ids[1:], np.int64)[:, None] + ranks,
        top_logprobs=logprobs[:, None] - ranks.astype(np.float32),
    )


def _delta(id: str, index: int, output: Output) -> Delta:
    """The whole output at once: it is written in one step."""
    return Delta(
        id=id,
        index=index,
        token_ids=output.token_ids,
        text=output.text,
        finish_reason=output.finish_reason,
        logprobs=output.logprobs or (),
    )
