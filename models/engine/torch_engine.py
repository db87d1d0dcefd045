"""TorchEngine: requests in, completions out, around a scheduler and a runner.

A step is: schedule -> build_batch -> run -> sample -> hand the numbers to the requests they belong
to. A step that does not fit into memory is taken back and tried again with fewer tokens. Knows
nothing of rows, files or ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from glm_batch.models import rooms
from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.engine.api.interface import EngineConfig
from glm_batch.models.engine.api.request import (
    Choose,
    Classify,
    Completion,
    Delta,
    Embed,
    Generate,
    Inspect,
    PromptScores,
    Request,
    Score,
    Tag,
    TopLogprob,
    refuse_known_ids,
)
from glm_batch.models.engine.decoding.constraints import Constraints
from glm_batch.models.engine.decoding.decoding import Decoding
from glm_batch.models.engine.execution.batch import Batch, Wanted, build_batch, ranking
from glm_batch.models.engine.execution.ranks import build_runner, lead
from glm_batch.models.engine.execution.runner import Runner, StepOutput
from glm_batch.models.engine.execution.sampler import SampleRow, sample
from glm_batch.models.engine.execution.settings import UNPROVEN_STEPS, Limits, resolve_end_ids
from glm_batch.models.engine.scheduling.block_manager import BlockManager
from glm_batch.models.engine.scheduling.choice_tree import ChoiceTree
from glm_batch.models.engine.scheduling.placeholders import PlacedMedia, place
from glm_batch.models.engine.scheduling.scheduler import Chunk, Scheduler
from glm_batch.models.engine.scheduling.sequence import Sequence
from glm_batch.models.engine.scheduling.step_size import StepSize, is_out_of_memory
from glm_batch.models.errors import ConfigError, RowError
from glm_batch.models.network.layers.parallel import TorchGroup
from glm_batch.models.processing.tokenizer import Tokenizer

KEPT_TREE_TOKENS = 1024  # a tree may hold a byte for each pair of them


@dataclass(slots=True, kw_only=True, eq=False)
class _Pending:
    """A request in flight and what has come back for it so far."""

    request: Request
    sequences: list[Sequence] = field(default_factory=list)
    decodings: list[Decoding] = field(default_factory=list)
    arrays: list[NDArray[np.float32]] = field(default_factory=list)
    scores: list[PromptScores] = field(default_factory=list)
    edge_logprobs: dict[int, float] = field(default_factory=dict)
    end_logprobs: dict[int, float] = field(default_factory=dict)
    num_finished: int = 0


@dataclass(frozen=True, slots=True)
class _Draw:
    """The token that a step has drawn for a sequence, or why there is none."""

    sequence: Sequence
    token_id: int
    logprob: float | None
    top_logprobs: tuple[TopLogprob, ...] | None
    error: RowError | None


class TorchEngine:
    """The engine of this project. `from_checkpoint` builds one; every request ends in exactly one
    Completion.
    """

    def __init__(self, runner: Runner, tokenizer: Tokenizer, limits: Limits) -> None:
        self.config: ModelConfig = runner.config
        self.tokenizer = tokenizer
        self.limits = limits
        self._runner = runner
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
        self._deltas: list[Delta] = []

    @classmethod
    def from_checkpoint(cls, config: EngineConfig, group: TorchGroup | None = None) -> TorchEngine:
        """Loads the checkpoint; with a group, as its rank 0 while the others are in
        models.engine.execution.ranks.serve.

        Raises ConfigError for what the checkpoint or the device cannot do.
        """
        if config.tensor_parallel_size != (group.size if group else 1):
            raise ConfigError(
                f"engine.tensor_parallel_size={config.tensor_parallel_size}: a single process is one rank; set it to 1 "
                "here, or run a job: glm-batch starts the other ranks"
            )
        tokenizer = Tokenizer.from_dir(config.model)
        runner: Runner
        runner, limits = lead(config, group) if group else build_runner(config)
        tokenizer.eos_token_ids = resolve_end_ids(tokenizer, runner.config)
        return cls(runner, tokenizer, limits)

    def submit(self, requests: list[Request]) -> None:
        """Queues requests; raises ValueError, and queues none, for an id that is in flight already."""
        refuse_known_ids(
            requests, chain(self._pending, (completion.id for completion in self._ready))
        )
        for request in requests:
            try:
                pending = self._admit(request)
            except RowError as error:
                self._ready.append(_failed(request, error))
                continue
            except ConfigError as error:  # a constraint that cannot be compiled
                self._ready.append(_failed(request, RowError("invalid_constraint", str(error))))
                continue
            self._pending[request.id] = pending
            for sequence in pending.sequences:
                self.scheduler.add(sequence)

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

    def _compute(self, chunks: list[Chunk]) -> tuple[list[Wanted], StepOutput, list[_Draw]] | None:
        """A step's numbers; nothing but memory has changed by then. None where that ran out: all is
        as before.
        """
        try:
            batch, wanted = self._batch(chunks)
            output = self._runner.run(batch)
            return wanted, output, self._draw(wanted, output.sample_logits)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error) or type(error).__name__
        # Outside the handler: the exception has held the step's tensors.
        self._take_back(chunks, reason)
        return None

    def _batch(self, chunks: list[Chunk]) -> tuple[Batch, list[Wanted]]:
        """The step in the form that the runner's attention reads."""
        end_ids = self.tokenizer.eos_token_ids
        if self.limits.tile_queries:
            block_size, tile_queries = self.limits.block_size, self.limits.tile_queries
            batch, wanted = rooms.load("models.engine.cuda.batch_paged").build_paged_batch(
                chunks, block_size=block_size, tile_queries=tile_queries, eos_token_ids=end_ids
            )
        else:
            batch, wanted = build_batch(
                chunks,
                self.scheduler,
                num_heads=self.config.num_attention_heads,
                eos_token_ids=end_ids,
            )
        scored = ranking(wanted, self._num_ids)
        return (replace(batch, ranking=scored) if scored else batch), wanted

    def _take_back(self, chunks: list[Chunk], reason: str) -> None:
        self.scheduler.take_back(chunks)
        self._runner.free_memory()
        if not self._step_size.failed(sum(chunk.end - chunk.start for chunk in chunks), reason):
            sequence = chunks[0].sequence
            message = (
                f"the row does not fit into the device's memory, not even alone and token by token (its prompt has "
                f"{sequence.num_prompt} tokens): {reason}; shorten it or its media, or lower engine.kv_cache_tokens"
            )
            self._fail(self._pending[sequence.request.id], RowError("out_of_memory", message))

    def deltas(self) -> list[Delta]:
        gained, self._deltas = self._deltas, []
        return gained

    def abort(self, ids: list[str]) -> None:
        for request_id in ids:
            pending = self._pending.pop(request_id, None)
            if pending is not None:
                self._drop(pending)
                self._ready.append(self._completion(pending, "abort"))

    def has_work(self) -> bool:
        return bool(self._pending or self._ready)

    def close(self) -> None:
        """Ends everything in flight without completions and lets the model's memory go; once more
        does nothing.
        """
        for pending in self._pending.values():
            self._drop(pending)
        self._pending.clear()
        self._ready.clear()
        runner: Runner | None = self.__dict__.pop("_runner", None)
        if runner:
            runner.close()

    # From a request to sequences

    def _admit(self, request: Request) -> _Pending:
        prompt = list(map(int, request.input_ids))
        self._check(request, prompt)
        media = self._place(request, prompt)
        match request.work:
            case Generate(sampling=params, constraint=constraint):
                pending = _Pending(request=request)
                room = self.limits.max_model_len - len(prompt)
                for i in range(params.n):
                    matcher = self._constraints.start(constraint) if constraint else None
                    max_tokens = min(params.max_tokens, room)
                    pending.decodings.append(
                        Decoding(params, self.tokenizer, max_tokens=max_tokens, matcher=matcher)
                    )
                    pending.sequences.append(self._sequence(request, prompt, media, sample_index=i))
                return pending
            case Choose():
                tree = choice_tree(request.work)
                tokens = prompt + list(tree.tokens)
                sequence = self._sequence(request, tokens, media, num_prompt=len(prompt), tree=tree)
            case _:
                sequence = self._sequence(request, prompt, media)
        return _Pending(request=request, sequences=[sequence])

    def _sequence(
        self,
        request: Request,
        tokens: list[int],
        media: PlacedMedia | None,
        *,
        num_prompt: int | None = None,
        sample_index: int = 0,
        tree: ChoiceTree | None = None,
    ) -> Sequence:
        return Sequence(
            request=request,
            sample_index=sample_index,
            tokens=list(tokens),
            num_prompt=len(tokens) if num_prompt is None else num_prompt,
            pooled_index=pooled_index(tokens, self.config.pad_token_id),
            tree=tree,
            media=media,
        )

    def _place(self, request: Request, prompt: list[int]) -> PlacedMedia | None:
        """Matches the request's media with its placeholders; a prompt without both costs one look."""
        vision, tokens = self.config.vision, self.config.media_tokens
        if vision is None or tokens is None:
            if request.media is None:
                return None
            raise RowError(
                "unsupported_media",
                f"the prompt shows media; the checkpoint, a {self.config.architecture}, reads text",
            )
        if request.media is None and tokens.image not in prompt:
            return None
        return place(request.media, prompt, tokens, vision)

    @property
    def _num_ids(self) -> int:
        """Ids that stand for something: the embedding may be longer."""
        return min(self.tokenizer.vocab_size, self.config.vocab_size)

    @cached_property
    def _constraints(self) -> Constraints:
        return Constraints(self.tokenizer)

    def _check(self, request: Request, prompt: list[int]) -> None:
        """Refuses what can never run, so that everything admitted finishes."""
        _check_head(self.config, request)
        if not prompt:
            raise RowError("empty_prompt", "the prompt has no tokens")
        if min(prompt) < 0 or max(prompt) >= self.config.vocab_size:
            raise RowError(
                "invalid_token", f"the prompt holds ids outside 0 to {self.config.vocab_size - 1}"
            )
        longest, held = len(prompt), len(prompt)
        match request.work:
            case Generate(sampling=params):
                longest += 1  # at least one token must fit
                held += min(params.max_tokens, self.limits.max_model_len - len(prompt))
            case Choose():
                tree = choice_tree(request.work)
                _check_choices(tree, self.config.vocab_size)
                longest += max(tree.depths, default=0)
                held += len(tree.tokens)
        if longest > self.limits.max_model_len:
            extra = (
                f" and {longest - len(prompt)} more to continue with"
                if longest > len(prompt)
                else ""
            )
            raise RowError(
                "prompt_too_long",
                f"the prompt has {len(prompt)} tokens{extra}; the model takes {self.limits.max_model_len}",
            )
        capacity = self.limits.num_blocks * self.limits.block_size
        if held > capacity:
            raise RowError(
                "prompt_too_long",
                f"prompt and output may take {held} tokens; the KV cache holds {capacity}: lower max_tokens or raise "
                "engine.kv_cache_tokens",
            )

    # From a step's numbers to completions

    def _hand_out(self, wanted: list[Wanted], output: StepOutput, draws: list[_Draw]) -> None:
        rows = _Rows(output)
        for want in wanted:
            pending = self._pending[want.sequence.request.id]
            count = len(want.indices)
            # perhaps once more: it may have lost its cache to an older sequence
            if want.indices[:1] == [0]:
                pending.arrays.clear()
                pending.scores.clear()
            match want.sequence.request.work:
                case Generate():
                    continue
                case Choose():
                    self._take_scores(pending, want, rows)
                case Classify() | Tag():
                    pending.arrays.append(rows.class_logits(count))
                case Inspect(what="logits"):
                    pending.arrays.append(rows.logits(count))
                case Embed() | Inspect():
                    pending.arrays.append(rows.hidden(count))
                case Score(top=top):
                    if count:
                        pending.scores.append(rows.scores(count, top))
            if not want.sequence.num_owed:
                self._finish_sequence(pending, want.sequence, "scored")
        for draw in draws:
            self._add(draw)

    def _take_scores(self, pending: _Pending, want: Wanted, rows: _Rows) -> None:
        tree = want.sequence.tree
        assert tree is not None
        for index in want.indices:
            node = index - want.sequence.num_prompt
            for edge in tree.edges_at[node]:
                pending.edge_logprobs[edge] = rows.pair_logprob()
            if node in tree.ends:
                ends = [rows.pair_logprob() for _ in self.tokenizer.eos_token_ids]
                pending.end_logprobs[node] = float(np.logaddexp.reduce(ends))

    def _draw(self, wanted: list[Wanted], logits: torch.Tensor) -> list[_Draw]:
        """The next token of each sequence that is due for one; changes nothing."""
        sequences = [
            want.sequence
            for want in wanted
            if want.indices and isinstance(want.sequence.request.work, Generate)
        ]
        if not sequences:
            return []
        errors: dict[int, RowError] = {}
        rows = [self._sample_row(i, sequence, errors) for i, sequence in enumerate(sequences)]
        sampled = sample(logits, rows, vocab_size=self._num_ids)
        errors = sampled.errors | errors
        found = zip(
            sequences, sampled.token_ids, sampled.logprobs, sampled.top_logprobs, strict=True
        )
        return [_Draw(*each, error=errors.get(i)) for i, each in enumerate(found)]

    def _add(self, draw: _Draw) -> None:
        sequence = draw.sequence
        pending = self._pending.get(sequence.request.id)
        if pending is None:
            return  # another sample of the same request has failed in this step
        decoding = pending.decodings[sequence.sample_index]
        try:
            if draw.error:
                raise draw.error
            forced = decoding.add(draw.token_id, draw.logprob, draw.top_logprobs)
        except RowError as error:
            self._fail(pending, error)
            return
        sequence.tokens += [draw.token_id, *forced]
        if pending.request.stream:
            self._deltas.append(decoding.delta(pending.request.id, sequence.sample_index))
        if decoding.finish_reason:
            self._finish_sequence(pending, sequence, decoding.finish_reason)

    def _sample_row(self, i: int, sequence: Sequence, errors: dict[int, RowError]) -> SampleRow:
        """What the sampler must know; a constraint that can no longer be followed is noted in
        `errors`.
        """
        pending = self._pending[sequence.request.id]
        decoding = pending.decodings[sequence.sample_index]
        bitmask = None
        try:
            bitmask = decoding.matcher.bitmask() if decoding.matcher else None
        except RowError as error:
            errors[i] = error
        return SampleRow(
            params=decoding.params,
            prompt_ids=pending.request.input_ids,
            output_ids=decoding.token_ids,
            sample_index=sequence.sample_index,
            end_ids=decoding.end_ids,
            bitmask=bitmask,
        )

    def _finish_sequence(self, pending: _Pending, sequence: Sequence, reason: str) -> None:
        self.scheduler.finish(sequence)
        pending.num_finished += 1
        if pending.num_finished == len(pending.sequences):
            del self._pending[pending.request.id]
            self._ready.append(self._completion(pending, reason))

    def _fail(self, pending: _Pending, error: RowError) -> None:
        del self._pending[pending.request.id]
        self._drop(pending)
        self._ready.append(_failed(pending.request, error))

    def _drop(self, pending: _Pending) -> None:
        for i, sequence in enumerate(pending.sequences):
            if not (pending.decodings and pending.decodings[i].finish_reason):
                self.scheduler.finish(sequence)

    def _completion(self, pending: _Pending, reason: str) -> Completion:
        first = pending.sequences[0]
        finished = [decoding for decoding in pending.decodings if decoding.finish_reason]
        outputs = tuple(decoding.output() for decoding in finished)
        if outputs and reason != "abort":
            reason = outputs[0].finish_reason
        scored = reason == "scored"
        choice_logprobs = None
        if first.tree and scored:
            choice_logprobs = first.tree.label_logprobs(pending.edge_logprobs, pending.end_logprobs)
        return Completion(
            id=pending.request.id,
            finish_reason=reason,  # type: ignore[arg-type]
            prompt_tokens=first.num_prompt,
            cached_tokens=first.cached_tokens,
            output_tokens=sum(len(decoding.token_ids) for decoding in pending.decodings),
            outputs=outputs,
            choice_logprobs=choice_logprobs,
            array=_assemble(pending) if scored else None,
            scores=_joined(pending.scores)
            if scored and isinstance(pending.request.work, Score)
            else None,
            num_preemptions=sum(sequence.num_preemptions for sequence in pending.sequences),
            media_tokens=first.media.num_tokens if first.media else 0,
        )


def choice_tree(work: Choose) -> ChoiceTree:
    """Most jobs' requests all have the same choices: their tree is built once."""
    kept = sum(map(len, work.choices)) <= KEPT_TREE_TOKENS
    return _kept_tree(work) if kept else ChoiceTree.build(work.choices, count_end=work.count_end)


@lru_cache(maxsize=256)
def _kept_tree(work: Choose) -> ChoiceTree:
    return ChoiceTree.build(work.choices, count_end=work.count_end)


class _Rows:
    """Hands a step's numbers out in the order in which build_batch asked for them."""

    def __init__(self, output: StepOutput) -> None:
        self._output = output
        self._pairs: Iterator[float] = iter(output.pair_logprobs.tolist())
        self._class_at = self._logits_at = self._hidden_at = self._scores_at = 0

    def pair_logprob(self) -> float:
        return next(self._pairs)

    def class_logits(self, count: int) -> NDArray[np.float32]:
        self._class_at += count
        return self._output.class_logits[self._class_at - count : self._class_at]

    def logits(self, count: int) -> NDArray[np.float32]:
        self._logits_at += count
        return self._output.logits[self._logits_at - count : self._logits_at]

    def hidden(self, count: int) -> NDArray[np.float32]:
        self._hidden_at += count
        return self._output.hidden[self._hidden_at - count : self._hidden_at]

    def scores(self, count: int, top: int) -> PromptScores:
        found, part = self._output.scores, slice(self._scores_at, self._scores_at + count)
        assert found is not None
        self._scores_at += count
        return PromptScores(
            logprobs=found.logprobs[part],
            top_ids=found.top_ids[part, :top],
            top_logprobs=found.top_logprobs[part, :top],
        )


def _joined(pieces: list[PromptScores]) -> PromptScores:
    """Of a prompt's chunks; none where it has but one token."""
    if not pieces:
        nothing = np.empty((0, 0), np.float32)
        return PromptScores(
            logprobs=nothing.ravel(), top_ids=nothing.astype(np.int64), top_logprobs=nothing
        )
    return PromptScores(
        logprobs=np.concatenate([piece.logprobs for piece in pieces]),
        top_ids=np.concatenate([piece.top_ids for piece in pieces]),
        top_logprobs=np.concatenate([piece.top_logprobs for piece in pieces]),
    )


def _assemble(pending: _Pending) -> NDArray[np.float32] | None:
    if not pending.arrays:
        return None
    rows: NDArray[np.float32] = np.concatenate(pending.arrays)
    match pending.request.work:
        case Classify():
            pooled: NDArray[np.float32] = rows[0]
            return pooled
        case Embed(pooling=pooling, normalize=normalize):
            vector = (
                rows[-1].astype(np.float64)
                if pooling == "last"
                else rows.mean(axis=0, dtype=np.float64)
            )
            length = max(float(np.linalg.norm(vector)), 1e-12) if normalize else 1.0
            rows = (vector / length).astype(np.float32)
    return rows


def _failed(request: Request, error: RowError) -> Completion:
    return Completion(
        id=request.id, finish_reason="error", prompt_tokens=len(request.input_ids), error=error
    )


def _check_head(config: ModelConfig, request: Request) -> None:
    needed = {
        Generate: "causal_lm",
        Choose: "causal_lm",
        Score: "causal_lm",
        Classify: "sequence_classification",
        Tag: "token_classification",
    }.get(type(request.work))
    if request.work == Inspect(what="logits"):
        needed = "causal_lm"
    if needed and needed != config.head:
        raise RowError(
            "unsupported_work",
            f"{type(request.work).__name__} needs a {needed} head; the checkpoint is a {config.architecture}",
        )


def _check_choices(tree: ChoiceTree, vocab_size: int) -> None:
    tokens = [token for _, token in tree.edges]
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        raise RowError("invalid_token", f"a choice holds ids outside 0 to {vocab_size - 1}")


def pooled_index(tokens: list[int], pad_token_id: int | None) -> int:
    """The rightmost token that is no padding, as sequence classification pools it; 0 when all are."""
    index = len(tokens) - 1
    while index > 0 and tokens[index] == pad_token_id:
        index -= 1
    return index
