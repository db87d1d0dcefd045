"""SharedEngine: an Engine whose work is done by the replicas of a live application.

Owns how requests are cut into messages, and how long a replica is waited for. What a replica took
with it is the business of glm_actors.shared.shared_suspects. Knows nothing of Ray: `Line` is all
that it knows of the application.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import TypeVar

from glm_batch.glm_actors.shared.shared_model import (
    AppFailedError,
    BatchWork,
    Line,
    ModelIdentity,
    NoReplicaError,
    RayLine,
    ReplicaLostError,
    SharedModel,
)
from glm_batch.glm_actors.shared.shared_suspects import Search
from glm_batch.models.engine.api.interface import Engine
from glm_batch.models.engine.api.request import BATCH, Completion, Delta, Request, refuse_known_ids
from glm_batch.models.errors import ConfigError, EngineError

STEP_S = 0.5  # that a step waits for an answer
MESSAGE_ROWS = 32
MESSAGE_BYTES = 8 << 20  # of media
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long what is tried again.

    `messages` may be under way at once. An application is waited for `absence_s`; between two tries
    pass `pause_s`, twice as long each time up to `max_pause_s`.
    """

    messages: int = 32
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

    A row that replicas do not survive ends in an error of its own: see
    glm_actors.shared.shared_suspects.
    """

    def __init__(self, model: SharedModel, line: Line, patience: Patience | None = None) -> None:
        self._model, self._line = model, line
        self._patience = patience or Patience()
        self._name = uuid.uuid4().hex
        self._pending: dict[str, _Message] = {}
        self._ready: list[Completion] = []
        self._answered: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._search = Search(self._ask, self._present, self._patience.messages, self._where)
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
        """Sends requests; raises ValueError for an id that is in flight already, and for a request
        that streams.
        """
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
        """Waits for an answer, a moment at most. Raises EngineError when a message cannot be
        answered.
        """
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
        """Under other names: what a process that has died has left in a replica may still be there."""
        prefix = uuid.uuid4().hex
        renamed = [
            replace(each, id=f"{prefix}-{i}", priority=BATCH) for i, each in enumerate(requests)
        ]
        work = BatchWork(caller=self._name, identity=self._model.identity, requests=renamed)
        answer = await self._persist(lambda: self._line.ask(work), NoReplicaError)
        if isinstance(answer, ModelIdentity):
            raise EngineError(self._refusal(answer))
        return [
            replace(each, id=request.id) for each, request in zip(answer, requests, strict=True)
        ]

    async def _present(self) -> None:
        """Waits for a replica. Raises ConfigError where it is another model's."""
        identity = await self._persist(self._line.identity, NoReplicaError, ReplicaLostError)
        if identity != self._model.identity:
            raise ConfigError(self._refusal(identity))

    async def _persist(self, ask: Callable[[], Awaitable[T]], *absent: type[Exception]) -> T:
        """Asks until there is an answer. Errors of the types `absent` mean that nobody is there
        yet.
        """
        patience = self._patience
        pause = patience.pause_s
        absent_since: float | None = None
        while True:
            try:
                return await ask()
            except absent as error:
                absent_since = absent_since or time.monotonic()
                if time.monotonic() - absent_since > patience.absence_s:
                    waited = f"{patience.absence_s:.0f} s"
                    raise AppFailedError(
                        f"{self._where} has not been there for {waited}: {error}"
                    ) from error
            await asyncio.sleep(pause)
            pause = min(2 * pause, patience.max_pause_s)

    @property
    def _where(self) -> str:
        return f"the application {self._model.app!r}"

    def _refusal(self, identity: ModelIdentity) -> str:
        found = "; ".join(self._model.identity.differences(identity))
        return (
            f"{self._where} no longer serves the job's model ({found}): what is committed stays; go on with an "
            "application that does, or without --app"
        )


def connect(model: SharedModel) -> Engine:
    """The engine of a batch worker. Raises ConfigError where the application serves another model
    by now.
    """
    return SharedEngine(model, RayLine(model))


def _cut(requests: Sequence[Request]) -> Iterator[list[Request]]:
    """Messages of up to MESSAGE_ROWS requests, or as many as have MESSAGE_BYTES of media, at least
    one.
    """
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
