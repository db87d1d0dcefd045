"""What is read off the hidden states of a step's wanted rows, and the numbers that come back."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from glm_batch.models.engine.api.request import PromptScores, TopLogprob
from glm_batch.models.engine.decoding.decoding import Decoding
from glm_batch.models.engine.scheduling.sequence import Sequence
from glm_batch.models.errors import RowError

if TYPE_CHECKING:
    import torch

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
NOTHING: Floats = np.empty(0, np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Rows, int64 [R], each with the token that follows it: its log-probability is wanted, and
    those of the likeliest `top` of `num_ids` ids.
    """

    rows: Ints
    tokens: Ints
    top: int
    num_ids: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Readout:
    """Indices into a step's wanted rows, int64: `sample` give logits to sample from, `head` what
    the checkpoint's head gives, `hidden` themselves; the pairs (pair_rows[i], pair_tokens[i]) give
    one log-probability each.
    """

    sample: Ints
    head: Ints
    hidden: Ints
    pair_rows: Ints
    pair_tokens: Ints
    ranking: Ranking | None


class ReadoutBuilder:
    """Collects what the sequences of a step ask for; each method tells where the numbers will be.

    `decodings` are those that want a token, in the order of the rows to sample from.
    """

    def __init__(self) -> None:
        self.decodings: list[Decoding] = []
        self._sample: list[int] = []
        self._head: list[int] = []
        self._hidden: list[int] = []
        self._pair_rows: list[int] = []
        self._pair_tokens: list[int] = []
        self._ranked: list[int] = []
        self._ranked_tokens: list[int] = []
        self._top = 0

    def sample(self, row: int, decoding: Decoding) -> int:
        """A token: an index into StepOutput.draws."""
        self._sample.append(row)
        self.decodings.append(decoding)
        return len(self._sample) - 1

    def head(self, rows: range) -> slice:
        """All that the checkpoint's head gives: rows of StepOutput.head."""
        return _extend(self._head, rows)

    def hidden(self, rows: range) -> slice:
        """The final hidden states: rows of StepOutput.hidden."""
        return _extend(self._hidden, rows)

    def pairs(self, rows: list[int], tokens: SequenceOf[int]) -> slice:
        """The log-probability of each token after its row: entries of StepOutput.pair_logprobs."""
        self._pair_rows += rows
        return _extend(self._pair_tokens, tokens)

    def rank(self, rows: range, tokens: list[int], top: int) -> slice:
        """Log-probabilities of one token after each row and of the `top` likeliest: see Ranking."""
        self._top = max(self._top, top)
        self._ranked_tokens += tokens
        return _extend(self._ranked, rows)

    def readout(self, num_ids: int) -> Readout:
        """`num_ids`: ids that stand for something; no other is ranked."""
        ranking = None
        if self._ranked:
            ranking = Ranking(
                rows=_array(self._ranked),
                tokens=_array(self._ranked_tokens),
                top=self._top,
                num_ids=num_ids,
            )
        return Readout(
            sample=_array(self._sample),
            head=_array(self._head),
            hidden=_array(self._hidden),
            pair_rows=_array(self._pair_rows),
            pair_tokens=_array(self._pair_tokens),
            ranking=ranking,
        )


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a sequence gets back from a step: final hidden states of the tokens `indices`, or what
    was read off them, which lies at `where`.
    """

    sequence: Sequence
    indices: SequenceOf[int]
    where: Any


@dataclass(frozen=True, slots=True)
class Draw:
    """The token that was drawn for a decoding, or why there is none."""

    token_id: int
    logprob: float | None
    top_logprobs: tuple[TopLogprob, ...] | None
    error: RowError | None


@dataclass(slots=True, kw_only=True)
class StepOutput:
    """What a Readout asked for.

    sample_logits: float32 [rows, vocab_size] on the model's device, of which the engine makes
    `draws`. pair_logprobs: one for each pair. head: [rows, vocab_size or num_labels]. hidden:
    [rows, hidden_size]. scores: of the Ranking.
    """

    sample_logits: torch.Tensor
    pair_logprobs: list[float] = field(default_factory=list)
    head: Floats = field(default_factory=lambda: NOTHING)
    hidden: Floats = field(default_factory=lambda: NOTHING)
    scores: PromptScores | None = None
    draws: list[Draw] = field(default_factory=list)


def _extend(known: list[int], more: SequenceOf[int]) -> slice:
    start = len(known)
    known += more
    return slice(start, len(known))


def _array(values: list[int]) -> Ints:
    return np.array(values, dtype=np.int64)
