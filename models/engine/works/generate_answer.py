"""Generate: tokens drawn one by one, `n` times."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Any

from glm_batch.models.engine.api.request import Generate, Output, Request
from glm_batch.models.engine.decoding.constraints import Matcher
from glm_batch.models.engine.decoding.decoding import Decoding
from glm_batch.models.engine.scheduling.placeholders import PlacedMedia
from glm_batch.models.engine.scheduling.sequence import Sequence
from glm_batch.models.engine.works.answer import Answer, Context, EchoPrompt, Fields, ForkMaker
from glm_batch.models.engine.works.readout import ReadoutBuilder, StepOutput, Wanted
from glm_batch.models.errors import ConfigError, RowError


class GenerateAnswer(Answer[Generate]):
    """decodings: the outputs being written. copies: how often each of them counts."""

    head = "causal_lm"
    num_more = 1  # at least one token must fit

    def __init__(self, request: Request, prompt: list[int], context: Context) -> None:
        super().__init__(request, prompt, context)
        room = context.max_model_len - len(prompt)
        self.max_tokens = self.num_held = min(self.work.sampling.max_tokens, room)
        self.num_skippable = len(prompt) - 1
        self.decodings: list[Decoding] = []
        self.copies = 1

    def sequences(self, media: PlacedMedia | None) -> list[Sequence]:
        self._start(self.work.sampling.n, jump_forward=True)
        return [self.sequence(media, sample_index=index) for index in range(self.work.sampling.n)]

    def wanted(self, sequence: Sequence, start: int, end: int) -> SequenceOf[int]:
        last = len(sequence.tokens) - 1
        return [last] if start <= last < end else []

    def read(
        self, sequence: Sequence, indices: SequenceOf[int], rows: range, readout: ReadoutBuilder
    ) -> int | None:
        """The number of the draw."""
        if not indices:
            return None
        return readout.sample(rows[0], self.decodings[sequence.sample_index])

    def take(self, want: Wanted, output: StepOutput) -> bool:
        if want.where is None:
            return False
        draw, sequence = output.draws[want.where], want.sequence
        if draw.error:
            raise draw.error
        decoding = self.decodings[sequence.sample_index]
        forced = decoding.add(draw.token_id, draw.logprob, draw.top_logprobs)
        sequence.tokens += [draw.token_id, *forced]
        self.tell(sequence.sample_index)
        return decoding.finish_reason is not None

    def forks(self, maker: ForkMaker) -> list[Any]:
        """One for each output; greedy ones are all the same."""
        sampling = self.work.sampling
        count = 1 if sampling.is_greedy else sampling.n
        self.copies = sampling.n // count
        self._start(count, jump_forward=False)
        stream = self.request.stream
        return [
            maker.sample(self.work, index, self.max_tokens, stream=stream) for index in range(count)
        ]

    def tell(self, index: int) -> None:
        """Hands out what output `index` has gained, to whoever streams it."""
        if self.request.stream:
            delta = self.decodings[index].delta(self.request.id)
            self.context.deltas += [
                replace(delta, index=index + copy) for copy in range(self.copies)
            ]

    def fields(self, *, aborted: bool) -> Fields:
        ended = [decoding for decoding in self.decodings if decoding.finish_reason]
        outputs = tuple(decoding.output() for decoding in ended) * self.copies
        written = sum(len(decoding.token_ids) for decoding in self.decodings)
        return {
            "finish_reason": "abort" if aborted else outputs[0].finish_reason,
            "outputs": outputs,
            "output_tokens": written * self.copies,
        }

    @staticmethod
    def echo(work: Generate, prompt: EchoPrompt) -> Fields:
        """The prompt's last tokens, and the first bytes of its media's digests."""
        sampling = work.sampling
        echoed = prompt.ids[-sampling.max_tokens :]
        shown = [
            f" {item.kind} {seen.hex()}"
            for item, seen in zip(prompt.items, prompt.seen, strict=True)
        ]
        output = Output(
            token_ids=tuple(echoed),
            text=prompt.decode(echoed) + "".join(shown),
            finish_reason="stop",
            logprobs=(0.0,) * len(echoed) if sampling.logprobs else None,
        )
        return {
            "finish_reason": "stop",
            "outputs": (output,) * sampling.n,
            "output_tokens": len(echoed) * sampling.n,
        }

    def _start(self, count: int, *, jump_forward: bool) -> None:
        """Raises RowError for a constraint that cannot be compiled."""
        matchers: list[Matcher | None] = [None] * count
        if self.work.constraint:
            try:
                start = self.context.constraints.start
                matchers = [start(self.work.constraint) for _ in range(count)]
            except ConfigError as error:
                raise RowError("invalid_constraint", str(error)) from error
        self.decodings = [
            Decoding(
                self.work.sampling,
                self.context.tokenizer,
                prompt_ids=self.prompt,
                index=index,
                max_tokens=self.max_tokens,
                matcher=matcher,
                jump_forward=jump_forward,
            )
            for index, matcher in enumerate(matchers)
        ]
