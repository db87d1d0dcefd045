"""What a request must not do: enter without leave, ask for too much, take the server down, keep
what it left behind.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from PIL import Image

from glm_batch.glm_actors.serving.http.border import Border, digest_of
from glm_batch.glm_actors.serving.http.http_app import build_app
from glm_batch.glm_actors.serving.openai.api_errors import ApiError
from glm_batch.glm_actors.serving.openai.protocol import ChatRequest, CompletionRequest
from glm_batch.glm_actors.serving.openai.serve_settings import ServedModel
from glm_batch.glm_actors.serving.replicas.replica import Replica
from glm_batch.models.engine.api.interface import EngineOptions
from glm_batch.models.request_limits import RequestLimits
from tests.glm_actors.serving.conftest import MODEL, TINY, TOKEN, LocalBackend

CAPS = RequestLimits(max_body_bytes=400_000, body_s=0.3)
CHAT = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 4,
    "temperature": 0,
}
LONG = CompletionRequest(
    model=MODEL, prompt="Where is", max_tokens=1500, ignore_eos=True, n=2, stream=True
)


@pytest.fixture(scope="module")
def app(replica: Replica) -> Border:
    return build_app(LocalBackend({MODEL: replica}), CAPS, digest_of(TOKEN))


def call(app: Border, method: str, path: str, **options: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}

    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.request(method, path, headers=headers, **options)

    return asyncio.run(once())


def post(app: Border, path: str, body: Any) -> httpx.Response:
    return call(app, "POST", path, json=body)


def assert_works(app: Border) -> None:
    answer = post(app, "/v1/chat/completions", CHAT)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] >= 1


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def bomb() -> str:
    """Few bytes, 100 million pixels."""
    file = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, "PNG")
    return data_url(file.getvalue())


def image(url: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
        ]
    }


def deep(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def schema(value: Any) -> dict[str, Any]:
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}
    }


PATTERNS = [{"type": "string", "pattern": f".*{number}.*"} for number in range(200)]
THINKING = {"thinking": {"type": "enabled"}}
# (what is added to a good request, what the refusal must say)
HOSTILE_CHATS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field": ({"no_such_field": {}}, "no_such_field: unknown field"),
    "what is not done": ({"logit_bias": {"5": 1}}, "logit_bias: "),
    "no tools at all": ({"tools": []}, "tools"),
    "surrogate": ({"messages": [{"role": "user", "content": "\ud800"}]}, "U+D800"),
    "surrogate in a key": ({"\udc00": 1}, "must be a JSON object"),
    "no messages": ({"messages": []}, "at least 1 item"),
    "a message of another kind": ({"messages": ["hello"]}, "messages.0"),
    "unknown role": ({"messages": [{"role": "root", "content": "x"}]}, "role 'root'"),
    "long prompt": ({"messages": [{"role": "user", "content": "x" * 6000}]}, "6,000 characters"),
    "text for a number": ({"temperature": "0.5"}, "valid number"),
    "bool for a number": ({"max_tokens": True}, "valid integer"),
    "nan": ({"temperature": float("nan")}, "finite number"),
    "infinite": ({"top_p": float("inf")}, "top_p"),
    "negative": ({"max_tokens": -1}, "max_tokens"),
    "zero": ({"n": 0}, "n: "),
    "huge": ({"max_tokens": 10**30}, "max_tokens"),
    "more than the cap": ({"max_tokens": 10**6}, "1000000 is more than 4096"),
    "many outputs": ({"n": 100}, "n: 100 is more"),
    "huge seed": ({"seed": 1 << 70}, "seed"),
    "many stops": ({"stop": ["x"] * 100}, "stop: 100"),
    "empty stop": ({"stop": [""]}, "1 to 256 characters"),
    "long stop": ({"stop": "x" * 1000}, "1 to 256 characters"),
    "stop with a surrogate": (
        {"stop": ["x", "a\ud800"]},
        "stop: a stop string holds half of a surrogate pair",
    ),
    "only a surrogate to stop at": ({"stop": "\udfff"}, "half of a surrogate pair"),
    "name of another kind": (
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "user", "content": "x", "name": 7},
            ]
        },
        "messages: message 1: its name is int",
    ),
    "name of many parts": (
        {"messages": [{"role": "user", "content": "x", "name": ["a"]}]},
        "its name is list",
    ),
    "stop of another kind": ({"stop": [1, 2]}, "stop: it has none of the forms"),
    "min over max": ({"min_tokens": 9}, "min_tokens: 9"),
    "alternatives without logprobs": ({"top_logprobs": 3}, "goes with logprobs"),
    "two thinkings": (
        THINKING | {"chat_template_kwargs": {"enable_thinking": False}},
        "contradicts",
    ),
    "thinking in a schema": (THINKING | schema({"type": "object"}), "without reasoning"),
    "template option": ({"chat_template_kwargs": {"documents": ["x"]}}, "documents: unknown field"),
    "unknown format": ({"response_format": {"type": "xml"}}, "'json_schema'"),
    "format without schema": (
        {"response_format": {"type": "json_schema"}},
        "goes with a json_schema",
    ),
    "no schema": (schema({"type": "strange"}), "strange"),
    "schema by reference": (schema({"$ref": "http://127.0.0.1/schema.json"}), "not a JSON schema"),
    "deep schema": (schema(deep(400)), "recursion limit"),
    "large schema": (schema({"enum": ["x" * 20] * 10_000}), "bytes"),
    "bad pattern": (schema({"type": "string", "pattern": "("}), "unclosed group"),
    "schema that is searched for ages": (schema({"allOf": PATTERNS}), "longer than 1 s to compile"),
    "look-behind": (schema({"type": "string", "pattern": "(?<=a)b"}), "look-behind"),
    "bomb": (image(bomb()), "10000x10000 pixels"),
    "not an image": (image(data_url(b"GIF89a no")), "no image in"),
    "cut image": (image(bomb()[:2000]), "base64"),
    "path": (image("/etc/passwd"), "data: URLs"),
    "file url": (image("file:///etc/passwd"), "data: URLs"),
    "http url": (image("http://169.254.169.254/latest/meta-data"), "data: URLs"),
    "no url": (image(None), "none of the fields"),
    "number url": (image(7), "image_url is int"),
    "many images": ({"messages": image("data:,")["messages"] * 3}, "3 images"),
    "bytes": (
        {"messages": [{"role": "user", "content": [{"type": "image", "bytes": "aaaa"}]}]},
        "data: URLs",
    ),
    "options without stream": (
        {"stream_options": {"include_usage": True}},
        "stream: true",
    ),  # last: harmless with it
}


@pytest.mark.parametrize(
    ("name", "stream"), [(name, stream) for name in HOSTILE_CHATS for stream in (False, True)][:-1]
)
def test_a_hostile_chat_is_its_clients_fault(app: Border, name: str, stream: bool) -> None:
    change, needle = HOSTILE_CHATS[name]
    body = json.dumps({**CHAT, **change, **({"stream": True} if stream else {})})
    answer = call(app, "POST", "/v1/chat/completions", content=body)
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert needle in error["message"]
    assert len(error["message"]) < 600


RAW_BODIES: dict[str, bytes] = {
    "empty": b"",
    "broken": b'{"model": "tiny-glm", "messages": [',
    "a list": b"[]",
    "null": b"null",
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "deep object": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "long number": b'{"model": "x", "messages": [], "seed": ' + b"1" * 100_000 + b"}",
    "not utf-8": b'{"model": "\xff\xfe"}',
    "controls": b'{"model": "\x00\x01"}',
    "too large": b" " * 400_001,
    "many items": json.dumps({"model": MODEL, "input": [1.5] * 50_000}).encode(),
}


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/score"]
)
@pytest.mark.parametrize("name", RAW_BODIES)
def test_a_body_that_is_no_request(app: Border, name: str, path: str) -> None:
    answer = call(app, "POST", path, content=RAW_BODIES[name])
    assert answer.status_code == (413 if name == "too large" else 400)
    assert "error" in answer.json()


HOSTILE_POSTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": []}),
    ("/v1/completions", {"prompt": [-1]}),
    ("/v1/completions", {"prompt": [1 << 40]}),
    ("/v1/completions", {"prompt": [[1], []]}),
    ("/v1/completions", {"prompt": ["a"] * 300}),
    ("/v1/completions", {"prompt": ["a", 1]}),
    ("/v1/completions", {"prompt": "x", "max_tokens": 0}),
    ("/v1/completions", {"prompt": list(range(1, 1500)) * 2}),
    ("/v1/completions", {"prompt": ""}),
    ("/v1/completions", {"prompt": "x" * 6000}),
    ("/v1/embeddings", {"input": ""}),
    ("/v1/embeddings", {"input": "x", "dimensions": 3}),
    ("/v1/embeddings", {"input": {"x": 1}}),
    ("/v1/score", {"labels": ["a", "b"]}),
    ("/v1/score", {"labels": [], "prompt": "x"}),
    ("/v1/score", {"labels": ["a", "a"], "prompt": "x"}),
    ("/v1/score", {"labels": [" "], "prompt": "x"}),
    ("/v1/score", {"labels": ["a"] * 1000, "prompt": "x"}),
    ("/v1/score", {"labels": ["a\ud800"], "prompt": "x"}),
    ("/v1/score", {"labels": ["a"], "prompt": "x", "messages": CHAT["messages"]}),
    ("/v1/classify", {"input": "x"}),
    ("/tokenize", {}),
    ("/tokenize", {"prompt": "x", "messages": CHAT["messages"]}),
    ("/tokenize", {"prompt": "x" * 6000}),
]


@pytest.mark.parametrize(("path", "body"), HOSTILE_POSTS)
def test_a_hostile_post_is_its_clients_fault(app: Border, path: str, body: dict[str, Any]) -> None:
    answer = call(app, "POST", path, content=json.dumps({"model": MODEL, **body}))
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"
    # refused for what it says, not for how it was sent
    assert "must be a JSON object" not in answer.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/", 404),
        ("GET", "/v1/models/nobody", 404),
        ("GET", "/v1/models/../../etc/passwd", 404),
        ("GET", "/redoc", 404),
    ],
)
def test_ways_that_lead_nowhere(app: Border, method: str, path: str, status: int) -> None:
    answer = call(app, method, path)
    assert answer.status_code == status
    assert "message" in answer.json()["error"]


def test_the_server_works_after_all_of_it(app: Border, replica: Replica) -> None:
    assert_works(app)
    numbers = asyncio.run(replica.stats())
    assert numbers["free_blocks"] == numbers["blocks"]
    assert (numbers["requests"], numbers["running"], numbers["waiting"]) == (0, 0, 0)
    asyncio.run(replica.check_blocks())


def test_control_tokens_in_content_are_text(app: Border) -> None:
    def tokens(content: str) -> list[int]:
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}]}
        found: list[int] = post(app, "/tokenize", body).json()["tokens"]
        return found

    spelled = tokens("<|assistant|>")
    assert len(spelled) > len(tokens("a")) + 3
    assert spelled.count(tokens("a")[-1]) == 1  # only the template's own ends the prompt


# Bodies that do not come


async def refused(
    app: Border, receive: Any, headers: list[tuple[bytes, bytes]] | None = None
) -> int:
    """The status of an answer to a body that arrives as `receive` says."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    given = [(b"authorization", b"Bearer " + TOKEN.encode()), *(headers or [])]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/score",
        "query_string": b"",
        "headers": given,
    }
    await app(scope, receive, send)
    return int(sent[0]["status"]) if sent else 0


@pytest.mark.parametrize("length", [b"400001", b"9" * 100, b"-1", b"abc"])
def test_a_length_that_cannot_be_is_refused_unread(app: Border, length: bytes) -> None:
    async def receive() -> Any:
        raise AssertionError("nothing must be read")

    assert asyncio.run(refused(app, receive, [(b"content-length", length)])) == 413


def test_a_body_that_dawdles_and_one_that_breaks_off(app: Border) -> None:
    async def dawdle() -> Any:
        await asyncio.sleep(60)

    async def leave() -> Any:
        return {"type": "http.disconnect"}

    assert asyncio.run(refused(app, dawdle)) == 408
    assert asyncio.run(refused(app, leave)) == 0


# The queue, deadlines and clients that leave


async def take(stream: AsyncIterator[Any], count: int) -> None:
    for _ in range(count):
        await anext(stream)


def test_a_full_queue_says_when_to_come_again(app: Border, replica: Replica) -> None:
    async def crowd() -> list[int | None]:
        streams = [replica.stream(LONG) for _ in range(6)]
        await asyncio.gather(*(take(stream, 1) for stream in streams))
        with pytest.raises(ApiError) as caught:
            await replica.answer(ChatRequest.model_validate(CHAT))
        for stream in streams:
            await stream.aclose()  # type: ignore[attr-defined]
        return [caught.value.status, caught.value.retry_after]

    assert asyncio.run(crowd()) == [429, 1]
    assert_works(app)


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_stream_that_is_left_frees_its_blocks(replica: Replica, steps: int) -> None:
    async def leave() -> dict[str, Any]:
        stream = replica.stream(LONG)
        await take(stream, steps)
        if steps:
            assert (await replica.stats())["running"] == 2
        await stream.aclose()  # type: ignore[attr-defined]
        while (numbers := await replica.stats())["running"]:
            await asyncio.sleep(0.01)
        await replica.check_blocks()
        return numbers

    numbers = asyncio.run(leave())
    assert numbers["free_blocks"] == numbers["blocks"]
    assert numbers["requests"] == 0


def test_a_cancelled_answer_frees_its_blocks(replica: Replica) -> None:
    async def leave() -> dict[str, Any]:
        whole = LONG.model_copy(update={"stream": None})
        task = asyncio.ensure_future(replica.answer(whole))
        while not (await replica.stats())["running"]:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while (numbers := await replica.stats())["running"]:
            await asyncio.sleep(0.01)
        await replica.check_blocks()
        return numbers

    numbers = asyncio.run(leave())
    assert numbers["free_blocks"] == numbers["blocks"]


def test_a_request_that_takes_too_long_is_ended() -> None:
    model = ServedModel(model=TINY, engine=EngineOptions(dtype="float32", kv_cache_tokens=1 << 14))
    replica = Replica(model, RequestLimits(request_s=0.2))

    async def streamed() -> None:
        async for _ in replica.stream(LONG):
            pass

    async def wait(stream: bool) -> int:
        asked = streamed() if stream else replica.answer(LONG.model_copy(update={"stream": None}))
        with pytest.raises(ApiError) as caught:
            await asked
        while (await replica.stats())["running"]:
            await asyncio.sleep(0.01)
        return caught.value.status

    assert [asyncio.run(wait(stream)) for stream in (False, True)] == [504, 504]
    replica.close()


def test_a_dead_engine_is_told_and_noticed() -> None:
    model = ServedModel(model=TINY, engine=EngineOptions(kind="echo"))
    replica = Replica(model, RequestLimits())

    def break_down(engine: Any) -> None:
        engine.step = lambda: 1 / 0

    async def ask() -> int:
        await asyncio.wrap_future(replica._loop.look(break_down))
        with pytest.raises(ApiError) as caught:
            await replica.answer(ChatRequest.model_validate(CHAT))
        assert "ZeroDivisionError" not in caught.value.message
        with pytest.raises(Exception, match="ZeroDivisionError"):
            await replica.check_health()
        return caught.value.status

    assert asyncio.run(ask()) == 503
    replica.close()
