"""Choose: the log-probabilities of whole continuations, scored as one tree without decoding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from functools import lru_cache
from typing import Any

import numpy as np

from glm_batch.models.engine.api.request import Choose, Request
from glm_batch.models.engine.scheduling.choice_tree import PROMPT, ChoiceTree
from glm_batch.models.engine.scheduling.placeholders import PlacedMedia
from glm_batch.models.engine.scheduling.sequence import Sequence
from glm_batch.models.engine.works.answer import Answer, Context, EchoPrompt, Fields, ForkMaker
from glm_batch.models.engine.works.readout import ReadoutBuilder, StepOutput, Wanted
from glm_batch.models.errors import RowError

KEPT_TREE_TOKENS = 1024  # a tree may hold a byte for each pair of them


class ChooseAnswer(Answer[Choose]):
    """ids_at: for each node of the tree (PROMPT, too) the ids whose log-probabilities after it are
    wanted.
    """

    head = "causal_lm"

    def __init__(self, request: Request, prompt: list[int], context: Context) -> None:
        super().__init__(request, prompt, context)
        self.end_ids = context.tokenizer.eos_token_ids
        kept = sum(map(len, self.work.choices)) <= KEPT_TREE_TOKENS
        self.tree, self.ids_at = (_kept_tree if kept else _tree)(self.work, self.end_ids)
        self.num_skippable = len(prompt) - 1
        self.num_more = max(self.tree.depths, default=0)
        self.num_held = len(self.tree.tokens)
        self._logprobs: dict[int, dict[int, float]] = {}  # by node and id

    def check(self) -> None:
        vocab_size = self.context.config.vocab_size
        if any(not 0 <= token < vocab_size for _, token in self.tree.edges):
            raise RowError("invalid_token", f"a choice holds ids outside 0 to {vocab_size - 1}")

    def sequences(self, media: PlacedMedia | None) -> list[Sequence]:
        tokens = [*self.prompt, *self.tree.tokens]
        return [self.sequence(media, tokens=tokens, tree=self.tree)]

    def wanted(self, sequence: Sequence, start: int, end: int) -> SequenceOf[int]:
        # PROMPT is -1: its last token
        indices = [sequence.num_prompt + node for node in self.ids_at]
        return [index for index in indices if start <= index < end]

    def read(
        self, sequence: Sequence, indices: SequenceOf[int], rows: range, readout: ReadoutBuilder
    ) -> list[tuple[int, slice]]:
        """(node, where its pairs' log-probabilities will be)."""
        nodes = [index - sequence.num_prompt for index in indices]
        return [
            (node, readout.pairs(row, self.ids_at[node]))
            for node, row in zip(nodes, rows, strict=True)
        ]

    def take(self, want: Wanted, output: StepOutput) -> bool:
        for node, where in want.where:
            found = zip(self.ids_at[node], output.pair_logprobs[where], strict=True)
            self._logprobs[node] = dict(found)
        return not want.sequence.num_owed

    def forks(self, maker: ForkMaker) -> list[Any]:
        """One for each node of the tree; they share the prompt's blocks."""
        return [
            fork
            for node, ids in self.ids_at.items()
            for fork in maker.score(self._path(node), node, ids)
        ]

    def add_scores(self, node: int, logprobs: Mapping[int, float]) -> None:
        self._logprobs.setdefault(node, {}).update(logprobs)

    def fields(self, *, aborted: bool) -> Fields:
        if aborted:
            return {"finish_reason": "abort"}
        edges = {
            edge: self._logprobs[node][token] for edge, (node, token) in enumerate(self.tree.edges)
        }
        ends = {
            node: float(np.logaddexp.reduce([self._logprobs[node][id] for id in self.end_ids]))
            for node in self.tree.ends
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


def _tree(work: Choose, end_ids: tuple[int, ...]) -> tuple[ChoiceTree, dict[int, tuple[int, ...]]]:
    """The tree, and its ids_at: the tokens of a node's edges, then the end ids."""
    tree = ChoiceTree.build(work.choices, count_end=work.count_end)
    ids_at = {}
    for node, edges in tree.edges_at.items():
        tokens = [tree.edges[edge][1] for edge in edges]
        ids_at[node] = tuple(dict.fromkeys([*tokens, *(end_ids if node in tree.ends else ())]))
    return tree, ids_at


# Most jobs' requests all have the same choices: their tree is built once.
_kept_tree = lru_cache(maxsize=256)(_tree)
