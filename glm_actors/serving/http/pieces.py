"""Pieces of streams, and their way from a replica to the HTTP process: one message for each step of
the engine.

Ray carries requests and says where they run; what a model writes would cost it a message for each
token and stream. So an HTTP process has a Mailbox, whose address goes with the request, and a
replica opens one Outlet to each Mailbox. When an Outlet loses its connection its streams are
cancelled, and the callers hear of it from Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

SECRET_BYTES = 32
LENGTH_BYTES = 4
HELLO_S = 10.0  # within which whoever connects must have shown the secret
CONNECT_S = 10.0
Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Chunks for the client, how many tokens they stand for, and at the very end the usage."""

    chunks: list[Json] = field(default_factory=list)
    num_tokens: int = 0
    usage: Json | None = None


Give = Callable[[Piece], None]


@dataclass(frozen=True, slots=True)
class Address:
    """Where a Mailbox is, and the word without which it takes nothing."""

    host: str
    port: int
    secret: bytes = field(repr=False)


class Mailbox:
    """Takes the pieces of many streams from many replicas. Belongs to one event loop."""

    def __init__(self, host: str) -> None:
        """`host` is the address of this machine that replicas can reach."""
        self._host = host
        self._secret = secrets.token_bytes(SECRET_BYTES)
        self._boxes: dict[int, Give] = {}
        self._numbers = itertools.count()
        self._opening = asyncio.Lock()
        self._server: asyncio.Server | None = None

    async def address(self) -> Address:
        """Begins to listen when it is first asked for."""
        async with self._opening:
            if self._server is None:
                self._server = await asyncio.start_server(self._receive, self._host, 0)
        return Address(self._host, self._server.sockets[0].getsockname()[1], self._secret)

    @contextlib.contextmanager
    def box(self, give: Give) -> Iterator[int]:
        """The number under which `give` gets a stream's pieces."""
        number = next(self._numbers)
        self._boxes[number] = give
        try:
            yield number
        finally:
            del self._boxes[number]

    async def close(self) -> None:
        """Outlets lose their connections."""
        if self._server is not None:
            self._server.close()

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(HELLO_S):
                secret = await reader.readexactly(SECRET_BYTES)
            if not hmac.compare_digest(secret, self._secret):
                return
            while True:
                length = int.from_bytes(await reader.readexactly(LENGTH_BYTES))
                self._hand_out(await reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError, TimeoutError):
            pass  # the replica is gone; Ray tells those who wait for it
        finally:
            writer.close()

    def _hand_out(self, message: bytes) -> None:
        for number, chunks, num_tokens, usage in json.loads(message):
            if give := self._boxes.get(number):  # else nobody waits any more
                give(Piece(chunks=chunks, num_tokens=num_tokens, usage=usage))


class Outlets:
    """A replica's connections: one to each Mailbox."""

    def __init__(self) -> None:
        self._open: dict[Address, Outlet] = {}
        self._opening = asyncio.Lock()

    async def to(self, address: Address) -> Outlet:
        """Raises OSError where nobody listens."""
        async with self._opening:
            outlet = self._open.get(address)
            if outlet is None:
                leave = partial(self._open.pop, address, None)
                async with asyncio.timeout(CONNECT_S):
                    _, outlet = await asyncio.get_running_loop().create_connection(
                        lambda: Outlet(address.secret, leave), address.host, address.port
                    )
                self._open[address] = outlet
        return outlet


class Outlet(asyncio.Protocol):
    """One connection. What is given between two turns of the event loop is one message."""

    def __init__(self, secret: bytes, on_lost: Callable[[], Any]) -> None:
        self._secret, self._on_lost = secret, on_lost
        self._given: list[tuple[int, list[Json], int, Json | None]] = []
        self._tasks: set[asyncio.Task[Any]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._secret)

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_lost()
        for task in self._tasks:
            task.cancel()

    @contextlib.contextmanager
    def stream(self, number: int) -> Iterator[Give]:
        """Takes the pieces of stream `number`; the task is cancelled if the connection breaks."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            yield partial(self._give, number)
        finally:
            self._tasks.discard(task)

    def _give(self, number: int, piece: Piece) -> None:
        if not self._given:
            asyncio.get_running_loop().call_soon(self._send)
        self._given.append((number, piece.chunks, piece.num_tokens, piece.usage))

    def _send(self) -> None:
        message = json.dumps(self._given, separators=(",", ":")).encode()
        self._given = []
        self._transport.write(len(message).to_bytes(LENGTH_BYTES) + message)
