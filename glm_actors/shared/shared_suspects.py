"""Search: which row of a batch job a live application's replicas do not survive, in as few of their
deaths as can be.

A replica's death makes all messages suspect that were under way. A suspect one is sent with nothing
beside it; when it is lost then, too, its rows are sent one by one. A row that was lost alone twice
is the culprit: it gets an error. That is at most four deaths for a culprit, and two for each
further one in its message. Knows nothing of Ray or of how a message is sent.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from glm_batch.glm_actors.shared.shared_model import AppFailedError, ReplicaLostError
from glm_batch.models.engine.api.request import Completion, Request
from glm_batch.models.errors import RowError

Ask = Callable[[Sequence[Request]], Awaitable[list[Completion]]]
ROW_DEATHS = 2  # of a row alone make it the culprit
# in a row, of what was alone, and nothing answered between them: it is not the rows
BARREN_DEATHS = 6


class Search:
    """Sends messages and finds culprits. Belongs to one event loop.

    `ask` sends a message and raises ReplicaLostError where the replica did not live to answer it;
    `present` returns once there is a replica: one that has only just died may still be asked.
    """

    def __init__(
        self, ask: Ask, present: Callable[[], Awaitable[None]], messages: int, what: str
    ) -> None:
        """Up to `messages` are under way at once; `what` names the application for people."""
        self._ask, self._present, self._what = ask, present, what
        self._turns = _Turns(messages)
        self._barren = 0
        self._failure: AppFailedError | None = None
        self._random = random.Random(0)

    async def run(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion for each request, in their order. Raises AppFailedError, and what `ask`
        raises else.
        """
        async with self._turns.beside_others():
            try:
                return await self._answered(requests)
            except ReplicaLostError:
                self._turns.num_suspect += 1  # at once, before anything new is sent
        try:
            return await self._suspect(requests)
        finally:
            await self._turns.clear()

    async def _suspect(self, requests: Sequence[Request]) -> list[Completion]:
        for deaths in itertools.count(1):
            async with self._turns.alone():
                await self._present()
                try:
                    return await self._answered(requests)
                except ReplicaLostError as error:
                    lost = error
                    self._count(error)
            # Whatever else is suspect comes before the next try, and shows whether anything can be
            # answered at all.
            if len(requests) > 1:
                return await self._one_by_one(requests)
            if deaths == ROW_DEATHS:
                return [_culprit(requests[0], lost)]
        raise AssertionError("unreachable")

    async def _one_by_one(self, requests: Sequence[Request]) -> list[Completion]:
        """In any order: where a few rows are bad, they may stand side by side."""
        order = self._random.sample(range(len(requests)), len(requests))
        found = await asyncio.gather(*(self._suspect([requests[index]]) for index in order))
        return [
            completion
            for _, (completion,) in sorted(zip(order, found, strict=True), key=lambda each: each[0])
        ]

    async def _answered(self, requests: Sequence[Request]) -> list[Completion]:
        if self._failure is not None:
            raise self._failure
        completions = await self._ask(requests)
        self._barren = 0
        return completions

    def _count(self, error: ReplicaLostError) -> None:
        self._barren += 1
        if self._barren == BARREN_DEATHS:
            self._failure = AppFailedError(
                f"{self._what} lost {self._barren} replicas in a row, each with rows of its own, and answered nothing "
                f"in between; the last time: {error}"
            )
            raise self._failure from error


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


def _culprit(request: Request, lost: ReplicaLostError) -> Completion:
    error = RowError(
        "worker_died",
        f"the replica that worked on this row died {ROW_DEATHS} times while it had nothing else of this job to do; the "
        f"last time: {lost}. The other rows went on without it: make it smaller or leave it out",
    )
    return Completion(
        id=request.id, finish_reason="error", prompt_tokens=len(request.input_ids), error=error
    )
