"""Replica: one engine that answers requests of many clients at once.

Owns admission, deadlines, and that whatever a client no longer waits for leaves the engine. Plain
asyncio around an EngineLoop: `deploy` puts it into a Ray Serve deployment.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import sys
import traceback
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from glm_batch.glm_actors.engines.engine_loop import EngineLoop, OnDeltas, Submission
from glm_batch.glm_actors.engines.worker_group import WorkerGroup, needs_ranks
from glm_batch.glm_actors.faults.schema_check import SchemaChecker
from glm_batch.glm_actors.faults.watchdog import STDERR, HangLimits, Watchdog
from glm_batch.glm_actors.serving.http.pieces import Give, Piece
from glm_batch.glm_actors.serving.openai.api_errors import (
    ApiError,
    busy,
    internal,
    of_row,
    timed_out,
    unavailable,
)
from glm_batch.glm_actors.serving.openai.api_tasks import Json, StreamTask, Task, build_task
from glm_batch.glm_actors.serving.openai.prompter import RequestPrompter
from glm_batch.glm_actors.serving.openai.protocol import (
    Body,
    ChatRequest,
    CompletionRequest,
    TokenizeRequest,
)
from glm_batch.glm_actors.serving.openai.serve_settings import ServedModel
from glm_batch.glm_actors.shared.shared_model import (
    Answer,
    BatchWork,
    ModelIdentity,
    NoReplicaError,
)
from glm_batch.models.engine import Completion, Delta, Engine, Request, build_engine
from glm_batch.models.errors import EngineError, RowError
from glm_batch.models.request_limits import RequestLimits

TEXT_THREADS = 2
SLOW_THREADS = 4
Found = TypeVar("Found")


@dataclass(slots=True, eq=False)
class _Stream:
    """A streaming request: who makes chunks, who takes them, and what went wrong with that."""

    task: StreamTask
    give: Give
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class _Post:
    """Called by the engine's thread; equal for an event loop's streams, to wake it once."""

    loop: asyncio.AbstractEventLoop
    give_out: Callable[[list[Delta]], None]

    def __call__(self, deltas: list[Delta]) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits
            self.loop.call_soon_threadsafe(self.give_out, deltas)


class Replica:
    """Blocks until the model is loaded. Raises ConfigError for one that cannot be."""

    def __init__(self, model: ServedModel, caps: RequestLimits) -> None:
        self.name = uuid.uuid4().hex[:8]
        self._model, self._caps = model, caps
        self._in_flight = 0
        self._streams: dict[str, _Stream] = {}  # by the ids of their requests
        # What may wait for a decoder or a compiler must not keep plain text waiting.
        self._text_threads = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="prepare-text")
        self._slow_threads = ThreadPoolExecutor(SLOW_THREADS, thread_name_prefix="prepare-slow")
        self._schemas = SchemaChecker(caps.schema_s)
        self._prompter = RequestPrompter(model.model, caps)
        self._prompter.start()
        config = model.engine_config
        self.identity = ModelIdentity.of(config)
        build: Callable[[], Engine] = partial(build_engine, config)
        if needs_ranks(config):
            build = WorkerGroup(config, _end_process).build_engine
        self._loop = EngineLoop(build, Watchdog(HangLimits(), _end_process))

    async def answer(self, body: Body) -> Json:
        """The whole response to a request. Raises ApiError."""
        with self._place():
            if isinstance(body, TokenizeRequest):
                return await self._prepare(body, partial(self._tokenize, body))
            task: Task = await self._prepare(body, partial(self._task, body))
            completions = await self._completions(self._submit(task.requests))
            if isinstance(body, CompletionRequest) and body.echo:
                return await self._at_length(task.answer, completions)
            return task.answer(completions)

    async def stream(self, body: Body) -> AsyncIterator[Piece]:
        """The response piece by piece; the last one has the usage. Raises ApiError, at any time."""
        pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        feeding = asyncio.ensure_future(self.feed(body, pieces.put_nowait))
        feeding.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            await feeding
        finally:
            feeding.cancel()
            await asyncio.wait({feeding})

    async def feed(self, body: Body, give: Give) -> None:
        """As `stream`, for a `give` that is called in this event loop and never raises."""
        with self._place():
            task: StreamTask = await self._prepare(body, partial(self._task, body))
            stream = _Stream(task, give)
            with self._streaming(stream):
                first = await self._completions(self._submit(task.first)) if task.first else []
                if first:
                    give(Piece(chunks=await self._at_length(task.begin, first)))
                then = [request for request in task.requests if request not in task.first]
                submission = self._submit(then, _Post(asyncio.get_running_loop(), self._give_out))
                found = {each.id: each for each in [*first, *await self._completions(submission)]}
            if stream.error is not None:
                raise internal() from stream.error
            completions = [found[request.id] for request in task.requests]
            # Raises what went wrong with any of them.
            whole = (
                await self._at_length(task.answer, completions)
                if first
                else task.answer(completions)
            )
            give(Piece(usage=whole["usage"]))

    async def work(self, work: BatchWork, gone: asyncio.Future[None]) -> Answer:
        """A batch job's requests, beside those of clients.

        Raises EngineError, also when its caller is `gone`, and NoReplicaError where the engine was
        dead before.
        """
        if work.identity != self.identity:
            return self.identity
        try:
            submission = self._loop.submit(work.requests)
        except EngineError as error:
            raise NoReplicaError(str(error)) from error
        try:
            completed = asyncio.wrap_future(submission)
            await asyncio.wait((completed, gone), return_when=asyncio.FIRST_COMPLETED)
            if not completed.done():
                raise EngineError(f"the process {work.caller} that asked is gone")
            return completed.result()
        finally:
            self._leave(submission)

    async def stats(self) -> Json:
        """Numbers of this moment: requests here, sequences in the engine, blocks of its cache."""
        # before the look: one that ends meanwhile must not be missing from both
        requests = self._in_flight
        numbers = await asyncio.wrap_future(self._loop.look(_engine_stats))
        return {"replica": self.name, "requests": requests, **numbers}

    async def check_blocks(self) -> None:
        """Raises AssertionError where the cache's books do not agree. For tests: it reads all."""
        await asyncio.wrap_future(self._loop.look(_check_blocks))

    async def check_health(self) -> None:
        """Raises EngineError when the engine is dead."""
        if self._loop.failure is not None:
            raise self._loop.failure

    def close(self) -> None:
        """Ends the engine and the threads; requests in flight fail."""
        self._loop.close()
        for threads in (self._text_threads, self._slow_threads):
            threads.shutdown(wait=False, cancel_futures=True)
        self._schemas.close()
        self._prompter.close()

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        if self._in_flight >= self._caps.max_queue:
            raise busy()
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    async def _prepare(self, body: Body, work: Callable[[], Found]) -> Found:
        """Does a request's own work in a thread. Raises ApiError for what is wrong with it."""
        try:
            threads = self._slow_threads if _may_be_slow(body) else self._text_threads
            return await asyncio.get_running_loop().run_in_executor(threads, work)
        except RowError as error:
            raise of_row(error) from error
        except ApiError:
            raise
        except Exception as error:  # a request's border: whatever it was, the others go on
            traceback.print_exception(error, file=sys.stderr)
            raise internal() from error

    def _task(self, body: Body) -> Any:
        return build_task(
            body, self._prompter, self._schemas, self._caps, thinking=self._model.thinking
        )

    def _tokenize(self, body: TokenizeRequest) -> Json:
        if body.prompt is not None and body.messages is None:
            prompt = self._prompter.raw(body.prompt, "prompt")
        elif body.messages is not None and body.prompt is None:
            thinking = (
                self._model.thinking if body.thinking is None else body.thinking.type == "enabled"
            )
            prompt = self._prompter.conversation(body.messages, thinking=thinking)
        else:
            raise ApiError(400, "give either a prompt or messages", "invalid_value", "prompt")
        limit = self._model.engine.max_model_len
        longest = self._prompter.config.longest_context if limit == "auto" else limit
        return {
            "count": len(prompt.input_ids),
            "max_model_len": longest,
            "tokens": list(prompt.input_ids),
        }

    async def _at_length(
        self, work: Callable[[list[Completion]], Found], completions: list[Completion]
    ) -> Found:
        """What is as long as its prompts is written in a thread."""
        return await asyncio.get_running_loop().run_in_executor(
            self._slow_threads, work, completions
        )

    def _submit(self, requests: Sequence[Request], on_deltas: OnDeltas | None = None) -> Submission:
        try:
            return self._loop.submit(requests, on_deltas)
        except EngineError as error:
            raise unavailable() from error

    async def _completions(self, submission: Submission) -> list[Completion]:
        """All of them, in time. Raises ApiError."""
        try:
            async with asyncio.timeout(self._caps.request_s):
                return await asyncio.wrap_future(submission)
        except TimeoutError:
            raise timed_out(self._caps.request_s) from None
        except EngineError as error:
            traceback.print_exception(error, file=sys.stderr)
            raise unavailable() from error
        finally:
            self._leave(submission)

    def _leave(self, submission: Submission) -> None:
        """What nobody waits for any more makes room for others."""
        if not submission.done():
            self._loop.abort([request.id for request in submission.requests])

    @contextlib.contextmanager
    def _streaming(self, stream: _Stream) -> Iterator[None]:
        ids = [request.id for request in stream.task.requests]
        self._streams |= dict.fromkeys(ids, stream)
        try:
            yield
        finally:
            for id in ids:
                del self._streams[id]

    def _give_out(self, deltas: list[Delta]) -> None:
        """A step's deltas: each stream gets its own as one piece."""
        gained: dict[_Stream, list[Delta]] = {}
        for delta in deltas:
            if stream := self._streams.get(delta.id):  # else it was left
                gained.setdefault(stream, []).append(delta)
        for stream, own in gained.items():
            try:
                stream.give(_piece(stream.task, own))
            except Exception as error:  # a request's border: whatever it was, the others go on
                traceback.print_exception(error, file=sys.stderr)
                stream.error = error
                self._loop.abort([request.id for request in stream.task.requests])


def _may_be_slow(body: Body) -> bool:
    """Whether it has media, or schemas of its own."""
    messages = getattr(body, "messages", None) or []
    has_schemas = isinstance(body, ChatRequest) and (
        body.response_format is not None or body.tools is not None
    )
    return has_schemas or any(isinstance(message.get("content"), list) for message in messages)


def _piece(task: StreamTask, deltas: list[Delta]) -> Piece:
    chunks = [chunk for delta in deltas for chunk in task.chunks(delta)]
    return Piece(chunks=chunks, num_tokens=sum(len(delta.token_ids) for delta in deltas))


def _engine_stats(engine: Engine) -> Json:
    """Of an engine with a scheduler; others have no numbers to show."""
    scheduler = getattr(engine, "scheduler", None)
    if scheduler is None:
        return {}
    return {
        "waiting": len(scheduler.waiting),
        "running": len(scheduler.running),
        "free_blocks": scheduler.blocks.num_free,
        "blocks": scheduler.blocks.num_blocks,
    }


def _check_blocks(engine: Engine) -> None:
    scheduler = getattr(engine, "scheduler", None)
    if scheduler is not None:
        scheduler.blocks.check()


def _end_process(reason: str) -> None:
    """A thread that hangs, or has lost a rank, ends with its process alone."""
    print(f"glm-batch: {reason}; this replica ends", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(STDERR, all_threads=True)
    os._exit(1)
