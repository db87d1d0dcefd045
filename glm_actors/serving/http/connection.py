"""Connection: uvicorn's reading of HTTP, with bounds for a request's head: how large it is and when
it must be there.

Owns also that what is no HTTP gets OpenAI's form of an error. What a head says and what follows it
are the border's.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from glm_batch.glm_actors.serving.openai.api_errors import HEAD_BYTES, ApiError, head_too_large

HEAD_S = 15.0


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
