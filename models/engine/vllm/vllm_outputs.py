"""What vLLM gives back, as the numbers and texts of a Completion.

Owns the reading of vLLM's outputs. Text and ends come from this project's Decoding, so that they
mean the same with every engine. Knows nothing of requests in flight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm_batch.models.engine.api.request import Embed, TopLogprob, Work
from glm_batch.models.engine.decoding.constraints import Matcher
from glm_batch.models.engine.decoding.decoding import Decoding
from glm_batch.models.engine.scheduling.choice_tree import ChoiceTree
from glm_batch.models.engine.vllm.vllm_requests import Fork
from glm_batch.models.errors import RowError

Scores = dict[int, dict[int, float]]  # node of the label tree -> id -> log-probability after it


class Transcript:
    """One sample, told from its tokens. `decoding.finish_reason` is set once it has ended."""

    def __init__(self, decoding: Decoding, matcher: Matcher | None) -> None:
        self.decoding = decoding
        self._matcher = matcher  # not the decoding's own: that would add what the constraint forces

    def add(
        self,
        token_ids: Iterable[int],
        positions: Iterable[Mapping[int, Any]] | None,
        num_tokens: int,
    ) -> None:
        """Takes tokens and vLLM's log-probabilities of each position; what comes after the end is
        left out.

        Alternatives are ids below `num_tokens`. Raises RowError where a constraint cannot be
        followed.
        """
        found = iter(positions) if positions is not None else None
        for token_id in token_ids:
            if self.decoding.finish_reason:
                return
            logprobs = next(found) if found is not None else None
            own = None if logprobs is None else float(logprobs[token_id].logprob)
            top = (
                None
                if logprobs is None
                else _top(logprobs, num_tokens, self.decoding.params.logprobs)
            )
            self.decoding.add(token_id, own, top)
            if self._matcher is not None and not self.decoding.finish_reason:
                self._matcher.accept(token_id)
                if self._matcher.is_done:
                    self.decoding.finish_reason = "stop"

    def finish(self, reason: str) -> None:
        """vLLM draws no more. Raises RowError where that was not the end."""
        if self.decoding.finish_reason is None:
            raise RowError(
                "generation_failed", f"vLLM ended the answer early, for the reason {reason!r}"
            )


def _top(logprobs: Mapping[int, Any], num_tokens: int, count: int) -> tuple[TopLogprob, ...]:
    known = sorted((-float(entry.logprob), id) for id, entry in logprobs.items() if id < num_tokens)
    return tuple(TopLogprob(token_id=id, logprob=-value) for value, id in known[:count])


def read_scores(output: Any, fork: Fork) -> dict[int, float]:
    """The log-probabilities of a fork's ids. Raises RowError when vLLM gave none."""
    if not output.logprobs:
        raise RowError(
            "generation_failed", f"vLLM scored nothing, for the reason {output.finish_reason!r}"
        )
    found = output.logprobs[0]
    return {id: float(found[id].logprob) for id in fork.ids}


def label_logprobs(
    tree: ChoiceTree, scores: Scores, eos_token_ids: tuple[int, ...]
) -> tuple[float, ...]:
    """The joint log-probability of each label."""
    edges = {index: scores[node][token] for index, (node, token) in enumerate(tree.edges)}
    ends = {
        node: float(np.logaddexp.reduce([scores[node][id] for id in eos_token_ids]))
        for node in tree.ends
    }
    return tree.label_logprobs(edges, ends)


def read_array(output: Any, work: Work) -> NDArray[np.float32]:
    """A pooling output as Completion.array."""
    rows: NDArray[np.float32] = output.data.float().numpy()
    if not isinstance(work, Embed):
        return rows
    vector = (
        rows.astype(np.float64) if work.pooling == "last" else rows.mean(axis=0, dtype=np.float64)
    )
    length = max(float(np.linalg.norm(vector)), 1e-12) if work.normalize else 1.0
    return (vector / length).astype(np.float32)
