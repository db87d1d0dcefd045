"""Score: the log-probability of each prompt token, and of the likeliest in its place."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np

from glm_batch.models.engine.api.request import PromptScores, Request, Score
from glm_batch.models.engine.scheduling.sequence import Sequence
from glm_batch.models.engine.works.answer import Answer, Context, EchoPrompt, Fields, ForkMaker
from glm_batch.models.engine.works.readout import ReadoutBuilder, StepOutput, Wanted


class ScoreAnswer(Answer[Score]):
    head = "causal_lm"

    def __init__(self, request: Request, prompt: list[int], context: Context) -> None:
        super().__init__(request, prompt, context)
        self.num_skippable = max(min(self.work.start, len(prompt)) - 1, 0)
        self._pieces: list[PromptScores] = []

    def wanted(self, sequence: Sequence, start: int, end: int) -> SequenceOf[int]:
        first = max(start, self.work.start - 1)
        return range(first, min(end, len(self.prompt) - 1))  # nothing comes after the last

    def read(
        self, sequence: Sequence, indices: SequenceOf[int], rows: range, readout: ReadoutBuilder
    ) -> slice:
        tokens = [self.prompt[index + 1] for index in indices]
        return readout.rank(rows, tokens, self.work.top)

    def take(self, want: Wanted, output: StepOutput) -> bool:
        if want.indices:
            if want.indices[0] == self.work.start - 1:
                self._pieces.clear()
            found, where, top = output.scores, want.where, self.work.top
            assert found is not None
            self.add_piece(
                PromptScores(
                    logprobs=found.logprobs[where],
                    top_ids=found.top_ids[where, :top],
                    top_logprobs=found.top_logprobs[where, :top],
                )
            )
        return not want.sequence.num_owed

    def forks(self, maker: ForkMaker) -> list[Any]:
        return [maker.prompt(self.work.start, self.work.top)]

    def add_piece(self, piece: PromptScores) -> None:
        self._pieces.append(piece)

    def fields(self, *, aborted: bool) -> Fields:
        if aborted:
            return {"finish_reason": "abort"}
        return {"finish_reason": "scored", "scores": _joined(self._pieces)}

    @staticmethod
    def echo(work: Score, prompt: EchoPrompt) -> Fields:
        """Every prompt token is the likeliest."""
        scored = prompt.ids[work.start :]
        logprobs = np.full(len(scored), -1.0 - prompt.shift % 97 / 97, np.float32)
        ranks = np.arange(work.top)
        scores = PromptScores(
            logprobs=logprobs,
            top_ids=np.array(scored, np.int64)[:, None] + ranks,
            top_logprobs=logprobs[:, None] - ranks.astype(np.float32),
        )
        return {"scores": scores}


def _joined(pieces: list[PromptScores]) -> PromptScores:
    """Of a prompt's chunks; none where it has but one token."""
    if not pieces:
        nothing = np.empty((0, 0), np.float32)
        return PromptScores(
            logprobs=nothing.ravel(), top_ids=nothing.astype(np.int64), top_logprobs=nothing
        )
    return PromptScores(
        logprobs=np.concatenate([piece.logprobs for piece in pieces]),
        top_ids=np.concatenate([piece.top_ids for piece in pieces]),
        top_logprobs=np.concatenate([piece.top_logprobs for piece in pieces]),
    )
