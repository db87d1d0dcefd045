"""Listener: uvicorn on one address, with bounds for how large a request's head is and when it must
be there.
"""

from __future__ import annotations

import asyncio
import json
import socket
from http import HTTPStatus
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from glm_batch.glm_actors.serving.openai.api_errors import HEAD_BYTES, ApiError, head_too_large

POLL_S = 0.01
# idle connections live longer than those of usual clients, so that none is closed as it is used
KEEP_ALIVE_S = 75
HEAD_S = 15.0


class Listener:
    """Serves an ASGI application in the running event loop, until `close`."""

    def __init__(self, app: Any, host: str, port: int) -> None:
        """Raises OSError when the address cannot be used."""
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        self._socket = socket.socket(family, kind, protocol)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # with the one that this one replaces
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            self._socket.bind(address)
        except OSError:
            self._socket.close()
            raise
        config = uvicorn.Config(
            app,
            http=BoundedHead,
            lifespan="off",
            ws="none",
            access_log=False,
            log_level="warning",
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        self._server = uvicorn.Server(config)

    async def start(self) -> None:
        """Returns once it answers."""
        self._serving = asyncio.ensure_future(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            if self._serving.done():
                self._serving.result()
                raise OSError("the HTTP server has ended by itself")
            await asyncio.sleep(POLL_S)

    async def close(self) -> None:
        """Takes no new connection and waits for those that are being answered."""
        self._server.should_exit = True
        await self._serving
        self._socket.close()


class BoundedHead(HttpToolsProtocol):
    """A connection whose next request's head must be there within HEAD_S, and not be larger than
    HEAD_BYTES.

    Without it, what sends headers without end or does not finish them holds memory or a connection
    for ever.
    """

    _alarm: asyncio.TimerHandle | None = None
    _open_head_bytes: int | None = 0  # of a head that has not come to its end; None: there is none

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # what ends another request as well does not count
        begun = self._open_head_bytes is not None
        super().data_received(data)
        if begun and self._open_head_bytes is not None:
            self._open_head_bytes += len(data)
            if self._open_head_bytes > HEAD_BYTES:
                self._refuse(head_too_large())

    def on_message_begin(self) -> None:
        self._await_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "this is not HTTP as it has to be", "invalid_http"))

    def _await_head(self) -> None:
        self._end_head()
        self._open_head_bytes = 0
        self._alarm = self.loop.call_later(HEAD_S, self._end_late)

    def _end_late(self) -> None:
        if self._open_head_bytes:
            self._refuse(
                ApiError(
                    408, f"the request's headers did not arrive within {HEAD_S:g} s", "timeout"
                )
            )
        else:
            # a client that has opened a connection and asked nothing expects no answer
            self.transport.close()

    def _end_head(self) -> None:
        self._open_head_bytes = None
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _refuse(self, error: ApiError) -> None:
        """Ends the connection; an answer that is on its way on it is not mixed with another."""
        self._end_head()
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = json.dumps(error.body())
            lines = [
                f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
                "Content-Type: application/json",
            ]
            lines += [f"Content-Length: {len(body)}", "Connection: close", "", body]
            self.transport.write("\r\n".join(lines).encode())
        self.transport.close()
