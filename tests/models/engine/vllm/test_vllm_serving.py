"""A served model with engine.kind vllm: torch's answers, whole and in pieces, and online requests
before batch ones.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from glm_batch.glm_actors.serving.openai.api_errors import ApiError
from glm_batch.glm_actors.serving.openai.protocol import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    ScoreRequest,
)
from glm_batch.glm_actors.serving.openai.serve_settings import ServedModel
from glm_batch.glm_actors.serving.replicas.replica import Replica
from glm_batch.glm_actors.shared.shared_model import BatchWork
from glm_batch.models.engine import EngineConfig, Generate, Request, SamplingParams, build_engine
from glm_batch.models.engine.api.interface import EngineOptions
from glm_batch.models.engine.api.request import BATCH, ONLINE
from glm_batch.models.request_limits import RequestLimits
from tests.glm_actors.serving.conftest import MODEL, TINY

CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Where is my parcel?"}],
    "temperature": 0.0,
    "max_tokens": 24,
}
SCHEMA = {"type": "object", "properties": {"queue": {"enum": ["a", "b"]}}, "required": ["queue"]}


@pytest.fixture(scope="module")
def replica() -> Iterator[Replica]:
    built = served("vllm")
    yield built
    built.close()


@pytest.fixture(scope="module")
def torch_replica() -> Iterator[Replica]:
    built = served("torch")
    yield built
    built.close()


def served(kind: Any) -> Replica:
    engine = EngineOptions(kind=kind, dtype="float32", max_model_len=512, kv_cache_tokens=1 << 13)
    return Replica(ServedModel(model=TINY, engine=engine), RequestLimits())


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate(CHAT | fields)


def text_of(answer: Any) -> str:
    return str(answer["choices"][0]["message"]["content"])


async def streamed(replica: Replica, body: Any) -> list[dict[str, Any]]:
    return [chunk["choices"][0] async for piece in replica.stream(body) for chunk in piece.chunks]


def test_answers_are_those_of_torch(replica: Replica, torch_replica: Replica) -> None:
    async def both(body: Any) -> tuple[Any, Any]:
        return await replica.answer(body), await torch_replica.answer(body)

    mine, theirs = asyncio.run(both(chat(n=2)))
    assert text_of(mine) == text_of(theirs)
    assert mine["usage"] == theirs["usage"] | {
        "prompt_tokens_details": mine["usage"]["prompt_tokens_details"]
    }
    labels = ScoreRequest(
        model=MODEL, labels=["billing", "delivery", "account"], prompt="Where is my parcel?"
    )
    mine, theirs = asyncio.run(both(labels))
    assert mine["label"] == theirs["label"]
    assert mine["label_probs"] == pytest.approx(theirs["label_probs"], abs=1e-3)
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    found = asyncio.run(replica.answer(chat(response_format=wanted)))
    assert json.loads(text_of(found))["queue"] in ("a", "b")


@pytest.mark.parametrize(
    "fields", [{}, {"logprobs": True, "top_logprobs": 2}, {"n": 2}, {"stop": ["oun"]}]
)
def test_a_stream_comes_as_it_is_written_and_is_the_whole_answer(
    replica: Replica, fields: dict[str, Any]
) -> None:
    async def ask() -> tuple[Any, list[dict[str, Any]]]:
        return await replica.answer(chat(**fields)), await streamed(
            replica, chat(stream=True, **fields)
        )

    whole, chunks = asyncio.run(ask())
    for choice in whole["choices"]:
        own = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
        texts = [chunk["delta"].get("content") or "" for chunk in own]
        assert "".join(texts) == choice["message"]["content"]
        assert sum(map(bool, texts)) > 1 or fields.get("stop")
        assert own[-1]["finish_reason"] == choice["finish_reason"]


def test_who_leaves_makes_room(replica: Replica) -> None:
    body = CompletionRequest.model_validate(
        {"model": MODEL, "prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
    )

    async def leave() -> None:
        stream = replica.stream(body)
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        async with asyncio.timeout(20.0):
            while await asyncio.wrap_future(replica._loop.look(lambda engine: engine.has_work())):
                await asyncio.sleep(0.01)

    asyncio.run(leave())


def test_what_vllm_cannot_do_is_refused_and_loads_no_second_model(replica: Replica) -> None:
    with pytest.raises(ApiError) as caught:
        asyncio.run(replica.answer(EmbeddingRequest(model=MODEL, input="x")))
    assert (caught.value.status, caught.value.code) == (400, "unsupported_work")
    assert "engine.kind torch" in caught.value.message
    assert asyncio.run(replica.answer(chat()))["choices"]


def test_a_prompt_is_echoed_with_its_log_probabilities(replica: Replica) -> None:
    echo = {"model": MODEL, "prompt": "a b c", "echo": True, "logprobs": 1, "max_tokens": 0}
    body = CompletionRequest.model_validate(echo)
    (choice,) = asyncio.run(replica.answer(body))["choices"]
    found = choice["logprobs"]["token_logprobs"]
    assert found[0] is None
    assert all(value < 0 for value in found[1:])
    assert len(found) > 2


def test_a_batch_job_uses_the_same_replica(replica: Replica) -> None:
    work = Generate(sampling=SamplingParams(max_tokens=8, ignore_eos=True))
    requests = [
        Request(id=f"b{i}", input_ids=[5, 6, 7 + i], work=work, priority=BATCH) for i in range(20)
    ]

    async def beside() -> tuple[Any, Any]:
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        message = BatchWork(caller="c", identity=replica.identity, requests=requests)
        return await asyncio.gather(replica.work(message, gone), replica.answer(chat()))

    batch, answer = asyncio.run(beside())
    assert [completion.id for completion in batch] == [request.id for request in requests]
    assert all(completion.output_tokens == 8 for completion in batch)
    assert text_of(answer) == text_of(asyncio.run(replica.answer(chat())))


def test_who_waits_online_goes_before_a_batch() -> None:
    config = EngineConfig(
        model=TINY,
        kind="vllm",
        dtype="float32",
        max_model_len=256,
        kv_cache_tokens=2048,
        max_num_seqs=2,
    )
    engine = build_engine(config)
    work = Generate(sampling=SamplingParams(max_tokens=4, ignore_eos=True))
    batch = [
        Request(id=f"batch-{i}", input_ids=[5, 6 + i], work=work, priority=BATCH) for i in range(12)
    ]
    engine.submit(batch)
    engine.step()
    engine.submit([replace(batch[i], id=f"online-{i}", priority=ONLINE) for i in range(3)])
    order: list[str] = []
    while engine.has_work():
        order += [completion.id for completion in engine.step()]
    engine.close()
    assert {id for id in order[:5] if id.startswith("online")} == {
        "online-0",
        "online-1",
        "online-2",
    }
    assert len(order) == 15
