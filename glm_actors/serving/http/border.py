"""Border: what every HTTP request must pass before anything looks at what it says.

Owns the token, the size of a body and the time it may take to arrive, and the refusal of new work
once the server ends. Plain ASGI: answers in OpenAI's form by itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from glm_batch.glm_actors.serving.openai.api_errors import (
    HEAD_BYTES,
    ApiError,
    head_too_large,
    too_large,
    unavailable,
)
from glm_batch.models.request_limits import RequestLimits

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/health",)


def digest_of(token: str) -> bytes:
    """What the server keeps of its token."""
    return hashlib.sha256(token.encode()).digest()


class Border:
    """Wraps an ASGI app. `token_digest` None lets all in; `draining` refuses what is new.

    `num_active` requests are being answered.
    """

    def __init__(self, app: App, caps: RequestLimits, token_digest: bytes | None) -> None:
        self._app, self._caps, self._token_digest = app, caps, token_digest
        self.draining = False
        self.num_active = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # there are none here, and nobody has shown a token
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = {name.lower(): value for name, value in scope["headers"]}
            if sum(len(name) + len(value) for name, value in scope["headers"]) > HEAD_BYTES:
                raise head_too_large()
            if scope["path"] not in OPEN_PATHS:
                self._check_token(headers.get(b"authorization", b""))
            if self.draining:
                raise unavailable()
            if headers.get(b"content-encoding", b"identity").lower() != b"identity":
                raise ApiError(
                    415,
                    "Content-Encoding: send the body as it is, not compressed",
                    "unsupported_encoding",
                )
            body = await self._read(headers.get(b"content-length"), receive)
        except ApiError as error:
            await refuse(error, send)
            return
        if body is None:  # the client is gone
            return
        self.num_active += 1
        try:
            await self._app(scope, _replay(body, receive), send)
        finally:
            self.num_active -= 1

    def _check_token(self, header: bytes) -> None:
        if self._token_digest is None:
            return
        scheme, _, token = header.partition(b" ")
        given = hashlib.sha256(token.strip()).digest()
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given, self._token_digest):
            what = "no API key was given" if not header else "the API key is wrong"
            raise ApiError(401, f"{what}; send it as: Authorization: Bearer KEY", "invalid_api_key")

    async def _read(self, length: bytes | None, receive: Receive) -> bytes | None:
        most = self._caps.max_body_bytes
        if length is not None and (not length.isdigit() or int(length[:20]) > most):
            raise too_large(most)
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._caps.body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise too_large(most)
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {self._caps.body_s:g} s", "timeout"
            ) from None


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body once; then whatever else comes, which is the client's leaving."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def refuse(error: ApiError, send: Send) -> None:
    """Answers instead of the application, which has not read the body, and never will."""
    body = json.dumps(error.body()).encode()
    headers = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
    }
    headers |= error.headers
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
