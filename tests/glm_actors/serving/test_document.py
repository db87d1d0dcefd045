"""What the interface says of itself: a document with every error, and a page that needs nothing but
itself.
"""

from __future__ import annotations

import asyncio
from html.parser import HTMLParser
from typing import Any

import httpx
import pytest

from glm_batch.glm_actors.serving.http.border import digest_of
from glm_batch.glm_actors.serving.http.document_page import page, type_text
from glm_batch.glm_actors.serving.http.http_app import build_app
from glm_batch.models.request_limits import RequestLimits
from tests.glm_actors.serving.conftest import TOKEN, LocalBackend


def get(path: str, token: str | None = TOKEN) -> httpx.Response:
    async def once() -> httpx.Response:
        app = build_app(LocalBackend({}), RequestLimits(max_n=7), digest_of(TOKEN))
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://server"
        ) as client:
            return await client.get(
                path, headers={"Authorization": f"Bearer {token}"} if token else {}
            )

    return asyncio.run(once())


def test_every_operation_names_its_errors_in_our_form() -> None:
    document = get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            statuses = operation["responses"].keys()
            assert "422" not in statuses
            assert ("401" in statuses) == (path != "/health") == bool(operation["security"])
            assert method != "post" or {"400", "404", "408", "413", "429", "503", "504"} <= statuses
    assert "HTTPValidationError" not in document["components"]["schemas"]
    assert document["x-limits"]["max_n"] == 7


def test_the_page_shows_the_document_and_loads_nothing() -> None:
    answer = get("/docs")
    assert answer.headers["Content-Type"].startswith("text/html")
    tags: list[str] = []
    texts: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: (
        tags.append(tag)
        or [  # type: ignore[func-returns-value,method-assign]
            pytest.fail(f"{tag} loads {value}")
            for name, value in attrs
            if name in ("src", "href", "style", "onload")
        ]
    )
    parser.handle_data = texts.append  # type: ignore[method-assign]
    parser.feed(answer.text)
    assert not {"script", "link", "img", "iframe", "object"} & set(tags)
    assert "url(" not in answer.text
    assert "@import" not in answer.text
    for path in get("/openapi.json").json()["paths"]:
        assert any(text.endswith(f" {path}") for text in texts)
    assert {"temperature", "max_completion_tokens", "labels", "max_n"} <= set(texts)


@pytest.mark.parametrize("path", ["/docs", "/openapi.json"])
def test_nobody_reads_it_without_the_token(path: str) -> None:
    assert get(path, None).status_code == 401


def test_texts_of_the_document_are_no_html() -> None:
    document: dict[str, Any] = {
        "info": {"title": "<b>", "version": "1", "description": "<i>&"},
        "paths": {},
    }
    assert "<b>" not in page(document)
    assert "&lt;i&gt;&amp;" in page(document)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"anyOf": [{"type": "integer", "minimum": 1, "maximum": 5}, {"type": "null"}]}, "integer from 1 to 5 or null"),
        ({"type": "array", "items": {"type": "string"}, "minItems": 1}, "list of (string) at least 1"),
        ({"enum": ["a", "b"]}, "'a', 'b'"),
        ({"$ref": "#/components/schemas/X"}, "{on: boolean}"),
        ({}, "anything"),
    ],
)  # fmt: skip
def test_schemas_in_words(schema: dict[str, Any], text: str) -> None:
    known = {"X": {"type": "object", "properties": {"on": {"type": "boolean"}}}}
    assert type_text(schema, known) == text
