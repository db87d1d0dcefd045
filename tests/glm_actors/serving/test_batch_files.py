"""The same requests in an OpenAI batch file and over HTTP: the same status and the same body."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest

from glm_batch.glm_actors.serving.http.http_app import build_app
from glm_batch.glm_actors.serving.openai.serve_settings import ServedModel
from glm_batch.glm_actors.serving.replicas.replica import Replica
from glm_batch.models.engine.api.interface import EngineOptions
from glm_batch.models.request_limits import RequestLimits
from glm_batch.pipelines.job import EngineSection, RequestsSection
from tests.glm_actors.serving.conftest import ROOT, TINY, LocalBackend
from tests.pipelines.openai_batch.batch_files import Json, answer_all, line, make_job, write_lines

MODEL = Path(TINY).name
LIMITS = RequestLimits(
    max_tokens=64,
    max_n=3,
    max_media=2,
    max_pixels=1_000_000,
    max_prompt_chars=5000,
    max_inputs=4,
    schema_s=20.0,
)
CHAT, COMPLETIONS, EMBEDDINGS, SCORE, CLASSIFY = (
    f"/v1/{name}" for name in ("chat/completions", "completions", "embeddings", "score", "classify")
)
ORDER = {"type": "object", "properties": {"order": {"type": "string"}}, "required": ["order"]}
Asked = tuple[str, Any]


def said(text: Any, role: str = "user") -> Json:
    return {"role": role, "content": text}


def chat(*messages: Json, **more: Any) -> Asked:
    return CHAT, {
        "model": MODEL,
        "messages": list(messages),
        "temperature": 0.0,
        "max_tokens": 24,
        **more,
    }


def of(url: str, **more: Any) -> Asked:
    return url, {"model": MODEL, **more}


def shown(kind: str, data: bytes) -> Json:
    return {
        "type": f"{kind}_url",
        f"{kind}_url": {"url": f"data:{kind}/any;base64," + base64.b64encode(data).decode()},
    }


def first_medium(folder: str, kind: str) -> bytes:
    (path,) = (ROOT / "examples" / folder).glob("*-1.parquet")
    medium: bytes = pq.read_table(path)[kind][0].as_py()
    return medium


def good_requests() -> list[Asked]:
    ticket = said("Write a one-line reply to this ticket.\n\nWhere is my parcel?")
    system = said("You work at the support desk of a web shop.", "developer")
    image = [
        shown("image", first_medium("shapes", "image")),
        {"type": "text", "text": "Which colour is it?"},
    ]
    clip = [
        shown("video", first_medium("clips", "video")),
        {"type": "text", "text": "In which direction?"},
    ]
    schema = {"type": "json_schema", "json_schema": {"name": "order", "schema": ORDER}}
    return [
        chat(system, ticket),
        chat(ticket, max_completion_tokens=5, user="me", metadata={"a": "b"}),
        chat(ticket, temperature=0.8, top_p=0.9, top_k=20, n=3, seed=11, stop=["e", "."]),
        chat(
            ticket,
            temperature=1.2,
            min_p=0.01,
            seed=-4,
            repetition_penalty=1.1,
            presence_penalty=0.5,
        ),
        chat(ticket, logprobs=True, top_logprobs=3, return_token_ids=True),
        chat(ticket, response_format=schema),
        chat(ticket, response_format={"type": "json_object"}, max_tokens=12),
        chat(ticket, thinking={"type": "enabled"}),
        chat(ticket, chat_template_kwargs={"enable_thinking": False}),
        chat(said("Hi"), said("Hello.", "assistant"), ticket),
        chat(ticket, service_tier="auto", verbosity=None, logit_bias={}, max_tokens=8.0),
        chat(ticket, structured_outputs={"choice": ["yes", "no"]}, reasoning_effort="low"),
        chat(said([shown("image", first_medium("shapes", "image")) | {"uuid": "u"}])),
        chat(said(image)),
        chat(said([image[0], *image]), logprobs=True),
        chat(said(clip)),
        of(COMPLETIONS, prompt="Where is my", temperature=0),
        of(
            COMPLETIONS,
            prompt=["Where is my", "Thanks, our"],
            n=2,
            seed=3,
            logprobs=2,
            max_tokens=6,
        ),
        of(COMPLETIONS, prompt=[5, 6, 7], temperature=0, min_tokens=2, max_tokens=4),
        of(
            COMPLETIONS, prompt=[[5, 6, 7], [8]], temperature=0, max_tokens=4, return_token_ids=True
        ),
        of(COMPLETIONS, prompt="Where is my", echo=True, temperature=0, max_tokens=4),
        of(COMPLETIONS, prompt=["Where is my", "Thanks, our"], echo=True, logprobs=2, max_tokens=0),
        of(
            COMPLETIONS, prompt=[[5, 6, 7], [8]], echo=True, logprobs=1, temperature=0, max_tokens=3
        ),
        of(EMBEDDINGS, input="a text"),
        of(EMBEDDINGS, input=["a text", "and another"], pooling="mean", normalize=False),
        of(EMBEDDINGS, input=[[5, 6, 7], [8, 9]], encoding_format="base64"),
        of(
            SCORE,
            prompt="Which team? My card was charged twice.",
            labels=["billing", "shipping", "other"],
        ),
        of(SCORE, messages=[said(image)], labels=["red", "green"], end_of_label="always"),
    ]


def bad_requests() -> list[Asked]:
    ticket = said("Where is my parcel?")
    url = {"type": "image_url", "image_url": {"url": "http://example.com/a.png"}}
    deep: Any = {"type": "object"}
    for _ in range(300):
        deep = {"allOf": [deep]}
    return [
        (CHAT, 5), (CHAT, "text"), (CHAT, []), (CHAT, {}), (CHAT, {"model": MODEL}),
        chat(), chat(ticket, unknown=1), chat(ticket, max_tokens=0), chat(ticket, max_tokens=65),
        chat(ticket, max_tokens="5"), chat(ticket, temperature=3), chat(ticket, temperature=float("nan")),
        chat(ticket, n=4), chat(ticket, stop=[""]), chat(ticket, stop="x" * 257), chat(ticket, top_logprobs=2),
        chat(ticket, stream_options={"include_usage": True}), chat(ticket, model="gpt-9"), chat(ticket, model=5),
        chat(ticket, response_format={"type": "json_schema"}),
        chat(ticket, response_format={"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}),
        chat(ticket, response_format={"type": "json_schema", "json_schema": {"schema": deep}}),
        chat(ticket, thinking={"type": "enabled"}, response_format={"type": "json_object"}),
        chat(ticket, thinking={"type": "enabled"}, chat_template_kwargs={"enable_thinking": False}),
        chat(said("x", "nobody")), chat(said(5)), chat({"role": "user"}), chat(said("x" * 5001)), chat(said("\ud800")),
        chat(said([url])), chat(said([shown("image", b"no image")])),
        chat(said([shown("image", first_medium("shapes", "image"))] * 3)),
        of(COMPLETIONS, prompt=[5] * 40_000),
        of(COMPLETIONS, prompt=[]), of(COMPLETIONS, prompt=[[]]), of(COMPLETIONS, prompt=["x"] * 5),
        of(COMPLETIONS, prompt=[-1]), of(COMPLETIONS, prompt=[1 << 20]), of(COMPLETIONS, prompt={"a": 1}),
        of(COMPLETIONS, prompt=""), of(COMPLETIONS, prompt="\ud800"),
        of(EMBEDDINGS, input="x", encoding_format="hex"), of(EMBEDDINGS, input=["x", 5]),
        of(SCORE, prompt="x", labels=[]), of(SCORE, prompt="x", labels=["a", "a"]), of(SCORE, labels=["a"]),
        of(SCORE, prompt="x", system="y", messages=[ticket], labels=["a"]),
        of(CLASSIFY, input="x"),
    ]  # fmt: skip


@pytest.fixture(scope="module", params=["echo", "torch"])
def served(request: pytest.FixtureRequest) -> Iterator[Replica]:
    engine = EngineOptions(kind=request.param, dtype="float32", kv_cache_tokens=1 << 14)
    built = Replica(ServedModel(model=TINY, engine=engine), LIMITS)
    yield built
    built.close()


def over_http(replica: Replica, requests: list[Asked]) -> list[tuple[int, Json]]:
    app: Any = build_app(LocalBackend({MODEL: replica}), LIMITS, None)

    async def ask() -> list[tuple[int, Json]]:
        transport = httpx.ASGITransport(app=app)
        answers = []
        async with httpx.AsyncClient(
            transport=transport, base_url="http://here", timeout=120.0
        ) as client:
            for url, body in requests:
                headers = {"Content-Type": "application/json"}
                answer = await client.post(url, content=json.dumps(body), headers=headers)
                answers.append((answer.status_code, answer.json()))
        return answers

    return asyncio.run(ask())


def in_a_file(folder: Path, kind: Any, requests: list[Asked]) -> list[tuple[int, Json]]:
    lines = [line(str(number), url, body) for number, (url, body) in enumerate(requests)]
    write_lines(folder / "requests.jsonl", lines)
    engine = EngineSection(kind=kind, dtype="float32")
    job = make_job(TINY, folder, requests=RequestsSection(limits=LIMITS), engine=engine)
    good, bad = answer_all(job)
    assert all(each["response"]["status_code"] == 200 for each in good)
    found = {each["custom_id"]: each["response"] for each in [*good, *bad]}
    return [
        (found[each["custom_id"]]["status_code"], found[each["custom_id"]]["body"])
        for each in lines
    ]


def same(a: Any, b: Any, tolerance: float) -> bool:
    """Equal but for what is of one answer alone: its id, its time, and what the cache held when it
    came.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        own = {"id", "created"} | ({"cached_tokens"} if tolerance else set())
        return a.keys() == b.keys() and all(
            key in own or same(a[key], b[key], tolerance) for key in a
        )
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= tolerance
    return type(a) is type(b) and a == b


def test_answers_are_the_same(
    served: Replica, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kind = request.node.callspec.params["served"]
    requests = good_requests()
    tolerance = 0.0 if kind == "echo" else 2e-5
    if tolerance:  # vectors as numbers, which may differ in their last digits
        requests = [
            (url, {**body, "encoding_format": "float"} if url == EMBEDDINGS else body)
            for url, body in requests
        ]
    expected, found = over_http(served, requests), in_a_file(tmp_path, kind, requests)
    assert [status for status, _ in expected] == [200] * len(requests)
    for (_, body), theirs, ours in zip(requests, expected, found, strict=True):
        assert same(list(theirs), list(ours), tolerance), (str(body)[:300], theirs, ours)


@pytest.mark.parametrize("served", ["torch"], indirect=True)
def test_refusals_are_the_same(
    served: Replica, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kind = request.node.callspec.params["served"]
    requests = bad_requests()
    expected, found = over_http(served, requests), in_a_file(tmp_path, kind, requests)
    for (_, body), theirs, ours in zip(requests, expected, found, strict=True):
        assert 400 <= theirs[0] < 500, (str(body)[:300], theirs)
        assert ours == theirs, str(body)[:300]
