"""ChoiceTree: label continuations as a tree of tokens, so that what labels share is computed once.

Node i is a token that follows its parent (-1: the prompt itself). A label's probability is a
product of edges, and each edge is one (position, token) pair to be scored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

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
