"""Document: what the HTTP interface says of itself, as an OpenAPI document (/openapi.json) and a
page (/docs).

Owns which statuses each route may answer with. Fields and their ranges come from the protocol by
way of FastAPI, the limits from the configuration. Knows nothing of what routes do.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse

from glm_batch.glm_actors.serving.http.border import OPEN_PATHS
from glm_batch.glm_actors.serving.http.document_page import page
from glm_batch.models.request_limits import RequestLimits

Json = dict[str, Any]
STREAMING = ("/v1/chat/completions", "/v1/completions")
NOT_JSON = {"/metrics": "text/plain", "/docs": "text/html"}
ABOUT = "OpenAI's routes and some of our own. What a request asks for is done or refused: unknown fields are errors."
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
OF_ALL = (408, 413, 415, 431, 500, 503)
OF_POSTS = (400, 404, 429, 504)
TEXT_OR_NULL = {"type": ["string", "null"]}
ERROR: Json = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": TEXT_OR_NULL,
                "code": TEXT_OR_NULL,
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


def describe(app: FastAPI, caps: RequestLimits) -> None:
    """Gives an application with all its routes the document and the page, both made when they are
    first asked for.
    """

    @cache
    def document() -> Json:
        return _document(app, caps)

    @cache
    def html() -> str:
        return page(document())

    async def docs() -> HTMLResponse:
        """This page."""
        return HTMLResponse(html())

    app.openapi = document  # type: ignore[method-assign]
    app.get("/docs")(docs)


def _document(app: FastAPI, caps: RequestLimits) -> Json:
    found = get_openapi(title=app.title, version=app.version, description=ABOUT, routes=app.routes)
    components = found.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    # FastAPI's own form of errors, which is not ours
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["Error"] = ERROR
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            operation["responses"] = _responses(path, method)
            operation["security"] = [] if path in OPEN_PATHS else [{"key": []}]
    found["x-limits"] = asdict(caps)
    return found


def _responses(path: str, method: str) -> Json:
    kinds = [
        NOT_JSON.get(path, "application/json"),
        *(["text/event-stream"] if path in STREAMING else []),
    ]
    schemas = {
        kind: {"schema": {"type": "object"} if kind == "application/json" else {}} for kind in kinds
    }
    statuses = {
        *OF_ALL,
        *(() if path in OPEN_PATHS else (401,)),
        *(OF_POSTS if method == "post" else ()),
    }
    if "{" in path:
        statuses |= {400, 404}
    refused = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    errors = {
        str(each): {"description": STATUSES[each], "content": refused} for each in sorted(statuses)
    }
    if path == "/health":
        errors["503"]["content"] = {"application/json": {"schema": {"type": "object"}}}
    return {"200": {"description": "The answer.", "content": schemas}, **errors}
