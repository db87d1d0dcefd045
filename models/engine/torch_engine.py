"""TorchEngine: requests in, completions out, around a scheduler and a runner.

A step is: schedule -> pack -> run -> draw tokens -> hand the numbers to the answers they belong to.
A step that does not fit into memory is taken back and tried again with fewer tokens.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from glm_batch.models import rooms
from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.engine.api.interface import EngineConfig
from glm_batch.models.engine.api.request import Completion, Delta, Request, refuse_known_ids
from glm_batch.models.engine.decoding.decoding import Decoding
from glm_batch.models.engine.execution.batch import Step, build_step
from glm_batch.models.engine.execution.ranks import build_runner, lead
from glm_batch.models.engine.execution.runner import Runner
from glm_batch.models.engine.execution.sampler import SampleRow, sample
from glm_batch.models.engine.execution.settings import UNPROVEN_STEPS, Limits, resolve_end_ids
from glm_batch.models.engine.scheduling.block_manager import BlockManager
from glm_batch.models.engine.scheduling.scheduler import (
    Chunk,
    Scheduler,
    StepSize,
    is_out_of_memory,
)
from glm_batch.models.engine.scheduling.sequence import Sequence
from glm_batch.models.engine.works.admission import check, failed, place_media
from glm_batch.models.engine.works.all_answers import answer_to
from glm_batch.models.engine.works.answer import Answer, Context
from glm_batch.models.engine.works.readout import Draw, StepOutput, Wanted
from glm_batch.models.errors import ConfigError, RowError
from glm_batch.models.network.layers.parallel import TorchGroup
from glm_batch.models.processing.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class _Pending:
    """A request in flight: its answer, all its sequences, and those that are not finished."""

    answer: Answer[Any]
    sequences: list[Sequence]
    unfinished: set[Sequence]


class TorchEngine:
    """This project's engine, built by `from_checkpoint`; each request ends in one Completion."""

    def __init__(self, runner: Runner, tokenizer: Tokenizer, limits: Limits) -> None:
        self.config: ModelConfig = runner.config
        self.tokenizer = tokenizer
        self.limits = limits
        self._runner = runner
        self._context = Context(runner.config, tokenizer, limits.max_model_len)
        blocks = BlockManager(
            limits.num_blocks,
            limits.block_size,
            prefix_caching=limits.prefix_caching,
            max_unproven=UNPROVEN_STEPS * limits.max_step_tokens // limits.block_size,
        )
        self.scheduler = Scheduler(
            blocks,
            max_step_tokens=limits.max_step_tokens,
            max_num_seqs=limits.max_num_seqs,
            batch_step_tokens=limits.batch_step_tokens,
        )
        self._step_size = StepSize(limits.max_step_tokens)
        self._pending: dict[str, _Pending] = {}
        self._ready: deque[Completion] = deque()

    @classmethod
    def from_checkpoint(cls, config: EngineConfig, group: TorchGroup | None = None) -> TorchEngine:
        """Loads the checkpoint; with a group, as its rank 0 while the others are in
        models.engine.execution.ranks.serve.

        Raises ConfigError for what the checkpoint or the device cannot do.
        """
        if config.tensor_parallel_size != (group.size if group else 1):
            raise ConfigError(
                f"engine.tensor_parallel_size={config.tensor_parallel_size}: a single "
                "process is one rank; set it to 1 here, or run a job: glm-batch starts the other "
                "ranks"
            )
        tokenizer = Tokenizer.from_dir(config.model)
        runner: Runner
        runner, limits = lead(config, group) if group else build_runner(config)
        tokenizer.eos_token_ids = resolve_end_ids(tokenizer, runner.config)
        return cls(runner, tokenizer, limits)

    def submit(self, requests: list[Request]) -> None:
        """Queues requests; ValueError, and none queued, for an id that is in flight already."""
        refuse_known_ids(
            requests, chain(self._pending, (completion.id for completion in self._ready))
        )
        for request in requests:
            try:
                pending = self._admit(request)
            except RowError as error:
                self._ready.append(failed(request, error))
                continue
            self._pending[request.id] = pending
            for sequence in pending.sequences:
                self.scheduler.add(sequence)

    def _admit(self, request: Request) -> _Pending:
        answer = answer_to(request, self._context)
        check(answer, capacity=self.limits.num_blocks * self.limits.block_size)
        sequences = answer.sequences(place_media(answer))
        return _Pending(answer, sequences, set(sequences))

    def step(self) -> list[Completion]:
        """Computes up to max_step_tokens tokens and returns what finished.

        What does not fit into memory is tried again in smaller steps, until a row does not fit by
        itself: it fails.
        """
        chunks = self.scheduler.schedule()
        if chunks:
            computed = self._compute(chunks)
            if computed:
                for chunk in chunks:
                    chunk.sequence.num_computed = chunk.end
                self._hand_out(*computed)
                self._step_size.succeeded()
            self.scheduler.max_step_tokens = self._step_size.tokens
        done = list(self._ready)
        self._ready.clear()
        return done

    def _compute(self, chunks: list[Chunk]) -> tuple[list[Wanted], StepOutput] | None:
        """Numbers; only memory has changed by then. None where that ran out: all is as before."""
        try:
            step = self._pack(chunks)
            output = self._runner.run(step.batch)
            output.draws = self._draw(step.decodings, output.sample_logits)
            return step.wanted, output
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error) or type(error).__name__
        # Outside the handler: the exception has held the step's tensors.
        self._take_back(chunks, reason)
        return None

    def _pack(self, chunks: list[Chunk]) -> Step:
        """The step in the form that the runner's attention reads."""
        if self.limits.tile_queries:
            step: Step = rooms.load("models.engine.cuda.batch_paged").build_paged_step(
                chunks,
                block_size=self.limits.block_size,
                tile_queries=self.limits.tile_queries,
                num_ids=self._num_ids,
            )
            return step
        num_heads = self.config.num_attention_heads
        return build_step(chunks, self.scheduler, num_heads=num_heads, num_ids=self._num_ids)

    @property
    def _num_ids(self) -> int:
        """Ids that stand for something: the embedding may be longer."""
        return min(self.tokenizer.vocab_size, self.config.vocab_size)

    def _draw(self, decodings: list[Decoding], logits: torch.Tensor) -> list[Draw]:
        """The next token of each; changes nothing."""
        if not decodings:
            return []
        errors: dict[int, RowError] = {}
        rows = []
        for i, decoding in enumerate(decodings):
            bitmask = None
            try:
                bitmask = decoding.matcher.bitmask() if decoding.matcher else None
            except RowError as error:  # a constraint that can no longer be followed
                errors[i] = error
            row = SampleRow(
                params=decoding.params,
                prompt_ids=decoding.prompt_ids,
                output_ids=decoding.token_ids,
                sample_index=decoding.index,
                end_ids=decoding.end_ids,
                bitmask=bitmask,
            )
            rows.append(row)
        sampled = sample(logits, rows, vocab_size=self._num_ids)
        errors = sampled.errors | errors
        found = zip(sampled.token_ids, sampled.logprobs, sampled.top_logprobs, strict=True)
        return [Draw(*each, error=errors.get(i)) for i, each in enumerate(found)]

    def _hand_out(self, wanted: list[Wanted], output: StepOutput) -> None:
        for want in wanted:
            pending = self._pending.get(want.sequence.request.id)
            if pending is None:
                continue  # another sample of the same request has failed in this step
            try:
                if not pending.answer.take(want, output):
                    continue
            except RowError as error:
                self._fail(pending, error)
                continue
            self.scheduler.finish(want.sequence)
            pending.unfinished.remove(want.sequence)
            if not pending.unfinished:
                del self._pending[want.sequence.request.id]
                self._ready.append(_completion(pending, aborted=False))

    def _take_back(self, chunks: list[Chunk], reason: str) -> None:
        self.scheduler.take_back(chunks)
        self._runner.free_memory()
        if not self._step_size.failed(sum(chunk.end - chunk.start for chunk in chunks), reason):
            sequence = chunks[0].sequence
            message = (
                f"the row does not fit into the device's memory, not even alone and token by "
                f"token (its prompt has {sequence.num_prompt} tokens): {reason}; shorten it or its "
                "media, or lower engine.kv_cache_tokens"
            )
            self._fail(self._pending[sequence.request.id], RowError("out_of_memory", message))

    def deltas(self) -> list[Delta]:
        gained, self._context.deltas = self._context.deltas, []
        return gained

    def abort(self, ids: list[str]) -> None:
        for request_id in ids:
            pending = self._pending.pop(request_id, None)
            if pending is not None:
                self._drop(pending)
                self._ready.append(_completion(pending, aborted=True))

    def has_work(self) -> bool:
        return bool(self._pending or self._ready)

    def close(self) -> None:
        """Ends everything in flight without completions and frees memory; twice is once."""
        for pending in self._pending.values():
            self._drop(pending)
        self._pending.clear()
        self._ready.clear()
        runner: Runner | None = self.__dict__.pop("_runner", None)
        if runner:
            runner.close()

    def _fail(self, pending: _Pending, error: RowError) -> None:
        request = pending.answer.request
        del self._pending[request.id]
        self._drop(pending)
        self._ready.append(failed(request, error))

    def _drop(self, pending: _Pending) -> None:
        for sequence in pending.sequences:
            if sequence in pending.unfinished:
                self.scheduler.finish(sequence)


def _completion(pending: _Pending, *, aborted: bool) -> Completion:
    first = pending.sequences[0]
    return Completion(
        id=first.request.id,
        prompt_tokens=first.num_prompt,
        cached_tokens=first.cached_tokens,
        num_preemptions=sum(sequence.num_preemptions for sequence in pending.sequences),
        media_tokens=first.media.num_tokens if first.media else 0,
        **pending.answer.fields(aborted=aborted),
    )
