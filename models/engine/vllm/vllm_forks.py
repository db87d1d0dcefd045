"""A fork: one prompt that vLLM runs for a request, and how its output is read.

There are four ways to ask vLLM, which the kinds of work in models.engine.works choose from: draw a
sample, score ids at one position, score the prompt itself, pool rows of numbers. Text and ends come
from Decoding, so that they mean the same with every engine.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
from vllm import PoolingParams
from vllm import SamplingParams as VllmSampling
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from glm_batch.models.engine.api.request import Constraint, Generate, PromptScores, TopLogprob
from glm_batch.models.engine.decoding.constraints import JSON_WHITESPACE
from glm_batch.models.engine.execution.sampler import noise_key
from glm_batch.models.engine.vllm.vllm_core import Runner
from glm_batch.models.engine.vllm.vllm_limits import generate_problem
from glm_batch.models.engine.works.admission import check_length
from glm_batch.models.errors import RowError
from glm_batch.models.processing.tokenizer import Tokenizer

SCORED_IDS = 128  # vLLM scores no more ids of one position
Asks = Literal["given", "likeliest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The model scores `num_ids` ids, of which those from `num_tokens` on stand for nothing."""

    num_ids: int
    num_tokens: int
    eos_token_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer, num_ids: int) -> Vocabulary:
        num_tokens = min(tokenizer.vocab_size, num_ids)
        return cls(num_ids=num_ids, num_tokens=num_tokens, eos_token_ids=tokenizer.eos_token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork(ABC):
    """The request's own tokens, or the first `num_tokens` of them, then `suffix`.

    asks: which log-probabilities it wants.
    """

    runner: ClassVar[Runner] = "generate"

    params: Any
    suffix: tuple[int, ...] = ()
    num_tokens: int | None = None
    asks: Asks | None = None

    @abstractmethod
    def read(self, output: Any, answer: Any) -> bool:
        """Hands an output of vLLM to the answer; True when it was the last. Raises RowError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleFork(Fork):
    """One sample, for a GenerateAnswer's decodings[index]; alternatives are ids below `num_ids`."""

    index: int
    num_ids: int

    def read(self, output: Any, answer: Any) -> bool:
        (sample,) = output.outputs
        decoding = answer.decodings[self.index]
        logprobs = iter(sample.logprobs) if sample.logprobs is not None else None
        for token_id in sample.token_ids:
            if decoding.finish_reason:
                break
            own = top = None
            if logprobs is not None:
                found = next(logprobs)
                own = float(found[token_id].logprob)
                top = self._top(found, decoding.params.logprobs)
            decoding.add(token_id, own, top)
        if output.finished and decoding.finish_reason is None:
            raise RowError(
                "generation_failed",
                f"vLLM ended the answer early, for the reason {sample.finish_reason!r}",
            )
        answer.tell(self.index)
        return decoding.finish_reason is not None

    def _top(self, logprobs: Mapping[int, Any], count: int) -> tuple[TopLogprob, ...]:
        known = sorted(
            (-float(entry.logprob), id) for id, entry in logprobs.items() if id < self.num_ids
        )
        return tuple(TopLogprob(token_id=id, logprob=-value) for value, id in known[:count])


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreFork(Fork):
    """The log-probabilities of `ids` after prompt and suffix, which the answer knows as `key`."""

    key: int
    ids: tuple[int, ...]

    def read(self, output: Any, answer: Any) -> bool:
        (sample,) = output.outputs
        if not sample.logprobs:
            raise RowError(
                "generation_failed", f"vLLM scored nothing, for the reason {sample.finish_reason!r}"
            )
        found = sample.logprobs[0]
        answer.add_scores(self.key, {id: float(found[id].logprob) for id in self.ids})
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFork(Fork):
    """The log-probabilities of the prompt's own tokens from `start` on, and of the likeliest `top`.

    Alternatives are ids below `num_ids`.
    """

    start: int
    top: int
    num_ids: int

    def read(self, output: Any, answer: Any) -> bool:
        found = output.prompt_logprobs
        if not found:
            raise RowError("generation_failed", "vLLM scored nothing")
        pairs = list(zip(output.prompt_token_ids, found, strict=True))[self.start :]
        likeliest = [
            sorted((-float(e.logprob), id) for id, e in entries.items() if id < self.num_ids)
            for _, entries in pairs
        ]
        best = np.array([each[: self.top] for each in likeliest], np.float64)
        best = best.reshape(len(pairs), self.top, 2)
        answer.add_piece(
            PromptScores(
                logprobs=np.array(
                    [float(entries[id].logprob) for id, entries in pairs], np.float32
                ),
                top_ids=best[..., 1].astype(np.int64),
                top_logprobs=(-best[..., 0]).astype(np.float32),
            )
        )
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolFork(Fork):
    """A row of numbers for the prompt, or one for each of its tokens."""

    runner: ClassVar[Runner] = "pooling"

    def read(self, output: Any, answer: Any) -> bool:
        answer.add_rows(np.atleast_2d(output.outputs.data.float().numpy()))
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestForks:
    """Makes the forks of one request: models.engine.works.answer.ForkMaker.

    `max_scored` bounds prompt and suffix of what is scored.
    """

    vocabulary: Vocabulary
    num_prompt: int
    max_scored: int

    def sample(self, work: Generate, index: int, max_tokens: int, *, stream: bool) -> Fork:
        """Raises RowError for sampling parameters that vLLM has not."""
        if problem := generate_problem(work):
            raise RowError("unsupported_sampling", problem)
        vocabulary, params = self.vocabulary, work.sampling
        ends = () if params.ignore_eos else vocabulary.eos_token_ids
        stop_ids = [
            id
            for id in dict.fromkeys((*ends, *params.stop_token_ids))
            if 0 <= id < vocabulary.num_ids
        ]
        unused = vocabulary.num_ids - vocabulary.num_tokens
        greedy = params.is_greedy
        sampling = VllmSampling(
            temperature=0.0 if greedy else params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            seed=None if greedy else noise_key(params.seed, index, 0) & ((1 << 63) - 1),
            max_tokens=max_tokens,
            min_tokens=min(params.min_tokens, max_tokens),
            stop_token_ids=stop_ids,
            ignore_eos=True,  # the end ids are among the stop ids
            logprobs=min(params.logprobs + unused, vocabulary.num_ids) if params.logprobs else None,
            logit_bias=_bans(vocabulary),
            structured_outputs=_structure(work.constraint) if work.constraint else None,
            detokenize=False,
        )
        # Whoever looks for stop strings needs the tokens as they come, too.
        streams = stream or bool(params.stop)
        sampling.output_kind = RequestOutputKind.DELTA if streams else RequestOutputKind.FINAL_ONLY
        return SampleFork(
            params=sampling,
            asks="likeliest" if params.logprobs else None,
            index=index,
            num_ids=vocabulary.num_tokens,
        )

    def score(self, suffix: tuple[int, ...], key: int, ids: SequenceOf[int]) -> list[Fork]:
        """Raises RowError where vLLM has no room for the token that it draws after it."""
        check_length(self.num_prompt, len(suffix), self.max_scored)
        pieces = [
            tuple(ids[start : start + SCORED_IDS]) for start in range(0, len(ids), SCORED_IDS)
        ]
        return [
            ScoreFork(params=_scoring(some), suffix=suffix, asks="given", key=key, ids=some)
            for some in pieces
        ]

    def prompt(self, start: int, top: int) -> Fork:
        """Raises RowError where vLLM has no room for the token that it draws after it."""
        check_length(self.num_prompt, 0, self.max_scored)
        vocabulary = self.vocabulary
        unused = vocabulary.num_ids - vocabulary.num_tokens
        params = VllmSampling(
            temperature=0.0,
            max_tokens=1,
            prompt_logprobs=min(top + unused, vocabulary.num_ids) if top else 0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        return PromptFork(params=params, start=start, top=top, num_ids=vocabulary.num_tokens)

    def pool(self, task: str, num_tokens: int | None = None) -> Fork:
        """vLLM's activation functions are left out."""
        params = PoolingParams(task=task, use_activation=False)
        return PoolFork(params=params, num_tokens=num_tokens)


@lru_cache(maxsize=1024)
def _scoring(ids: tuple[int, ...]) -> VllmSampling:
    """Log-probabilities of some ids at the next position; the token drawn there is dropped."""
    return VllmSampling(
        temperature=0.0,
        max_tokens=1,
        logprob_token_ids=list(ids),
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _structure(constraint: Constraint) -> StructuredOutputsParams:
    """The constraint, with blanks between JSON tokens as TorchEngine allows them."""
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
