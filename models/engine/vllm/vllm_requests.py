"""A request as the prompts that vLLM is given for it.

Owns what each kind of work becomes in vLLM: parameters, forks for the samples and the label tree,
pooling tasks. Knows nothing of running engines and of what comes back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from vllm import PoolingParams
from vllm import SamplingParams as VllmSampling
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from glm_batch.models.engine.api.request import (
    Choose,
    Classify,
    Constraint,
    Embed,
    Generate,
    SamplingParams,
    Work,
)
from glm_batch.models.engine.decoding.constraints import JSON_WHITESPACE
from glm_batch.models.engine.execution.sampler import noise_key
from glm_batch.models.engine.scheduling.choice_tree import PROMPT, ChoiceTree
from glm_batch.models.engine.torch_engine import choice_tree
from glm_batch.models.processing.tokenizer import Tokenizer

SCORED_IDS = 128  # vLLM scores no more ids of one position


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """One prompt for vLLM: the request's own tokens, then `suffix`. `node` is the place in the
    label tree.
    """

    params: Any
    suffix: tuple[int, ...] = ()
    node: int = PROMPT
    ids: tuple[int, ...] = ()  # scored after it


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Which ids there are: the model scores `num_ids`, of which those from `num_tokens` on stand
    for nothing.
    """

    num_ids: int
    num_tokens: int
    eos_token_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer, num_ids: int) -> Vocabulary:
        num_tokens = min(tokenizer.vocab_size, num_ids)
        return cls(num_ids=num_ids, num_tokens=num_tokens, eos_token_ids=tokenizer.eos_token_ids)


def choice_forks(work: Choose, vocabulary: Vocabulary) -> Iterator[Fork]:
    """One fork for each node of the label tree after which something is scored; they share the
    prompt's blocks.
    """
    tree = choice_tree(work)
    for node, ids in scored_ids(tree, vocabulary.eos_token_ids):
        for start in range(0, len(ids), SCORED_IDS):
            some = ids[start : start + SCORED_IDS]
            yield Fork(params=_scoring(some), suffix=_path(tree, node), node=node, ids=some)


def scored_ids(
    tree: ChoiceTree, eos_token_ids: tuple[int, ...]
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(node, ids whose log-probability after it is wanted): the tokens of its edges, then the end
    ids.
    """
    for node, edges in tree.edges_at.items():
        tokens = [tree.edges[edge][1] for edge in edges]
        yield node, tuple(dict.fromkeys([*tokens, *(eos_token_ids if node in tree.ends else ())]))


def sample_forks(
    work: Generate, vocabulary: Vocabulary, max_tokens: int, *, stream: bool
) -> Iterator[Fork]:
    """One fork for each sample; greedy samples are all the same one. With `stream` tokens come as
    they are drawn.
    """
    params = work.sampling
    # Whoever looks for stop strings needs them as they come, too.
    output = RequestOutputKind.DELTA if stream or params.stop else RequestOutputKind.FINAL_ONLY
    for index in range(1 if params.is_greedy else params.n):
        drawn = _sampling(params, work.constraint, vocabulary, max_tokens, index)
        drawn.output_kind = output
        yield Fork(params=drawn)


def pooling_fork(work: Work) -> Fork:
    """For Classify, Tag, Embed, and Inspect of hidden states; vLLM's activation functions are left
    out.
    """
    match work:
        case Classify():
            task = "classify"
        case Embed(pooling="last"):
            task = "embed"
        case _:
            task = "token_embed" if _wants_hidden(work) else "token_classify"
    return Fork(params=PoolingParams(task=task, use_activation=False))


def _wants_hidden(work: Work) -> bool:
    return isinstance(work, Embed) or getattr(work, "what", None) == "hidden_states"


@lru_cache(maxsize=1024)
def _scoring(ids: tuple[int, ...]) -> VllmSampling:
    """The log-probabilities of some ids at the next position; the token that is drawn there is of
    no interest.
    """
    return VllmSampling(
        temperature=0.0,
        max_tokens=1,
        logprob_token_ids=list(ids),
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _sampling(
    params: SamplingParams,
    constraint: Constraint | None,
    vocabulary: Vocabulary,
    max_tokens: int,
    index: int,
) -> VllmSampling:
    """vLLM only draws: text, stop strings and the reason for the end are told from the tokens by
    Decoding.
    """
    ends = () if params.ignore_eos else vocabulary.eos_token_ids
    stop_ids = [
        id for id in dict.fromkeys((*ends, *params.stop_token_ids)) if 0 <= id < vocabulary.num_ids
    ]
    unused = vocabulary.num_ids - vocabulary.num_tokens
    return VllmSampling(
        temperature=0.0 if params.is_greedy else params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=None if params.is_greedy else noise_key(params.seed, index, 0) & ((1 << 63) - 1),
        max_tokens=max_tokens,
        min_tokens=min(params.min_tokens, max_tokens),
        stop_token_ids=stop_ids,
        ignore_eos=True,  # the end ids are among the stop ids
        logprobs=min(params.logprobs + unused, vocabulary.num_ids) if params.logprobs else None,
        logit_bias=_bans(vocabulary),
        structured_outputs=_structure(constraint) if constraint else None,
        detokenize=False,
    )


def _structure(constraint: Constraint) -> StructuredOutputsParams:
    """The constraint, with blanks between JSON tokens as models.engine.decoding.constraints allows
    them.
    """
    if constraint.kind == "regex":
        return StructuredOutputsParams(regex=constraint.text)
    schema = json.loads(constraint.text)
    return StructuredOutputsParams(
        json=schema | {"x-guidance": {"whitespace_pattern": JSON_WHITESPACE}}
    )


@lru_cache(maxsize=8)
def _bans(vocabulary: Vocabulary) -> dict[int, float] | None:
    """No id beyond the tokenizer's may be drawn, although the model has logits for it."""
    return dict.fromkeys(range(vocabulary.num_tokens, vocabulary.num_ids), -math.inf) or None


def _path(tree: ChoiceTree, node: int) -> tuple[int, ...]:
    tokens: list[int] = []
    while node != PROMPT:
        tokens.append(tree.tokens[node])
        node = tree.parents[node]
    return tuple(reversed(tokens))
