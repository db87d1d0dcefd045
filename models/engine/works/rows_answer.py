"""Classify, Tag, Embed, Inspect: numbers read straight off the rows of some prompt tokens."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from glm_batch.models.engine.api.request import Classify, Embed, Inspect, Request, Tag
from glm_batch.models.engine.scheduling.sequence import Sequence
from glm_batch.models.engine.works.answer import Answer, Context, EchoPrompt, Fields, ForkMaker, W
from glm_batch.models.engine.works.readout import Floats, ReadoutBuilder, StepOutput, Wanted
from glm_batch.models.errors import RowError


class RowsAnswer(Answer[W]):
    """`source` is what the rows are of: all tokens, or `only_token` alone."""

    source: Literal["head", "hidden"] = "hidden"
    only_token: int | None = None

    def __init__(self, request: Request, prompt: list[int], context: Context) -> None:
        super().__init__(request, prompt, context)
        self._pieces: list[Floats] = []

    def wanted(self, sequence: Sequence, start: int, end: int) -> SequenceOf[int]:
        if self.only_token is None:
            return range(start, end)
        return [self.only_token] if start <= self.only_token < end else []

    def read(
        self, sequence: Sequence, indices: SequenceOf[int], rows: range, readout: ReadoutBuilder
    ) -> slice:
        return readout.head(rows) if self.source == "head" else readout.hidden(rows)

    def take(self, want: Wanted, output: StepOutput) -> bool:
        if want.indices:
            if want.indices[0] == 0:
                self._pieces.clear()
            self.add_rows((output.head if self.source == "head" else output.hidden)[want.where])
        return not want.sequence.num_owed

    def add_rows(self, rows: Floats) -> None:
        self._pieces.append(rows)

    def fields(self, *, aborted: bool) -> Fields:
        if aborted:
            return {"finish_reason": "abort"}
        return {"finish_reason": "scored", "array": self.array(np.concatenate(self._pieces))}

    def array(self, rows: Floats) -> Floats:
        """Completion.array of all rows."""
        return rows


class ClassifyAnswer(RowsAnswer[Classify]):
    """The class logits at the rightmost token that is no padding."""

    head = "sequence_classification"
    source = "head"

    def __init__(self, request: Request, prompt: list[int], context: Context) -> None:
        super().__init__(request, prompt, context)
        index, pad = len(prompt) - 1, context.config.pad_token_id
        while index > 0 and prompt[index] == pad:
            index -= 1
        self.only_token = self.num_skippable = index  # the first one where all are padding

    def forks(self, maker: ForkMaker) -> list[Any]:
        # vLLM pools the last token; what follows a token never changes it.
        return [maker.pool("classify", self.num_skippable + 1)]

    def array(self, rows: Floats) -> Floats:
        pooled: Floats = rows[0]
        return pooled

    @staticmethod
    def echo(work: Classify, prompt: EchoPrompt) -> Fields:
        return {"array": prompt.vector(prompt.num_labels)}


class TagAnswer(RowsAnswer[Tag]):
    """The class logits at every token."""

    head = "token_classification"
    source = "head"

    def forks(self, maker: ForkMaker) -> list[Any]:
        return [maker.pool("token_classify")]

    @staticmethod
    def echo(work: Tag, prompt: EchoPrompt) -> Fields:
        return {"array": prompt.vectors(prompt.num_labels)}


class EmbedAnswer(RowsAnswer[Embed]):
    """The last hidden state, or the mean of all."""

    def __init__(self, request: Request, prompt: list[int], context: Context) -> None:
        super().__init__(request, prompt, context)
        if self.work.pooling == "last":
            self.only_token = self.num_skippable = len(prompt) - 1

    def forks(self, maker: ForkMaker) -> list[Any]:
        _check_vectors(self)
        return [maker.pool("embed" if self.work.pooling == "last" else "token_embed")]

    def array(self, rows: Floats) -> Floats:
        vector: NDArray[np.float64] = (
            rows[-1].astype(np.float64)
            if self.work.pooling == "last"
            else rows.mean(axis=0, dtype=np.float64)
        )
        length = max(float(np.linalg.norm(vector)), 1e-12) if self.work.normalize else 1.0
        return (vector / length).astype(np.float32)

    @staticmethod
    def echo(work: Embed, prompt: EchoPrompt) -> Fields:
        return {"array": prompt.vector(prompt.hidden_size)}


class InspectAnswer(RowsAnswer[Inspect]):
    """Vocabulary logits or hidden states at every token."""

    def __init__(self, request: Request, prompt: list[int], context: Context) -> None:
        super().__init__(request, prompt, context)
        if self.work.what == "logits":
            self.head, self.source = "causal_lm", "head"

    def forks(self, maker: ForkMaker) -> list[Any]:
        if self.work.what == "logits":
            raise RowError(
                "unsupported_work",
                "vLLM does not give the logits of a prompt; use engine.kind torch",
            )
        _check_vectors(self)
        return [maker.pool("token_embed")]

    @staticmethod
    def echo(work: Inspect, prompt: EchoPrompt) -> Fields:
        return {"array": prompt.vectors(prompt.hidden_size)}


def _check_vectors(answer: RowsAnswer[Any]) -> None:
    config = answer.context.config
    if config.head != "causal_lm":
        raise RowError(
            "unsupported_work",
            f"vLLM gives no vectors of a {config.architecture}; use engine.kind torch",
        )
