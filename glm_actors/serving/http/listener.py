"""Listener: the HTTP server of a process, on one address.

Owns the socket and uvicorn around it. Knows nothing of what the application does.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn

from glm_batch.glm_actors.serving.http.connection import BoundedHead

POLL_S = 0.01
# idle connections live longer than those of usual clients, so that none is closed as it is used
KEEP_ALIVE_S = 75


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
