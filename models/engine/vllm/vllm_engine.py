"""VllmEngine: requests in, completions out, around vLLM's own scheduler and kernels.

Owns which of vLLM's prompts belong to which request. A request becomes one or more forks (samples,
nodes of the label tree), which share its prefix in vLLM's cache. Knows nothing of rows, files or
ranks.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from glm_batch.models.checkpoint.config_reader import load_config
from glm_batch.models.engine.api.interface import EngineConfig, Task
from glm_batch.models.engine.api.request import (
    BATCH,
    ONLINE,
    Choose,
    Classify,
    Completion,
    Delta,
    FinishReason,
    Generate,
    Output,
    Request,
    refuse_known_ids,
)
from glm_batch.models.engine.decoding.constraints import Constraints
from glm_batch.models.engine.decoding.decoding import Decoding
from glm_batch.models.engine.execution.settings import resolve_end_ids
from glm_batch.models.engine.scheduling.placeholders import PlacedMedia
from glm_batch.models.engine.torch_engine import choice_tree, pooled_index
from glm_batch.models.engine.vllm.vllm_admission import check, place_media
from glm_batch.models.engine.vllm.vllm_core import Runner, VllmCore, VllmSettings, resolve_settings
from glm_batch.models.engine.vllm.vllm_limits import checkpoint_problem
from glm_batch.models.engine.vllm.vllm_media import MediaRenderer, RenderedMedia
from glm_batch.models.engine.vllm.vllm_outputs import (
    Scores,
    Transcript,
    label_logprobs,
    read_array,
    read_scores,
)
from glm_batch.models.engine.vllm.vllm_requests import (
    Fork,
    Vocabulary,
    choice_forks,
    pooling_fork,
    sample_forks,
)
from glm_batch.models.errors import ConfigError, RowError
from glm_batch.models.processing.tokenizer import Tokenizer

# Requests given to vLLM for each one that it can run: a batch's leave room for those that somebody
# waits for.
QUEUE_DEPTH = {ONLINE: 2, BATCH: 1}
# of rendered media given to vLLM, which keeps them until their requests are done
MEDIA_BYTES = 1 << 30
Asks = Literal["given", "likeliest"]


@dataclass(slots=True, kw_only=True, eq=False)
class _Pending:
    """A request in flight, its forks by their ids in vLLM, and what has come back for it so far."""

    request: Request
    prompt: list[int]
    media: PlacedMedia | None
    runner: Runner
    planned: list[Fork]
    media_bytes: int
    forks: dict[str, Fork] = field(default_factory=dict)
    open: set[str] = field(default_factory=set)
    transcripts: dict[str, Transcript] = field(default_factory=dict)
    scores: Scores = field(default_factory=dict)
    array: NDArray[np.float32] | None = None
    cached_tokens: int = 0

    @property
    def asks(self) -> Asks | None:
        """Which log-probabilities it wants. In a step that scores given ids, vLLM reports no
        likeliest ones.
        """
        match self.request.work:
            case Choose():
                return "given"
            case Generate(sampling=params) if params.logprobs:
                return "likeliest"
        return None


class VllmEngine:
    """vLLM behind the engine seam. `from_checkpoint` builds one; every request ends in exactly one
    Completion.

    vLLM runs a checkpoint either to generate or to pool. The one that the first requests will need
    is loaded at once, the other when a request asks for it: a second copy of the weights. Not where
    a task is known: then such a request ends in an error.
    """

    def __init__(
        self, settings: VllmSettings, tokenizer: Tokenizer, task: Task | None = None
    ) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self._task = task
        vision, model_dir = settings.model.vision, settings.arguments["model"]
        self._renderer = (
            MediaRenderer.from_dir(model_dir, vision, settings.pixel_dtype) if vision else None
        )
        self._cores: dict[Runner, VllmCore] = {}
        self._numbers = itertools.count()
        self._pending: dict[str, _Pending] = {}
        self._owners: dict[str, _Pending] = {}  # by the forks' ids
        self._asking: Counter[Asks | None] = Counter()  # of the requests that vLLM works on
        self._media_bytes = 0  # theirs, rendered
        self._held: deque[_Pending] = deque()  # by priority, in their order
        self._ready: deque[Completion] = deque()
        self._deltas: list[Delta] = []

    @classmethod
    def from_checkpoint(
        cls, config: EngineConfig, vllm_args: Mapping[str, Any] | None = None
    ) -> VllmEngine:
        """Loads the checkpoint. `vllm_args` go to vLLM's EngineArgs as they are. Raises ConfigError
        for what cannot run."""
        model = load_config(config.model)
        problem = checkpoint_problem(model, config.task)
        if problem:
            raise ConfigError(f"engine.kind=vllm: {problem}")
        tokenizer = Tokenizer.from_dir(config.model)
        tokenizer.eos_token_ids = resolve_end_ids(tokenizer, model)
        engine = cls(resolve_settings(config, model, vllm_args or {}), tokenizer, config.task)
        pools = model.head != "causal_lm" or config.task == "embed"
        engine._core("pooling" if pools else "generate")
        return engine

    def submit(self, requests: list[Request]) -> None:
        """Queues requests; raises ValueError, and queues none, for an id that is in flight already."""
        refuse_known_ids(
            requests, itertools.chain(self._pending, (completion.id for completion in self._ready))
        )
        for request in requests:
            try:
                self._admit(request)
            except RowError as error:
                self._ready.append(_failed(request, error))

    def step(self) -> list[Completion]:
        """One step of vLLM; returns what finished."""
        while self._held and not self._must_wait(self._held[0]):
            self._begin(self._held.popleft())
        for core in self._cores.values():
            for output in core.step():
                self._take(output)
        done = list(self._ready)
        self._ready.clear()
        return done

    def deltas(self) -> list[Delta]:
        gained, self._deltas = self._deltas, []
        return gained

    def abort(self, ids: list[str]) -> None:
        for request_id in ids:
            pending = self._pending.get(request_id)
            if pending is not None:
                self._forget(pending)
                self._ready.append(self._completion(pending, "abort"))

    def has_work(self) -> bool:
        return bool(self._pending or self._ready)

    def close(self) -> None:
        """Ends everything in flight without completions and lets the model's memory go; once more
        does nothing.
        """
        self._pending.clear()
        self._owners.clear()
        self._held.clear()
        self._ready.clear()
        for core in self._cores.values():
            core.close()
        self._cores.clear()

    @property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary.of(self.tokenizer, self.settings.model.vocab_size)

    def _core(self, runner: Runner) -> VllmCore:
        if runner not in self._cores:
            self._cores[runner] = VllmCore(self.settings, runner, self.tokenizer)
        return self._cores[runner]

    # From a request to forks

    def _admit(self, request: Request) -> None:
        prompt = list(map(int, request.input_ids))
        model, settings = self.settings.model, self.settings
        check(request, prompt, model, settings.max_model_len, settings.max_engine_len)
        media = place_media(request, prompt, model)
        runner: Runner = "generate" if isinstance(request.work, Generate | Choose) else "pooling"
        if self._task is not None and runner not in self._cores:
            raise RowError(
                "unsupported_work",
                f"vLLM has loaded the model to {self._task} only; use engine.kind torch",
            )
        forks = self._forks(request, settings.max_model_len - len(prompt))
        media_bytes = self._renderer.num_bytes(media) if self._renderer and media else 0
        pending = _Pending(
            request=request,
            prompt=prompt,
            media=media,
            runner=runner,
            planned=forks,
            media_bytes=media_bytes,
        )
        self._pending[request.id] = pending
        first = self._held[0].request.priority if self._held else None
        if self._must_wait(pending) or (first is not None and first <= request.priority):
            bisect.insort(self._held, pending, key=lambda held: held.request.priority)
        else:
            self._begin(pending)

    def _must_wait(self, pending: _Pending) -> bool:
        """While vLLM has plenty to choose from, or works on requests that ask otherwise."""
        depth = QUEUE_DEPTH[pending.request.priority]
        if self._asking.total() >= depth * self.settings.arguments["max_num_seqs"]:
            return True
        if self._media_bytes and self._media_bytes + pending.media_bytes > MEDIA_BYTES:
            return True
        return pending.asks is not None and any(
            asks not in (None, pending.asks) for asks in +self._asking
        )

    def _forks(self, request: Request, room: int) -> list[Fork]:
        match request.work:
            case Generate() as work:
                try:
                    self._matcher(work)
                except ConfigError as error:  # a constraint that cannot be compiled
                    raise RowError("invalid_constraint", str(error)) from error
                max_tokens = min(work.sampling.max_tokens, room)
                return list(sample_forks(work, self._vocabulary, max_tokens, stream=request.stream))
            case Choose() as work:
                return list(choice_forks(work, self._vocabulary))
        return [pooling_fork(request.work)]

    def _begin(self, pending: _Pending) -> None:
        """Hands a request to vLLM, which may refuse it."""
        core = self._core(pending.runner)
        prompt = pending.prompt
        if isinstance(pending.request.work, Classify):
            # vLLM pools the last token; what follows a token never changes it.
            prompt = prompt[: pooled_index(prompt, self.settings.model.pad_token_id) + 1]
        self._asking[pending.asks] += 1
        self._media_bytes += pending.media_bytes
        media = (
            self._renderer.render(pending.media)
            if self._renderer and pending.media
            else RenderedMedia()
        )
        try:
            for fork in pending.planned:
                self._start(core, pending, fork, media.input([*prompt, *fork.suffix]))
        except ValueError as error:
            self._forget(pending)
            refusal = RowError("refused", f"vLLM refuses the request: {error}")
            self._ready.append(_failed(pending.request, refusal))

    def _start(self, core: VllmCore, pending: _Pending, fork: Fork, prompt: Any) -> None:
        id = str(next(self._numbers))
        work = pending.request.work
        if isinstance(work, Generate):
            decoding = Decoding(work.sampling, self.tokenizer, max_tokens=fork.params.max_tokens)
            pending.transcripts[id] = Transcript(decoding, self._matcher(work))
        core.add(id, prompt, fork.params, pending.request.priority)
        pending.forks[id] = fork
        pending.open.add(id)
        self._owners[id] = pending

    def _matcher(self, work: Generate) -> Any:
        return self._constraints.start(work.constraint) if work.constraint else None

    @cached_property
    def _constraints(self) -> Constraints:
        return Constraints(self.tokenizer)

    # From vLLM's outputs to completions

    def _take(self, output: Any) -> None:
        pending = self._owners.get(output.request_id)
        if pending is None:
            return  # aborted meanwhile
        if output.request_id == next(iter(pending.forks)):
            pending.cached_tokens = min(output.num_cached_tokens or 0, len(pending.prompt))
        try:
            ended = self._read(pending, output)
        except RowError as error:
            self._forget(pending)
            self._ready.append(_failed(pending.request, error))
            return
        if not ended:
            return
        if not output.finished:
            self._cores[pending.runner].abort([output.request_id])
        self._close_fork(pending, output.request_id)

    def _read(self, pending: _Pending, output: Any) -> bool:
        """Takes over what came back for one fork; True when that was its end."""
        id = output.request_id
        match pending.request.work:
            case Generate():
                (sample,) = output.outputs
                transcript = pending.transcripts[id]
                transcript.add(sample.token_ids, sample.logprobs, self._vocabulary.num_tokens)
                if output.finished:
                    transcript.finish(sample.finish_reason)
                if pending.request.stream:
                    self._deltas += _deltas(pending, id)
                return transcript.decoding.finish_reason is not None
            case Choose():
                fork = pending.forks[id]
                pending.scores.setdefault(fork.node, {}).update(
                    read_scores(output.outputs[0], fork)
                )
            case work:
                pending.array = read_array(output.outputs, work)
        return True

    def _close_fork(self, pending: _Pending, id: str) -> None:
        del self._owners[id]
        pending.open.remove(id)
        if not pending.open:
            self._remove(pending)
            self._ready.append(self._completion(pending, "scored"))

    def _forget(self, pending: _Pending) -> None:
        """Takes a request back from vLLM, or from those held."""
        if pending in self._held:
            self._held.remove(pending)
            del self._pending[pending.request.id]
            return
        self._remove(pending)
        for id in pending.open:
            del self._owners[id]
        self._cores[pending.runner].abort(list(pending.open))

    def _remove(self, pending: _Pending) -> None:
        del self._pending[pending.request.id]
        self._asking[pending.asks] -= 1
        self._media_bytes -= pending.media_bytes

    def _completion(self, pending: _Pending, reason: FinishReason) -> Completion:
        work = pending.request.work
        outputs = _outputs(pending)
        scores = None
        if isinstance(work, Choose) and reason == "scored":
            scores = label_logprobs(choice_tree(work), pending.scores, self.tokenizer.eos_token_ids)
        if outputs and reason != "abort":
            reason = outputs[0].finish_reason
        return Completion(
            id=pending.request.id,
            finish_reason=reason,
            prompt_tokens=len(pending.prompt),
            cached_tokens=pending.cached_tokens,
            output_tokens=sum(len(output.token_ids) for output in outputs),
            outputs=outputs,
            choice_logprobs=scores,
            array=pending.array if reason == "scored" else None,
            media_tokens=pending.media.num_tokens if pending.media else 0,
        )


def _outputs(pending: _Pending) -> tuple[Output, ...]:
    """The samples that have ended; n greedy ones were drawn once."""
    work = pending.request.work
    if not isinstance(work, Generate):
        return ()
    found = [each.decoding for each in pending.transcripts.values() if each.decoding.finish_reason]
    copies = work.sampling.n if work.sampling.is_greedy else 1
    return tuple(decoding.output() for decoding in found) * copies


def _deltas(pending: _Pending, id: str) -> list[Delta]:
    """What a sample has gained, as often as it counts."""
    index, decoding = list(pending.forks).index(id), pending.transcripts[id].decoding
    delta = decoding.delta(pending.request.id, index)
    work = pending.request.work
    if isinstance(work, Generate) and work.sampling.is_greedy:
        return [replace(delta, index=copy) for copy in range(work.sampling.n)]
    return [delta]


def _failed(request: Request, error: RowError) -> Completion:
    return Completion(
        id=request.id, finish_reason="error", prompt_tokens=len(request.input_ids), error=error
    )
