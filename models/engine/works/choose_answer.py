"""Choose: the log-probabilities of whole continuations, scored as one tree without decoding."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from glm_batch.models.engine.api.request import Choose, Request
from glm_batch.models.engine.scheduling.placeholders import PlacedMedia
from glm_batch.models.engine.scheduling.sequence import PROMPT, ChoiceTree, Sequence
from glm_batch.models.engine.works.answer import Answer, Context, EchoPrompt, Fields, ForkMaker
from glm_batch.models.engine.works.readout import ReadoutBuilder, StepOutput, Wanted
from glm_batch.models.errors import RowError

KEPT_TREE_TOKENS = 1024  # a tree may hold a byte for each pair of them


class ChooseAnswer(Answer[Choose]):
    """`_logprobs` are those of the pairs of `scored`, as far as they have come back."""

    head = "causal_lm"

    def __init__(self, request: Request, prompt: list[int], context: Context) -> None:
        super().__init__(request, prompt, context)
        kept = sum(map(len, self.work.choices)) <= KEPT_TREE_TOKENS
        build = _kept if kept else ScoredTree.build
        self.scored = build(self.work, context.tokenizer.eos_token_ids)
        self.tree = self.scored.tree
        self.num_skippable = len(prompt) - 1
        self.num_more = max(self.tree.depths, default=0)
        self.num_held = len(self.tree.tokens)
        self._logprobs = [0.0] * len(self.scored.tokens)

    def check(self) -> None:
        vocab_size = self.context.config.vocab_size
        if any(not 0 <= token < vocab_size for _, token in self.tree.edges):
            raise RowError("invalid_token", f"a choice holds ids outside 0 to {vocab_size - 1}")

    def sequences(self, media: PlacedMedia | None) -> list[Sequence]:
        tokens = [*self.prompt, *self.tree.tokens]
        return [self.sequence(media, tokens=tokens, tree=self.tree)]

    def wanted(self, sequence: Sequence, start: int, end: int) -> SequenceOf[int]:
        # PROMPT is -1: its last token
        indices = [sequence.num_prompt + node for node in self.scored.nodes]
        return [index for index in indices if start <= index < end]

    def read(
        self, sequence: Sequence, indices: SequenceOf[int], rows: range, readout: ReadoutBuilder
    ) -> tuple[slice, slice]:
        """(some pairs, where their log-probabilities will be): a chunk's nodes are neighbours."""
        if not indices:
            return slice(0, 0), slice(0, 0)
        scored = self.scored
        first = bisect_left(scored.nodes, indices[0] - sequence.num_prompt)
        pairs = slice(scored.begins[first], scored.begins[first + len(indices)])
        shift = rows.start - first
        pair_rows = [number + shift for number in scored.numbers[pairs]]
        return pairs, readout.pairs(pair_rows, scored.tokens[pairs])

    def take(self, want: Wanted, output: StepOutput) -> bool:
        pairs, where = want.where
        self._logprobs[pairs] = output.pair_logprobs[where]
        return not want.sequence.num_owed

    def forks(self, maker: ForkMaker) -> list[Any]:
        """One for each node of the tree; they share the prompt's blocks."""
        scored = self.scored
        return [
            fork
            for number, node in enumerate(scored.nodes)
            for fork in maker.score(
                self._path(node),
                number,
                scored.tokens[scored.begins[number] : scored.begins[number + 1]],
            )
        ]

    def add_scores(self, number: int, logprobs: Mapping[int, float]) -> None:
        """Of some ids after the node of that number."""
        begin, end = self.scored.begins[number : number + 2]
        for token, logprob in logprobs.items():
            self._logprobs[self.scored.tokens.index(token, begin, end)] = logprob

    def fields(self, *, aborted: bool) -> Fields:
        if aborted:
            return {"finish_reason": "abort"}
        edges = {edge: self._logprobs[pair] for edge, pair in enumerate(self.scored.edge_pairs)}
        ends = {
            node: float(np.logaddexp.reduce([self._logprobs[pair] for pair in pairs]))
            for node, pairs in self.scored.end_pairs.items()
        }
        logprobs = self.tree.label_logprobs(edges, ends)
        return {"finish_reason": "scored", "choice_logprobs": logprobs}

    def _path(self, node: int) -> tuple[int, ...]:
        """The tokens from the prompt to a node, its own the last."""
        tokens: list[int] = []
        while node != PROMPT:
            tokens.append(self.tree.tokens[node])
            node = self.tree.parents[node]
        return tuple(reversed(tokens))

    @staticmethod
    def echo(work: Choose, prompt: EchoPrompt) -> Fields:
        """The sum of the prompt and of its media picks the choice that is favoured."""
        count = len(work.choices)
        rest, picked = 0.1 / max(count - 1, 1), (sum(prompt.ids) + prompt.shift) % count
        logprobs = tuple(math.log(0.8 if i == picked else rest) for i in range(count))
        return {"choice_logprobs": logprobs}


@dataclass(frozen=True, slots=True, eq=False)
class ScoredTree:
    """The pairs of a tree: (node, id whose log-probability after it is wanted), node by node.

    nodes: those that have pairs, ascending, PROMPT the first. tokens: of each pair its id;
    numbers: of each pair the place of its node in `nodes`; the pairs of nodes[i] are
    [begins[i], begins[i + 1]). edge_pairs: the pair of each edge; end_pairs: by node those of the
    end ids.
    """

    tree: ChoiceTree
    nodes: tuple[int, ...]
    begins: tuple[int, ...]
    tokens: tuple[int, ...]
    numbers: tuple[int, ...]
    edge_pairs: tuple[int, ...]
    end_pairs: dict[int, list[int]]

    @classmethod
    def build(cls, work: Choose, end_ids: tuple[int, ...]) -> ScoredTree:
        tree = ChoiceTree.build(work.choices, count_end=work.count_end)
        pairs: dict[tuple[int, int], int] = {}
        begins, numbers = [0], list[int]()
        for number, (node, edges) in enumerate(tree.edges_at.items()):
            tokens = [tree.edges[edge][1] for edge in edges]
            for token in [*tokens, *(end_ids if node in tree.ends else ())]:
                pairs.setdefault((node, token), len(pairs))
            numbers += [number] * (len(pairs) - begins[-1])
            begins.append(len(pairs))
        return cls(
            tree=tree,
            nodes=tuple(tree.edges_at),
            begins=tuple(begins),
            tokens=tuple(token for _, token in pairs),
            numbers=tuple(numbers),
            edge_pairs=tuple(pairs[edge] for edge in tree.edges),
            end_pairs={node: [pairs[node, id] for id in end_ids] for node in tree.ends},
        )


# Most jobs' requests all have the same choices: their tree is built once.
_kept = lru_cache(maxsize=256)(ScoredTree.build)
