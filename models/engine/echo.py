"""EchoEngine: answers every request at once from its prompt alone. No model, no torch; for dry runs
and tests.

Answers are a function of the prompt's token ids, its media and the work, so that reruns agree: see
`echo` of each kind in `works`.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import Protocol

from glm_batch.models.engine.api.request import Completion, Delta, Request, refuse_known_ids
from glm_batch.models.engine.works.admission import failed
from glm_batch.models.engine.works.all_answers import ANSWERS
from glm_batch.models.engine.works.answer import EchoPrompt, Fields
from glm_batch.models.errors import RowError

# length of vectors, class logits and hidden states where no checkpoint says otherwise
ECHO_WIDTH = 8


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
        """Without the `merge_size` of a vision tower, prompts with media are refused."""
        self._max_model_len = max_model_len
        self.tokenizer = tokenizer
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
        done = self._aborted + [self._answer(request) for request in self._waiting.values()]
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
                self._aborted.append(self._completion(request, {"finish_reason": "abort"}))

    def has_work(self) -> bool:
        return bool(self._waiting or self._aborted)

    def close(self) -> None:
        self._waiting.clear()
        self._aborted = []

    def _answer(self, request: Request) -> Completion:
        try:
            self._check(request)
        except RowError as error:
            return failed(request, error)
        prompt = EchoPrompt(
            ids=list(request.input_ids),
            items=request.media.items if request.media else (),
            decode=self.tokenizer.decode if self.tokenizer else _numbers,
            hidden_size=self._hidden_size,
            num_labels=self._num_labels,
        )
        fields = ANSWERS[type(request.work)].echo(request.work, prompt)
        completion = self._completion(request, {"finish_reason": "scored"} | fields)
        if request.stream:  # each output at once: it is written in one step
            self._deltas += [
                Delta(
                    id=request.id,
                    index=index,
                    token_ids=output.token_ids,
                    text=output.text,
                    finish_reason=output.finish_reason,
                    logprobs=output.logprobs or (),
                )
                for index, output in enumerate(completion.outputs)
            ]
        return completion

    def _completion(self, request: Request, fields: Fields) -> Completion:
        items = request.media.items if request.media and self._merge_size else ()
        media_tokens = sum(
            math.prod(item.grid_thw) // (self._merge_size or 1) ** 2 for item in items
        )
        return Completion(
            id=request.id, prompt_tokens=len(request.input_ids), media_tokens=media_tokens, **fields
        )

    def _check(self, request: Request) -> None:
        num_tokens = len(request.input_ids)
        if num_tokens == 0:
            raise RowError("empty_prompt", "the prompt has no tokens")
        if num_tokens >= self._max_model_len:
            raise RowError(
                "prompt_too_long",
                f"the prompt has {num_tokens} tokens, the model takes fewer than "
                f"{self._max_model_len}",
            )
        if request.media is not None and self._merge_size is None:
            raise RowError("unsupported_media", "the prompt shows media; the checkpoint reads text")


def _numbers(ids: list[int]) -> str:
    return " ".join(map(str, ids))
