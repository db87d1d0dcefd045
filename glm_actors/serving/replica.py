"""Replica: one engine that answers requests of many clients at once.

Owns admission, deadlines, and that whatever a client no longer waits for leaves the engine. Plain asyncio around an
EngineLoop: `deploy` puts it into a Ray Serve deployment. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import sys
import traceback
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from glm_actors.loop import EngineLoop, OnDelta, Submission
from glm_actors.serving.errors import ApiError, busy, internal, of_row, timed_out, unavailable
from glm_actors.serving.prompts import Prompter
from glm_actors.serving.protocol import Body, ChatRequest, TokenizeRequest
from glm_actors.serving.schema_check import SchemaChecker
from glm_actors.serving.settings import Caps, ServedModel
from glm_actors.serving.tasks import Json, StreamTask, Task, build_task, usage_of
from glm_actors.watchdog import STDERR, HangLimits, Watchdog
from glm_actors.worker_group import WorkerGroup, needs_ranks
from models.engine import Delta, Engine, build_engine
from models.errors import EngineError, RowError

TEXT_THREADS = 2
SLOW_THREADS = 4
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a stream: chunks for the client, how many tokens they stand for, and at the very end the usage."""

    chunks: list[Json] = field(default_factory=list)
    num_tokens: int = 0
    usage: Json | None = None


class Replica:
    """Built where the engine shall run; blocks until the model is loaded. Raises ConfigError for one that cannot be."""

    def __init__(self, model: ServedModel, caps: Caps) -> None:
        self.name = uuid.uuid4().hex[:8]
        self._model, self._caps = model, caps
        self._in_flight = 0
        # What may wait for a decoder or a compiler must not keep plain text waiting.
        self._text_threads = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="prepare-text")
        self._slow_threads = ThreadPoolExecutor(SLOW_THREADS, thread_name_prefix="prepare-slow")
        self._schemas = SchemaChecker(caps.schema_s)
        self._prompter = Prompter(model.model, caps)
        self._prompter.start()
        config = model.engine_config
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
            submission = self._submit(task)
            try:
                async with asyncio.timeout(self._caps.request_s):
                    completions = await _wait(submission)
            except TimeoutError:
                raise timed_out(self._caps.request_s) from None
            finally:
                self._leave(submission)
            return task.answer(completions)

    async def stream(self, body: Body) -> AsyncIterator[Piece]:
        """The response piece by piece; the last one has the usage. Raises ApiError, at any time."""
        with self._place():
            task: StreamTask = await self._prepare(body, partial(self._task, body))
            events: asyncio.Queue[Delta | None] = asyncio.Queue()
            post = partial(_post, asyncio.get_running_loop(), events)
            submission = self._submit(task, post)
            submission.add_done_callback(lambda _: post(None))
            deadline = asyncio.get_running_loop().time() + self._caps.request_s
            try:
                while (deltas := await self._gained(events, deadline))[-1] is not None:
                    yield _piece(task, deltas)
                if len(deltas) > 1:
                    yield _piece(task, deltas[:-1])
                completions = await _wait(submission)
            finally:
                self._leave(submission)
            task.answer(completions)  # raises what went wrong with any of them
            yield Piece(usage=usage_of(completions))

    async def stats(self) -> Json:
        """Numbers of this moment: requests here, sequences in the engine, blocks of its cache."""
        numbers = await asyncio.wrap_future(self._loop.look(_engine_stats))
        return {"replica": self.name, "requests": self._in_flight, **numbers}

    async def check_blocks(self) -> None:
        """Raises AssertionError where the cache's books do not agree. Reads all of them: for tests, not for a probe."""
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
        """Does a request's own work in a thread. Raises ApiError for what is wrong with the request."""
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
        return build_task(body, self._prompter, self._schemas, self._caps, thinking=self._model.thinking)

    def _tokenize(self, body: TokenizeRequest) -> Json:
        if body.prompt is not None and body.messages is None:
            prompt = self._prompter.raw(body.prompt, "prompt")
        elif body.messages is not None and body.prompt is None:
            thinking = self._model.thinking if body.thinking is None else body.thinking.type == "enabled"
            prompt = self._prompter.conversation(body.messages, thinking=thinking)
        else:
            raise ApiError(400, "give either a prompt or messages", "invalid_value", "prompt")
        limit = self._model.engine.max_model_len
        longest = self._prompter.config.longest_context if limit == "auto" else limit
        return {"count": len(prompt.input_ids), "max_model_len": longest, "tokens": list(prompt.input_ids)}

    def _submit(self, task: Task, on_delta: OnDelta | None = None) -> Submission:
        try:
            return self._loop.submit(task.requests, on_delta)
        except EngineError as error:
            raise unavailable() from error

    def _leave(self, submission: Submission) -> None:
        """What nobody waits for any more makes room for others."""
        if not submission.done():
            self._loop.abort([request.id for request in submission.requests])

    async def _gained(self, events: asyncio.Queue[Delta | None], deadline: float) -> list[Delta | None]:
        """All that is there, at least one. None, the last of all, says that the submission is done."""
        try:
            async with asyncio.timeout_at(deadline):
                found = [await events.get()]
        except TimeoutError:
            raise timed_out(self._caps.request_s) from None
        while not events.empty():
            found.append(events.get_nowait())
        return found


def _may_be_slow(body: Body) -> bool:
    """Whether it has media, or a schema of its own."""
    messages = getattr(body, "messages", None) or []
    has_format = isinstance(body, ChatRequest) and body.response_format is not None
    return has_format or any(isinstance(message.get("content"), list) for message in messages)


def _post(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Delta | None], delta: Delta | None) -> None:
    """Called on the engine's thread, which nobody's end may disturb."""
    with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits
        loop.call_soon_threadsafe(events.put_nowait, delta)


async def _wait(submission: Submission) -> list[Any]:
    """The completions. Raises ApiError when the engine died."""
    try:
        return await asyncio.wrap_future(submission)
    except EngineError as error:
        traceback.print_exception(error, file=sys.stderr)
        raise unavailable() from error


def _piece(task: StreamTask, deltas: list[Delta | None]) -> Piece:
    found = [delta for delta in deltas if delta is not None]
    chunks = [chunk for delta in found for chunk in task.chunks(delta)]
    return Piece(chunks=chunks, num_tokens=sum(len(delta.token_ids) for delta in found))


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
    """What hangs or has lost a rank cannot be ended from outside its thread; Ray starts another replica."""
    print(f"glm-batch: {reason}; this replica ends", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(STDERR, all_threads=True)
    os._exit(1)
