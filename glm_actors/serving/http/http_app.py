"""The HTTP interface: OpenAI's routes and our own as a FastAPI application over a Backend.

Owns routes, server-sent events, the form of errors and the counting of requests. Knows neither
models nor Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, Protocol, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from glm_batch.glm_actors.serving.http.border import Border
from glm_batch.glm_actors.serving.http.http_metrics import Metrics
from glm_batch.glm_actors.serving.http.pieces import Piece
from glm_batch.glm_actors.serving.openai.api_errors import (
    MAX_MESSAGE,
    ApiError,
    internal,
    of_problems,
    unknown_model,
)
from glm_batch.glm_actors.serving.openai.protocol import (
    Body,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
    Sampled,
    ScoreRequest,
    TokenizeRequest,
    ignored,
)
from glm_batch.models.request_limits import RequestLimits

Json = dict[str, Any]
Found = TypeVar("Found")
ABOUT = "OpenAI's routes and some of our own. What a request asks for is done or refused."
STATUSES = {
    400: "A field is wrong; `param` names it.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The request did not arrive in time.",
    413: "The body is too large.",
    415: "The body is compressed.",
    429: "The queue is full; Retry-After says when to come again.",
    431: "The headers are too large.",
    500: "The server failed; its log says more.",
    503: "The model is not available, or the server ends.",
    504: "The request took too long and was ended.",
}
ALWAYS = (408, 413, 415, 431, 500, 503)
KEY = HTTPBearer(auto_error=False)  # for the document; the border looks at it
CREATED = 0  # of a model: OpenAI wants a time, a checkpoint has none


class Backend(Protocol):
    """Where the models are. `answer` and `stream` raise ApiError; cancelling ends their work."""

    @property
    def models(self) -> list[str]: ...

    async def answer(self, model: str, body: Body) -> Json: ...

    def stream(self, model: str, body: Body) -> AsyncIterator[Piece]: ...

    async def stats(self) -> Mapping[str, list[Json]]:
        """Of each model, what its replicas tell."""
        ...

    async def is_healthy(self) -> bool: ...


class JsonResponse(JSONResponse):
    """Plain ASCII: half a surrogate pair in an echoed value must not end in an error of its own."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


class Refusal(BaseModel):
    """What is wrong with a request; `param` names the field."""

    message: str
    type: str
    param: str | None
    code: str | None


class Refused(BaseModel):
    """OpenAI's form of every error."""

    error: Refusal


def build_app(backend: Backend, caps: RequestLimits, token_digest: bytes | None) -> Border:
    """The application, behind its border."""
    app = FastAPI(
        title="glm-batch",
        description=ABOUT,
        docs_url=None,  # FastAPI's page loads its scripts from elsewhere
        redoc_url=None,
        default_response_class=JsonResponse,
        redirect_slashes=False,
    )
    _add_errors(app)
    _Routes(backend, caps).add_to(app)
    document = app.openapi()  # which FastAPI makes once
    document["x-limits"] = asdict(caps)
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # of which 400 takes the place here
    for name in ("HTTPValidationError", "ValidationError"):
        del document["components"]["schemas"][name]
    return Border(app, caps, token_digest)


def _told(*statuses: int, sse: bool = False) -> dict[str, Any]:
    """What a route's operation tells beside its answer, and that it wants the key."""
    responses: dict[int | str, Json] = {
        status: {"model": Refused, "description": STATUSES[status]}
        for status in (*ALWAYS, 401, *statuses)
    }
    if sse:
        responses[200] = {"content": {"text/event-stream": {}}}
    return {"responses": responses, "dependencies": [Depends(KEY)]}


class _Routes:
    """One method for each route."""

    def __init__(self, backend: Backend, caps: RequestLimits) -> None:
        self._backend, self._caps = backend, caps
        self._metrics = Metrics()

    def add_to(self, app: FastAPI) -> None:
        healthy = {**_told()["responses"], 503: {"description": "A model has no replica."}}
        del healthy[401]  # the one route that is open to all
        app.get("/health", responses=healthy)(self.health)
        app.get("/metrics", response_class=PlainTextResponse, **_told())(self.show_metrics)
        app.get("/docs", response_class=PlainTextResponse, **_told())(self.point_to_document)
        app.get("/v1/models", **_told())(self.list_models)
        app.get("/v1/models/{model:path}", **_told(400, 404))(self.show_model)
        for path, method in (
            ("/v1/chat/completions", self.chat),
            ("/v1/completions", self.complete),
            ("/v1/embeddings", self.embed),
            ("/v1/score", self.score),
            ("/v1/classify", self.classify),
            ("/tokenize", self.tokenize),
        ):
            streams = path.endswith("/completions")
            app.post(path, **_told(400, 404, 429, 504, sse=streams))(method)

    async def health(self) -> Response:
        """200 when every model has a replica that works."""
        healthy = await self._backend.is_healthy()
        return JsonResponse({"status": "ok" if healthy else "unavailable"}, 200 if healthy else 503)

    async def show_metrics(self) -> Response:
        """Prometheus' text form."""
        text = self._metrics.text(await self._backend.stats())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def point_to_document(self) -> Response:
        """Where the interface is described."""
        return PlainTextResponse("The interface is described at /openapi.json (OpenAPI 3.1).\n")

    async def list_models(self) -> Response:
        return JsonResponse(
            {"object": "list", "data": [_model_card(name) for name in self._backend.models]}
        )

    async def show_model(self, model: str) -> Response:
        return JsonResponse(_model_card(self._known(model)))

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        return await self._generate("chat", body, request)

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        return await self._generate("completions", body, request)

    async def embed(self, body: EmbeddingRequest, request: Request) -> Response:
        return await self._answer("embeddings", body, request)

    async def score(self, body: ScoreRequest, request: Request) -> Response:
        return await self._answer("score", body, request)

    async def classify(self, body: ClassifyRequest, request: Request) -> Response:
        return await self._answer("classify", body, request)

    async def tokenize(self, body: TokenizeRequest, request: Request) -> Response:
        return await self._answer("tokenize", body, request)

    async def _generate(
        self, route: str, body: ChatRequest | CompletionRequest, request: Request
    ) -> Response:
        if not body.stream:
            if body.stream_options is not None:
                raise ApiError(
                    400,
                    "stream_options: it goes with stream: true",
                    "invalid_value",
                    "stream_options",
                )
            return await self._answer(route, body, request)
        return await self._stream(route, body, request)

    async def _answer(self, route: str, body: Body, request: Request) -> Response:
        model, headers = self._known(body.model), self._told(body)
        with self._counted(model, route):
            found = await _unless_gone(request, self._backend.answer(model, body))
            self._metrics.count_usage(model, found.get("usage", {}))
        return JsonResponse(found, headers=headers)

    async def _stream(
        self, route: str, body: ChatRequest | CompletionRequest, request: Request
    ) -> Response:
        """Begins to answer once there is something to say: failures before have a status."""
        model, told = self._known(body.model), self._told(body)
        events = self._events(model, route, body)
        try:
            first = await _unless_gone(request, anext(events))
        except BaseException:
            await events.aclose()
            raise
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **told}
        return StreamingResponse(
            _rest(first, events), media_type="text/event-stream", headers=headers
        )

    async def _events(self, model: str, route: str, body: Sampled) -> AsyncGenerator[bytes, None]:
        """The stream as server-sent events. Raises ApiError before the first; later tells it."""
        wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        begun = last = time.monotonic()
        started = False
        envelope: Json = {}
        try:
            with self._counted(model, route):
                async with contextlib.aclosing(self._backend.stream(model, body)) as pieces:  # type: ignore[type-var,arg-type]
                    async for piece in pieces:
                        if piece.usage is not None:
                            self._metrics.count_usage(model, piece.usage)
                            if wants_usage:
                                yield _event({**envelope, "choices": [], "usage": piece.usage})
                        if not piece.chunks:
                            continue
                        now = time.monotonic()
                        if started:
                            self._metrics.between_tokens.labels(model).observe(
                                (now - last) / max(piece.num_tokens, 1)
                            )
                        else:
                            self._metrics.first_token.labels(model).observe(now - begun)
                        started, last, envelope = True, now, piece.chunks[-1]
                        yield b"".join(map(_event, piece.chunks))
        except ApiError as error:
            if not started:
                raise
            yield _event(error.body())
        yield b"data: [DONE]\n\n"

    def _told(self, body: Body) -> dict[str, str]:
        """The header that names the hints which are not used; they are counted. Raises ApiError."""
        names = ignored(body, self._caps)
        for name in names:
            self._metrics.ignored.labels(name).inc()
        return {"x-ignored-fields": ", ".join(names)} if names else {}

    def _known(self, model: str) -> str:
        if model not in self._backend.models:
            raise unknown_model(model, self._backend.models)
        return model

    @contextlib.contextmanager
    def _counted(self, model: str, route: str) -> Iterator[None]:
        begun, status = time.monotonic(), "200"
        self._metrics.in_flight.labels(model).inc()
        try:
            yield
        except ApiError as error:
            status = str(error.status)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            status = "gone"
            raise
        except (
            Exception
        ) as error:  # the border of a request: the client hears that it was not its fault
            status = "500"
            traceback.print_exception(error, file=sys.stderr)
            raise internal() from error
        finally:
            self._metrics.in_flight.labels(model).dec()
            self._metrics.requests.labels(model, route, status).inc()
            self._metrics.seconds.labels(model, route).observe(time.monotonic() - begun)


async def _rest(first: bytes, events: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(events) as all_:
        yield first
        async for event in all_:
            yield event


async def _unless_gone(request: Request, work: Awaitable[Found]) -> Found:
    """The result of `work`, which ends when the client leaves."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client is gone", "gone")
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(content: Json) -> bytes:
    return (
        b"data: " + json.dumps(content, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"
    )


def _model_card(name: str) -> Json:
    return {"id": name, "object": "model", "created": CREATED, "owned_by": "glm-batch"}


def _add_errors(app: FastAPI) -> None:
    """Every error in OpenAI's form."""

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return JsonResponse(error.body(), error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return await refused(_, of_problems(error.errors()))

    @app.exception_handler(HTTPException)
    async def refused_by_router(_: Request, error: HTTPException) -> Response:
        # which only the parser of a body raises
        code = "invalid_json" if error.status_code == 400 else None
        answer = await refused(
            _, ApiError(error.status_code, str(error.detail)[:MAX_MESSAGE], code)
        )
        answer.headers.update(error.headers or {})  # with 405: what is allowed
        return answer

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return await refused(_, internal())
