"""Decoding: text, end, constraint and log-probabilities of one output while it is written."""

from __future__ import annotations

from glm_batch.models.engine.api.request import (
    Delta,
    FinishReason,
    Output,
    SamplingParams,
    TopLogprob,
)
from glm_batch.models.engine.decoding.constraints import Matcher
from glm_batch.models.processing.tokenizer import IncrementalDetokenizer, Tokenizer


class Decoding:
    """Output number `index` of a request.

    `max_tokens` is what the request asks for or what the model's length leaves. With `jump_forward`
    tokens that the constraint forces are added at once, without being drawn.
    """

    def __init__(
        self,
        params: SamplingParams,
        tokenizer: Tokenizer,
        *,
        max_tokens: int,
        prompt_ids: list[int],
        index: int = 0,
        matcher: Matcher | None = None,
        jump_forward: bool = True,
    ) -> None:
        self.params = params
        self.prompt_ids = prompt_ids
        self.index = index
        self.matcher = matcher
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._eos = frozenset() if params.ignore_eos else frozenset(tokenizer.eos_token_ids)
        self._max_tokens = max_tokens
        # a forced token has no log-probability
        self._jump_forward = jump_forward and not params.logprobs
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._text = ""
        self._stop_reason: str | int | None = None
        self._logprobs: list[float] = []
        self._top_logprobs: list[tuple[TopLogprob, ...]] = []
        self._given_tokens = self._given_chars = 0  # what deltas have handed out

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end this output when they are sampled."""
        return (*self._eos, *self.params.stop_token_ids)

    def add(
        self, token_id: int, logprob: float | None, top_logprobs: tuple[TopLogprob, ...] | None
    ) -> list[int]:
        """Takes a sampled token; returns those that the constraint forces after it."""
        if logprob is not None:
            self._logprobs.append(logprob)
            self._top_logprobs.append(top_logprobs or ())
        self._append(token_id)
        if self.finish_reason or self.matcher is None:
            return []
        self.matcher.accept(token_id)
        forced = self._forced() if self._jump_forward else []
        if not self.finish_reason and self.matcher.is_done:
            self.finish_reason = "stop"
        return forced

    def output(self) -> Output:
        """What was generated, once `finish_reason` is set."""
        assert self.finish_reason is not None
        if not isinstance(self._stop_reason, str):
            self._text += self._detokenizer.finish()  # which has nothing more to say a second time
        wants_logprobs = self.params.logprobs > 0
        return Output(
            token_ids=tuple(self.token_ids),
            text=self._text,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            logprobs=tuple(self._logprobs) if wants_logprobs else None,
            top_logprobs=tuple(self._top_logprobs) if wants_logprobs else None,
        )

    def delta(self, id: str) -> Delta:
        """What was added since the last call: see Delta."""
        text = (
            self.output().text
            if self.finish_reason
            else self._text[: len(self._text) - self._num_unsafe()]
        )
        tokens, chars = slice(self._given_tokens, None), slice(self._given_chars, None)
        self._given_tokens, self._given_chars = len(self.token_ids), len(text)
        return Delta(
            id=id,
            index=self.index,
            token_ids=tuple(self.token_ids[tokens]),
            text=text[chars],
            finish_reason=self.finish_reason,
            logprobs=tuple(self._logprobs[tokens]) if self.params.logprobs else (),
            top_logprobs=tuple(self._top_logprobs[tokens]) if self.params.logprobs else (),
        )

    def _num_unsafe(self) -> int:
        """Characters at the end of the text with which a stop string may have begun."""
        longest = max(map(len, self.params.stop), default=1) - 1
        for count in range(min(longest, len(self._text)), 0, -1):
            if any(stop.startswith(self._text[-count:]) for stop in self.params.stop):
                return count
        return 0

    def _forced(self) -> list[int]:
        """Tokens without an alternative need no sampling, only their keys and values."""
        assert self.matcher is not None
        added = []
        for token_id in self.matcher.forced_tokens():
            self._append(token_id)
            self.matcher.accept(token_id)
            added.append(token_id)
            if self.finish_reason:
                break
        return added

    def _append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        if token_id in self._eos:
            self.finish_reason = "stop"
            return
        if token_id in self.params.stop_token_ids:
            self.finish_reason, self._stop_reason = "stop", token_id
            return
        self._extend_text(self._detokenizer.add(token_id))
        if self.finish_reason is None and len(self.token_ids) >= self._max_tokens:
            self.finish_reason = "length"

    def _extend_text(self, piece: str) -> None:
        known = len(self._text)
        self._text += piece
        if not piece or len(self.token_ids) < self.params.min_tokens:
            return
        found = []
        for stop in self.params.stop:
            position = self._text.find(stop, max(known - len(stop) + 1, 0))
            if position >= 0:
                found.append((position, stop))
        if found:
            position, stop = min(found)
            self._text = self._text[:position]
            self.finish_reason, self._stop_reason = "stop", stop
