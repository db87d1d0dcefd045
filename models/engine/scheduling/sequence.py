"""Sequence: one run of tokens, how far it is computed and which blocks it holds.

A request has `n` of them when it samples n outputs.
"""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from glm_batch.models.engine.api.request import Priority, Request
from glm_batch.models.engine.scheduling.block_manager import ROOT
from glm_batch.models.engine.scheduling.choice_tree import ChoiceTree
from glm_batch.models.engine.scheduling.placeholders import PlacedMedia


class Asker(Protocol):
    """The answer that a sequence is computed for: see models.engine.works.answer.Answer."""

    num_skippable: int

    def wanted(self, sequence: Sequence, start: int, end: int) -> SequenceOf[int]: ...

    def read(
        self, sequence: Sequence, indices: SequenceOf[int], rows: range, readout: Any
    ) -> Any: ...


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """`tokens` are the prompt's, then the choice tree's nodes or the sampled tokens.

    [0, num_computed) have their keys and values in the cache; the rest is owed. `block_table[i]`
    holds tokens [i * block_size, (i + 1) * block_size). The first `num_registered` blocks are in
    the prefix index, the last of them under the number `contents`.
    """

    request: Request
    answer: Asker
    sample_index: int = 0
    tokens: list[int]
    num_prompt: int
    tree: ChoiceTree | None = None
    media: PlacedMedia | None = None
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    num_registered: int = 0
    contents: int = ROOT
    cached_tokens: int = 0
    num_preemptions: int = 0

    @property
    def priority(self) -> Priority:
        return self.request.priority

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_owed(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def is_prefilling(self) -> bool:
        """True until every token known at submission is computed."""
        return self.num_computed < self.num_prompt + (len(self.tree.tokens) if self.tree else 0)

    @property
    def num_shareable(self) -> int:
        """Leading tokens that others may reuse: the tree's nodes are no continuous text."""
        return self.num_prompt if self.tree else len(self.tokens)

    @property
    def prompt_keys(self) -> SequenceOf[Hashable]:
        """What identifies each token of the prompt; what follows the prompt may come after it."""
        return self.media.keys if self.media else self.tokens

    def keys(self, start: int, end: int) -> SequenceOf[Hashable]:
        """What identifies tokens [start, end) to the prefix index: their ids, or their features."""
        if self.media is None or start >= self.num_prompt:
            return self.tokens[start:end]
        return [*self.media.keys[start:end], *self.tokens[self.num_prompt : end]]

    def positions(self, start: int, end: int) -> NDArray[np.int64]:
        """Rotary positions of tokens [start, end): [tokens], or [3, tokens] of media."""
        if self.media is None:
            return self._text_positions(start, end)
        following = self._text_positions(max(start, self.num_prompt), end) + self.media.rope_delta
        if start >= self.num_prompt:
            return following
        prompt = self.media.positions[:, start : min(end, self.num_prompt)]
        return np.concatenate((prompt, np.broadcast_to(following, (3, len(following)))), axis=1)

    def _text_positions(self, start: int, end: int) -> NDArray[np.int64]:
        """Where tokens stand without media: a tree's node where its depth puts it."""
        positions = np.arange(start, end, dtype=np.int64)
        if self.tree and end > self.num_prompt:
            first = max(start, self.num_prompt)
            depths = self.tree.depths[first - self.num_prompt : end - self.num_prompt]
            positions[first - start :] = self.num_prompt - 1 + np.array(depths, dtype=np.int64)
        return positions
