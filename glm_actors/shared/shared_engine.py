"""SharedEngine: an Engine whose work is done by the replicas of a live application.

Owns how requests are cut into messages, how long a replica is waited for, and which rows replicas
do not survive.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, TypeVar

from tenacity import AsyncRetrying, retry_if_exception_type, wait_exponential

from glm_batch.glm_actors.faults.suspects import Patience, Suspects
from glm_batch.glm_actors.shared.shared_model import (
    MESSAGES,
    AppFailedError,
    BatchWork,
    Line,
    ModelIdentity,
    NoReplicaError,
    ReplicaLostError,
    SharedModel,
)
from glm_batch.models.engine.api.request import BATCH, Completion, Delta, Request, refuse_known_ids
from glm_batch.models.errors import ConfigError, EngineError, RowError

STEP_S = 0.5  # that a step waits for an answer
MESSAGE_ROWS = 32
MESSAGE_BYTES = 8 << 20  # of media
T = TypeVar("T")
Ask = Callable[[Sequence[Request]], Awaitable[list[Completion]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """How long an application is waited for: `absence_s` of pauses in all, `pause_s` the first and
    twice as long each time up to `max_pause_s`. `messages` may be under way at once.
    """

    messages: int = MESSAGES
    pause_s: float = 0.2
    max_pause_s: float = 5.0
    absence_s: float = 900.0


@dataclass(slots=True, eq=False)
class _Message:
    requests: list[Request]
    answer: Future[list[Completion]] = field(default_factory=Future)


class SharedEngine:
    """Raises ConfigError from the constructor where the application serves something else,
    EngineError without it.

    A row that replicas do not survive ends in an error of its own.
    """

    def __init__(self, model: SharedModel, line: Line, waiting: Waiting | None = None) -> None:
        self._model, self._line = model, line
        self._waiting = waiting or Waiting(messages=model.messages)
        self._name = uuid.uuid4().hex
        self._pending: dict[str, _Message] = {}
        self._ready: list[Completion] = []
        self._answered: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._search = _Search(self._ask, self._present, self._waiting.messages, self._where)
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="shared-engine", daemon=True
        )
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._present(), self._loop).result()
        except BaseException:
            self.close()
            raise

    def submit(self, requests: list[Request]) -> None:
        """Sends requests. Raises ValueError for an id in flight, and for one that streams."""
        if any(request.stream for request in requests):
            raise ValueError("a batch job's requests come back whole: they cannot stream")
        refuse_known_ids(
            requests, chain(self._pending, (completion.id for completion in self._ready))
        )
        for part in _cut(requests):
            message = _Message(part)
            self._pending |= {request.id: message for request in part}
            message.answer = asyncio.run_coroutine_threadsafe(self._search.run(part), self._loop)
            message.answer.add_done_callback(partial(self._arrive, message))

    def step(self) -> list[Completion]:
        """Waits a moment for an answer. Raises EngineError when a message cannot be answered."""
        if self._pending and not self._ready:
            try:
                self._take(self._answered.get(timeout=STEP_S))
            except queue.Empty:
                return []
        while not self._answered.empty():
            self._take(self._answered.get())
        done, self._ready = self._ready, []
        return done

    def deltas(self) -> list[Delta]:
        return []

    def abort(self, ids: list[str]) -> None:
        """A message goes on as long as one of its requests is wanted."""
        for request_id in ids:
            message = self._pending.pop(request_id, None)
            if message is not None:
                request = next(each for each in message.requests if each.id == request_id)
                tokens = len(request.input_ids)
                self._ready.append(
                    Completion(id=request_id, finish_reason="abort", prompt_tokens=tokens)
                )
                if all(self._pending.get(each.id) is not message for each in message.requests):
                    message.answer.cancel()

    def has_work(self) -> bool:
        return bool(self._pending or self._ready)

    def close(self) -> None:
        """Gives up what is under way: the replicas let go of it."""
        if not self._thread.is_alive():
            return
        self._pending.clear()
        self._ready.clear()
        asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._line.close()

    def _arrive(self, message: _Message, answer: Future[list[Completion]]) -> None:
        self._answered.put(message)

    def _take(self, message: _Message) -> None:
        if message.answer.cancelled():
            return
        for completion in message.answer.result():
            if self._pending.get(completion.id) is message:
                del self._pending[completion.id]
                self._ready.append(completion)

    async def _ask(self, requests: Sequence[Request]) -> list[Completion]:
        """Under new names: what a dead process has left in a replica may still be there."""
        prefix = uuid.uuid4().hex
        renamed = [
            replace(each, id=f"{prefix}-{i}", priority=BATCH) for i, each in enumerate(requests)
        ]
        work = BatchWork(caller=self._name, identity=self._model.identity, requests=renamed)
        answer = await self._persist((NoReplicaError,), self._line.ask, work)
        if isinstance(answer, ModelIdentity):
            raise EngineError(self._refusal(answer))
        return [
            replace(each, id=request.id) for each, request in zip(answer, requests, strict=True)
        ]

    async def _present(self) -> None:
        """Waits for a replica. Raises ConfigError where it is another model's."""
        identity = await self._persist((NoReplicaError, ReplicaLostError), self._line.identity)
        if identity != self._model.identity:
            raise ConfigError(self._refusal(identity))

    async def _persist(
        self, absent: tuple[type[Exception], ...], ask: Callable[..., Awaitable[T]], *arguments: Any
    ) -> T:
        """Asks until there is an answer; errors of the types `absent` mean: not there yet."""
        waiting = self._waiting
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(absent),
            wait=wait_exponential(waiting.pause_s, waiting.max_pause_s),
            stop=lambda state: state.idle_for >= waiting.absence_s,
            reraise=True,
        )
        try:
            return await retrying(ask, *arguments)
        except absent as error:
            raise AppFailedError(
                f"{self._where} has not been there for {waiting.absence_s:.0f} s: {error}"
            ) from error

    @property
    def _where(self) -> str:
        return f"the application {self._model.app!r}"

    def _refusal(self, identity: ModelIdentity) -> str:
        found = "; ".join(self._model.identity.differences(identity))
        return (
            f"{self._where} no longer serves the job's model ({found}): what is committed "
            "stays; go on with an "
            "application that does, or without --app"
        )


class _Search:
    """Sends messages and finds the rows that replicas do not survive. Belongs to one event loop.

    A replica's death makes all messages suspect that were under way: see
    glm_actors.faults.suspects. That is at most four deaths for a culprit, and two for each further
    one in its message.
    """

    def __init__(
        self, ask: Ask, present: Callable[[], Awaitable[None]], messages: int, what: str
    ) -> None:
        """`ask` sends a message and raises ReplicaLostError where the replica did not live to
        answer it; `present` returns once there is a replica: one that has only just died may still
        be asked. Up to `messages` are under way at once; `what`
        names the application for people.
        """
        self._ask, self._present, self._what = ask, present, what
        self._turns = _Turns(messages)
        self._patience = Patience()
        self._suspects = Suspects(self._patience, "replica")
        self._barren = 0  # deaths in a row over what was alone, nothing answered between them
        self._failure: AppFailedError | None = None

    async def run(self, requests: Sequence[Request]) -> list[Completion]:
        """A completion for each request. Raises AppFailedError, and what `ask` raises else."""
        unit = requests[0].id
        async with self._turns.beside_others():
            try:
                return await self._answered(requests)
            except ReplicaLostError as error:
                self._suspects.lose(unit, 0, len(requests), str(error), alone=False)
                self._turns.num_suspect += 1  # at once, before anything new is sent
        try:
            return await self._in_pieces(unit, requests)
        finally:
            self._suspects.forget(unit)
            await self._turns.clear()

    async def _in_pieces(self, unit: str, requests: Sequence[Request]) -> list[Completion]:
        found: dict[int, Completion] = {}
        was_lost = False  # the last one: then what has been answered is asked once more
        while len(found) < len(requests):
            pieces = self._suspects.pieces(unit) or ()
            piece = next(
                each for each in pieces if each.start not in found or (was_lost and each.cleared)
            )
            start, stop, was_lost = piece.start, piece.stop, False
            if piece.error is not None:
                found[start] = _failed(requests[start], piece.error)
                continue
            async with self._turns.alone():
                await self._present()
                try:
                    answered = await self._answered(requests[start:stop])
                except ReplicaLostError as lost:
                    self._suspects.lose(unit, start, stop, str(lost), alone=True)
                    self._count(lost)
                    was_lost = True
                    continue
            self._suspects.clear(unit, start, stop)
            found |= zip(range(start, stop), answered, strict=True)
        return [found[row] for row in range(len(requests))]

    async def _answered(self, requests: Sequence[Request]) -> list[Completion]:
        if self._failure is not None:
            raise self._failure
        completions = await self._ask(requests)
        self._barren = 0
        return completions

    def _count(self, lost: ReplicaLostError) -> None:
        self._barren += 1
        if self._barren == self._patience.barren_deaths:
            self._failure = AppFailedError(
                f"{self._what} lost {self._barren} replicas in a row, each with rows of its own,"
                f" and answered nothing in between; the last time: {lost}"
            )
            raise self._failure from lost


class _Turns:
    """Some beside each other, or one alone; none beside another while there are suspects."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._changed = asyncio.Condition()
        self._running = 0
        self.num_suspect = 0

    @asynccontextmanager
    async def beside_others(self) -> AsyncIterator[None]:
        async with self._turn(1, lambda: 0 <= self._running < self._most and not self.num_suspect):
            yield

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        async with self._turn(-1, lambda: self._running == 0):
            yield

    async def clear(self) -> None:
        """A suspect is one no more."""
        async with self._changed:
            self.num_suspect -= 1
            self._changed.notify_all()

    @asynccontextmanager
    async def _turn(self, count: int, is_free: Callable[[], bool]) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(is_free)
            self._running += count
        try:
            yield
        finally:
            async with self._changed:
                self._running -= count
                self._changed.notify_all()


def _failed(request: Request, error: RowError) -> Completion:
    tokens = len(request.input_ids)
    return Completion(id=request.id, finish_reason="error", prompt_tokens=tokens, error=error)


def _cut(requests: Sequence[Request]) -> Iterator[list[Request]]:
    """Messages of MESSAGE_ROWS requests or MESSAGE_BYTES of media at most, at least one."""
    part: list[Request] = []
    size = 0
    for request in requests:
        own = sum(item.patches.nbytes for item in request.media.items) if request.media else 0
        if part and (len(part) == MESSAGE_ROWS or size + own > MESSAGE_BYTES):
            yield part
            part, size = [], 0
        part.append(request)
        size += own
    if part:
        yield part


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
