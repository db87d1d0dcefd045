"""Sequence: one run of tokens, how far it is computed and which blocks it holds.

ChoiceTree holds the tokens that labels share, so that these are computed once.
A request has `n` sequences when it samples n outputs.
"""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from glm_batch.models.engine.api.request import Priority, Request
from glm_batch.models.engine.scheduling.block_manager import ROOT
from glm_batch.models.engine.scheduling.placeholders import PlacedMedia

PROMPT = -1  # the parent of the first tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class ChoiceTree:
    """Only tokens after which something is scored become nodes: a label's last token does so only
    if its end counts.

    tokens, parents, depths: one entry a node, parents before children; depth 1 follows the prompt.
    edges: every (node or PROMPT, token) that some label passes; ends: nodes after which the end is
    scored. paths: for each label the indices of its edges; label_ends: for each label its node in
    `ends`, or None.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    depths: tuple[int, ...]
    edges: tuple[tuple[int, int], ...]
    ends: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]
    label_ends: tuple[int | None, ...]

    @classmethod
    def build(cls, choices: tuple[tuple[int, ...], ...], *, count_end: bool) -> ChoiceTree:
        """Merges the choices' common beginnings."""
        nodes: dict[tuple[int, ...], int] = {}  # tokens so far -> node
        parents: list[int] = []
        edges: dict[tuple[int, int], int] = {}
        paths = []
        label_ends: list[int | None] = []
        for choice in choices:
            node, path = PROMPT, []
            for depth, token in enumerate(choice, start=1):
                path.append(edges.setdefault((node, token), len(edges)))
                if depth == len(choice) and not count_end:
                    break
                before, node = node, nodes.setdefault(choice[:depth], len(nodes))
                if node == len(parents):
                    parents.append(before)
            paths.append(tuple(path))
            label_ends.append(node if count_end else None)
        return cls(
            tokens=tuple(prefix[-1] for prefix in nodes),
            parents=tuple(parents),
            depths=tuple(len(prefix) for prefix in nodes),
            edges=tuple(edges),
            ends=tuple(sorted({end for end in label_ends if end is not None})),
            paths=tuple(paths),
            label_ends=tuple(label_ends),
        )

    @cached_property
    def edges_at(self) -> dict[int, tuple[int, ...]]:
        """The indices of the edges that leave each node; none where an end alone is scored."""
        found: dict[int, list[int]] = {end: [] for end in self.ends}
        for index, (node, _) in enumerate(self.edges):
            found.setdefault(node, []).append(index)
        return {node: tuple(indices) for node, indices in sorted(found.items())}

    @cached_property
    def ancestors(self) -> NDArray[np.bool_]:
        """[nodes, nodes]: row i is True at i and at every node on the way from the prompt to i."""
        seen = np.eye(len(self.tokens), dtype=np.bool_)
        for node, parent in enumerate(self.parents):
            if parent != PROMPT:
                seen[node] |= seen[parent]
        return seen

    def label_logprobs(
        self, edge_logprobs: dict[int, float], end_logprobs: dict[int, float]
    ) -> tuple[float, ...]:
        """Joint log-probability of each label from those of its edges and its end."""
        return tuple(
            sum(edge_logprobs[edge] for edge in path) + (0.0 if end is None else end_logprobs[end])
            for path, end in zip(self.paths, self.label_ends, strict=True)
        )


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
