"""VllmEngine: requests in, completions out, around vLLM's own scheduler and kernels.

A request becomes one or more forks (samples, nodes of the label tree), which share its prefix in
vLLM's cache.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from glm_batch.models.checkpoint.config_reader import load_config
from glm_batch.models.engine.api.interface import EngineConfig, Task
from glm_batch.models.engine.api.request import (
    BATCH,
    ONLINE,
    Completion,
    Delta,
    Request,
    refuse_known_ids,
)
from glm_batch.models.engine.execution.settings import resolve_end_ids
from glm_batch.models.engine.scheduling.placeholders import PlacedMedia
from glm_batch.models.engine.vllm.vllm_core import Runner, VllmCore, VllmSettings, resolve_settings
from glm_batch.models.engine.vllm.vllm_forks import Asks, Fork, RequestForks, Vocabulary
from glm_batch.models.engine.vllm.vllm_limits import checkpoint_problem
from glm_batch.models.engine.vllm.vllm_media import MediaRenderer, RenderedMedia
from glm_batch.models.engine.works.admission import check, failed, place_media
from glm_batch.models.engine.works.all_answers import answer_to
from glm_batch.models.engine.works.answer import Answer, Context
from glm_batch.models.errors import ConfigError, RowError
from glm_batch.models.processing.tokenizer import Tokenizer

# Requests given to vLLM for each one that it can run: a batch's leave room for those that somebody
# waits for.
QUEUE_DEPTH = {ONLINE: 2, BATCH: 1}
# of rendered media given to vLLM, which keeps them until their requests are done
MEDIA_BYTES = 1 << 30


@dataclass(slots=True, kw_only=True, eq=False)
class _Pending:
    """A request in flight; its forks by their ids in vLLM, of which `open` are not done."""

    answer: Answer[Any]
    media: PlacedMedia | None
    planned: list[Fork]
    media_bytes: int
    forks: dict[str, Fork] = field(default_factory=dict)
    open: set[str] = field(default_factory=set)
    cached_tokens: int = 0

    @property
    def request(self) -> Request:
        return self.answer.request

    @property
    def runner(self) -> Runner:
        return self.planned[0].runner

    @property
    def asks(self) -> Asks | None:
        """In a step that scores given ids, vLLM reports no likeliest ones."""
        return self.planned[0].asks


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
        self._context = Context(settings.model, tokenizer, settings.max_model_len)
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

    @classmethod
    def from_checkpoint(
        cls, config: EngineConfig, vllm_args: Mapping[str, Any] | None = None
    ) -> VllmEngine:
        """`vllm_args` go to vLLM's EngineArgs as they are. ConfigError for what cannot run."""
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
        """Queues requests; ValueError, and none queued, for an id that is in flight already."""
        refuse_known_ids(
            requests, itertools.chain(self._pending, (completion.id for completion in self._ready))
        )
        for request in requests:
            try:
                self._admit(request)
            except RowError as error:
                self._ready.append(failed(request, error))

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
        gained, self._context.deltas = self._context.deltas, []
        return gained

    def abort(self, ids: list[str]) -> None:
        for request_id in ids:
            pending = self._pending.get(request_id)
            if pending is not None:
                self._forget(pending)
                self._ready.append(_completion(pending, aborted=True))

    def has_work(self) -> bool:
        return bool(self._pending or self._ready)

    def close(self) -> None:
        """Ends everything in flight without completions and frees memory; twice is once."""
        self._pending.clear()
        self._owners.clear()
        self._held.clear()
        self._ready.clear()
        for core in self._cores.values():
            core.close()
        self._cores.clear()

    def _core(self, runner: Runner) -> VllmCore:
        if runner not in self._cores:
            self._cores[runner] = VllmCore(self.settings, runner, self.tokenizer)
        return self._cores[runner]

    # From a request to forks

    def _admit(self, request: Request) -> None:
        answer, settings = answer_to(request, self._context), self.settings
        check(answer)
        media = place_media(answer)
        maker = RequestForks(
            vocabulary=Vocabulary.of(self.tokenizer, settings.model.vocab_size),
            num_prompt=len(answer.prompt),
            # vLLM draws a token after what it scores
            max_scored=min(settings.max_model_len, settings.max_engine_len - 1),
        )
        pending = _Pending(
            answer=answer,
            media=media,
            planned=answer.forks(maker),
            media_bytes=self._renderer.num_bytes(media) if self._renderer and media else 0,
        )
        if self._task is not None and pending.runner not in self._cores:
            raise RowError(
                "unsupported_work",
                f"vLLM has loaded the model to {self._task} only; use engine.kind torch",
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

    def _begin(self, pending: _Pending) -> None:
        """Hands a request to vLLM, which may refuse it."""
        core, prompt = self._core(pending.runner), pending.answer.prompt
        self._asking[pending.asks] += 1
        self._media_bytes += pending.media_bytes
        media = (
            self._renderer.render(pending.media)
            if self._renderer and pending.media
            else RenderedMedia()
        )
        try:
            for fork in pending.planned:
                id = str(next(self._numbers))
                tokens = [*prompt[: fork.num_tokens], *fork.suffix]
                core.add(id, media.input(tokens), fork.params, pending.request.priority)
                pending.forks[id] = fork
                pending.open.add(id)
                self._owners[id] = pending
        except ValueError as error:
            self._forget(pending)
            refusal = RowError("refused", f"vLLM refuses the request: {error}")
            self._ready.append(failed(pending.request, refusal))

    # From vLLM's outputs to completions

    def _take(self, output: Any) -> None:
        pending = self._owners.get(output.request_id)
        if pending is None:
            return  # aborted meanwhile
        if output.request_id == next(iter(pending.forks)):
            pending.cached_tokens = min(output.num_cached_tokens or 0, len(pending.answer.prompt))
        try:
            ended = pending.forks[output.request_id].read(output, pending.answer)
        except RowError as error:
            self._forget(pending)
            self._ready.append(failed(pending.request, error))
            return
        if not ended:
            return
        if not output.finished:
            self._cores[pending.runner].abort([output.request_id])
        self._close_fork(pending, output.request_id)

    def _close_fork(self, pending: _Pending, id: str) -> None:
        del self._owners[id]
        pending.open.remove(id)
        if not pending.open:
            self._remove(pending)
            self._ready.append(_completion(pending, aborted=False))

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


def _completion(pending: _Pending, *, aborted: bool) -> Completion:
    return Completion(
        id=pending.request.id,
        prompt_tokens=len(pending.answer.prompt),
        cached_tokens=pending.cached_tokens,
        media_tokens=pending.media.num_tokens if pending.media else 0,
        **pending.answer.fields(aborted=aborted),
    )
