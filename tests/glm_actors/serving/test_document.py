"""What the interface says of itself: a document with every error, and a page that needs nothing but
itself.
"""

from __future__ import annotations

import asyncio

import httpx
import pytest

from glm_batch.glm_actors.serving.http.border import digest_of
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
            assert ("401" in statuses) == (path != "/health") == bool(operation.get("security"))
            assert method != "post" or {"400", "404", "408", "413", "429", "503", "504"} <= statuses
            answer = operation["responses"]["200"]["content"].get("application/json")
            assert answer is None or answer["schema"] == {}
    assert "HTTPValidationError" not in document["components"]["schemas"]
    assert document["x-limits"]["max_n"] == 7


def test_the_page_points_to_the_document_and_loads_nothing() -> None:
    answer = get("/docs")
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert "/openapi.json" in answer.text
    document = get("/openapi.json").json()
    assert document["paths"]["/docs"]["get"]["responses"]["200"]["content"].keys() == {"text/plain"}
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"temperature", "max_completion_tokens"} <= fields.keys()
    stream = document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert stream.keys() == {"application/json", "text/event-stream"}


@pytest.mark.parametrize("path", ["/docs", "/openapi.json"])
def test_nobody_reads_it_without_the_token(path: str) -> None:
    assert get(path, None).status_code == 401
