"""What clients send by default: taken, told and done; what would change an answer is never ignored."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from glm_batch.glm_actors.serving.http.border import Border
from glm_batch.glm_actors.serving.http.http_app import build_app
from glm_batch.glm_actors.serving.openai import prompter
from glm_batch.glm_actors.serving.openai.serve_settings import ServedModel
from glm_batch.glm_actors.serving.replicas.replica import Replica
from glm_batch.models.engine.api.interface import EngineOptions
from glm_batch.models.errors import RowError
from glm_batch.models.processing.prompt import Prompter
from glm_batch.models.request_limits import RequestLimits
from tests.glm_actors.serving.conftest import MODEL, TINY, LocalBackend
from tests.glm_actors.serving.test_tools import TOOLS

CHATS, COMPLETIONS, EMBEDDINGS = (
    f"/v1/{name}" for name in ("chat/completions", "completions", "embeddings")
)
USER = [{"role": "user", "content": "Where is my parcel?"}]
CHAT: dict[str, Any] = {"model": MODEL, "messages": USER, "max_tokens": 6, "temperature": 0}
CITY = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}},
    "required": ["a"],
    "additionalProperties": False,
}
CITY_FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": CITY, "strict": True}}
PART = {"type": "text", "text": "Where is my parcel?", "cache_control": {"type": "ephemeral"}}


@pytest.fixture(scope="module")
def replica() -> Iterator[Replica]:
    """As a configuration without limits of its own has it."""
    engine = EngineOptions(dtype="float32", kv_cache_tokens=1 << 16)
    built = Replica(ServedModel(model=TINY, engine=engine), RequestLimits(schema_s=20.0))
    yield built
    built.close()


@pytest.fixture(scope="module")
def app(replica: Replica) -> Border:
    return build_app(LocalBackend({MODEL: replica}), RequestLimits(), None)


def post(app: Border, path: str, body: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post(path, json=body)

    return asyncio.run(once())


def message(app: Border, **fields: Any) -> dict[str, Any]:
    answer = post(app, CHATS, CHAT | fields)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()["choices"][0]["message"]
    return found


# What a chat may have, and which of it the answer says was not used.
TAKEN: dict[str, tuple[dict[str, Any], str | None]] = {
    "OpenAI's fields": (
        {"service_tier": "auto", "safety_identifier": "u", "prompt_cache_key": "k", "verbosity": "low",
         "modalities": ["text"], "store": True, "prediction": {"type": "content", "content": "x"}},
        "prediction, prompt_cache_key, safety_identifier, service_tier, store, verbosity",
    ),
    "vLLM's defaults": (
        {"top_k": -1, "skip_special_tokens": True, "spaces_between_special_tokens": True,
         "add_generation_prompt": True, "continue_final_message": False, "use_beam_search": False,
         "include_stop_str_in_output": False, "length_penalty": 1.0, "priority": 0, "echo": False,
         "logit_bias": {}, "bad_words": []},
        None,
    ),
    "nulls": (
        {"logit_bias": None, "functions": None, "function_call": None, "no_such_field": None,
         "stream_options": None, "tools": None, "reasoning_effort": None, "n": None},
        None,
    ),
    "integers": ({"max_tokens": 6.0, "seed": 3.0, "n": 1.0, "top_k": 4.0}, None),
    "guidellm": (
        {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        "stream_options.continuous_usage_stats",
    ),
    "opencode": ({"max_tokens": 32000, "stop": ["e"]}, None),
    "no reasoning": ({"reasoning_effort": "none"}, None),
    "reasoning": ({"reasoning_effort": "low"}, None),
    "no reasoning in a format": ({"reasoning_effort": "high", "response_format": CITY_FORMAT}, None),
    "keys of tools": (
        {"tools": [{**TOOLS[0], "cache_control": {"type": "ephemeral"}}]}, "tools.*",
    ),
    "keys of parts": ({"messages": [{"role": "user", "content": [PART]}]}, "messages.content.cache_control"),
    "Z.ai": ({"do_sample": False, "tool_stream": True, "user_id": "me"}, "user_id, tool_stream"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_what_clients_send_by_default_is_answered_and_told(app: Border, name: str) -> None:
    fields, told = TAKEN[name]
    answer = post(app, CHATS, CHAT | fields)
    assert answer.status_code == 200, answer.text
    assert answer.headers.get("x-ignored-fields") == told


def test_hints_are_counted_by_name_and_refused_on_request(app: Border, replica: Replica) -> None:
    body = CHAT | {"cache_salt": "x", "user": "me"}
    assert post(app, CHATS, body).headers["x-ignored-fields"] == "user, cache_salt"

    async def metrics() -> str:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return (await client.get("/metrics")).text

    assert 'glm_ignored_fields_total{field="cache_salt"} 1.0' in asyncio.run(metrics())
    strict = build_app(LocalBackend({MODEL: replica}), RequestLimits(strict=True), None)
    refused = post(strict, CHATS, body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "user")
    assert post(strict, CHATS, CHAT | {"logit_bias": None}).status_code == 200


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHATS, {"logit_bias": {"5": 1}}, "logit_bias"),
        (CHATS, {"bad_words": ["x"]}, "bad_words"),
        (CHATS, {"skip_special_tokens": False}, "skip_special_tokens"),
        (CHATS, {"continue_final_message": True}, "continue_final_message"),
        (CHATS, {"use_beam_search": True}, "use_beam_search"),
        (CHATS, {"length_penalty": 0.5}, "length_penalty"),
        (CHATS, {"priority": 5}, "priority"),
        (CHATS, {"max_tokens": 16.5}, "max_tokens"),
        (CHATS, {"modalities": ["audio"]}, "modalities.0"),
        (CHATS, {"web_search_options": {}}, "web_search_options"),
        (CHATS, {"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        (CHATS, {"guided_json": "{"}, "guided_json"),
        (CHATS, {"guided_json": CITY, "response_format": CITY_FORMAT}, "guided_json"),
        (COMPLETIONS, {"prompt": "x", "suffix": "y"}, "suffix"),
        (EMBEDDINGS, {"input": "x", "dimensions": 3}, "dimensions"),
    ],
)
def test_what_would_change_an_answer_is_done_or_refused(
    app: Border, path: str, fields: dict[str, Any], param: str
) -> None:
    body = CHAT | fields if path == CHATS else {"model": MODEL, **fields}
    answer = post(app, path, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"choice": ["yes", 'n"o']}}, r'yes|n"o'),
        ({"guided_choice": ["maybe"]}, "maybe"),
        ({"structured_outputs": {"regex": "[0-9]{3}/[a-f]"}}, "[0-9]{3}/[a-f]"),
        ({"structured_outputs": {"grammar": 'start: "a" | "b"'}}, "a|b"),
        ({"structured_outputs": {"json": CITY}}, r'\{\s*"a"\s*:\s*[12]\s*\}'),
        ({"guided_json": json.dumps(CITY)}, r'\{\s*"a"\s*:\s*[12]\s*\}'),
    ],
)
def test_structured_outputs_hold_chat_and_completions(
    app: Border, fields: dict[str, Any], pattern: str
) -> None:
    assert re.fullmatch(pattern, message(app, max_tokens=80, **fields)["content"])
    body = {"model": MODEL, "prompt": "It is", "max_tokens": 80, "temperature": 0, **fields}
    assert re.fullmatch(pattern, post(app, COMPLETIONS, body).json()["choices"][0]["text"].strip())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_tools_with_a_format_give_a_call_or_the_format(
    app: Border, seed: int, stream: bool
) -> None:
    fields = {"tools": TOOLS, "response_format": CITY_FORMAT, "temperature": 1.5, "seed": seed}
    answer = post(app, CHATS, CHAT | fields | {"max_tokens": 400, "stream": stream})
    assert answer.status_code == 200, answer.text
    said: dict[str, Any] = {"content": "", "tool_calls": []}
    if stream:
        for line in answer.text.splitlines():
            if line.startswith("data: {"):
                delta = json.loads(line[6:])["choices"][0]["delta"]
                said["content"] += delta.get("content") or ""
                said["tool_calls"] += delta.get("tool_calls") or []
    else:
        said |= answer.json()["choices"][0]["message"]
    if said["tool_calls"]:
        names = {tool["function"]["name"] for tool in TOOLS}
        assert {call["function"]["name"] for call in said["tool_calls"]} <= names
        assert not said["content"]
    else:
        assert json.loads(said["content"])["a"] in (1, 2)


def test_only_allowed_tools_are_called(app: Border) -> None:
    names = [tool["function"]["name"] for tool in TOOLS]
    one = {"type": "function", "function": {"name": names[-1]}}
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [one]}}
    calls = message(app, tools=TOOLS, tool_choice=choice, max_tokens=400)["tool_calls"]
    assert [call["function"]["name"] for call in calls] == [names[-1]]
    unknown = json.loads(json.dumps(choice).replace(names[-1], "other"))
    assert post(app, CHATS, CHAT | {"tools": TOOLS, "tool_choice": unknown}).status_code == 400


def test_fields_that_are_done_change_the_answer_as_they_should(app: Border) -> None:
    ids = post(app, CHATS, CHAT | {"return_token_ids": True}).json()["choices"][0]["token_ids"]
    cut = post(app, CHATS, CHAT | {"stop_token_ids": [ids[2]], "return_token_ids": True}).json()
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert cut["choices"][0]["token_ids"] == ids[:3]
    assert message(app, temperature=1.9, do_sample=False) == message(app)
    size = len(post(app, EMBEDDINGS, {"model": MODEL, "input": "x"}).json()["data"][0]["embedding"])
    whole = {"model": MODEL, "input": ["x"] * 600, "dimensions": size, "encoding_format": None}
    assert len(post(app, EMBEDDINGS, whole).json()["data"]) == 600


def picture(side: int) -> str:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).convert("RGB").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def shown(url: str, **fields: str) -> list[dict[str, Any]]:
    part = {"type": "image_url", "image_url": {"url": url, **fields}, "uuid": "u"}
    return [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]


def test_an_image_may_be_bare_base64_and_have_hints(app: Border) -> None:
    data = picture(112)
    for url in (data, "data:image/png;base64," + data):
        answer = post(app, CHATS, CHAT | {"messages": shown(url, detail="high")})
        assert answer.headers["x-ignored-fields"] == "messages.content.uuid"
        assert (
            answer.json()["choices"]
            == post(app, CHATS, CHAT | {"messages": shown(data)}).json()["choices"]
        )


def test_an_image_of_low_detail_has_a_smaller_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompter, "SMALL_PIXELS", 56 * 56)
    made = prompter.RequestPrompter(TINY, RequestLimits())

    def num_tokens(*messages: dict[str, Any]) -> int:
        return len(made.conversation(messages).input_ids)

    large = "data:image/png;base64," + picture(840)
    low, high, auto = (shown(large, **each) for each in ({"detail": "low"}, {"detail": "high"}, {}))
    assert num_tokens(*low) < num_tokens(*high) == num_tokens(*auto)
    assert num_tokens(*auto, *low) == num_tokens(*low, *auto)
    assert num_tokens(*auto, *low) < num_tokens(*auto, *auto)
    made.close()
    del low[0]["content"][0]["uuid"]
    with pytest.raises(RowError, match="detail 'low' cannot be asked for"):
        Prompter(TINY).draft(low)  # a job has one budget for all its images


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", range(1, 9, 2))
def test_a_forced_call_that_is_cut_is_a_call_and_no_content(
    app: Border, max_tokens: int, stream: bool
) -> None:
    fields = {"tools": TOOLS[:1], "tool_choice": "required", "max_tokens": max_tokens}
    answer = post(app, CHATS, CHAT | fields | {"stream": stream})
    if stream:
        events = [json.loads(x[6:]) for x in answer.text.splitlines() if x.startswith("data: {")]
        deltas = [event["choices"][0]["delta"] for event in events]
        content = "".join(delta.get("content") or "" for delta in deltas)
        calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
        reason = events[-1]["choices"][0]["finish_reason"]
    else:
        choice = answer.json()["choices"][0]
        content, reason = choice["message"]["content"] or "", choice["finish_reason"]
        calls = choice["message"].get("tool_calls", [])
    assert content == ""
    assert reason == "length"
    name = TOOLS[0]["function"]["name"]
    assert all(call["function"]["name"] == name for call in calls)
    assert calls or max_tokens < 7


def test_a_call_by_name_ends_with_stop(app: Border) -> None:
    choice = {"type": "function", "function": {"name": TOOLS[0]["function"]["name"]}}
    fields = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 400}
    found = post(app, CHATS, CHAT | fields).json()["choices"][0]
    assert found["finish_reason"] == "stop"
    assert found["message"]["content"] is None
    assert len(found["message"]["tool_calls"]) == 1


def test_a_prompt_that_is_too_long_is_refused_in_words_that_clients_know(app: Border) -> None:
    long = [1] * 200_000
    body = {"model": MODEL, "input": [[1, 2], long]}
    error = post(app, EMBEDDINGS, body).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input.1")
    assert "This model's maximum context length is" in error["message"]
