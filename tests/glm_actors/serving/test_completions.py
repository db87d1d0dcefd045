"""Raw prompts: echoes of them, their own log-probabilities, and lists of them, as OpenAI's older
interface has it.
"""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest

from glm_batch.glm_actors.serving.openai.api_errors import ApiError
from glm_batch.glm_actors.serving.openai.protocol import CompletionRequest
from glm_batch.glm_actors.serving.openai.serve_settings import ServedModel
from glm_batch.glm_actors.serving.replicas.replica import Replica
from glm_batch.models.engine.api.interface import EngineOptions
from glm_batch.models.processing.tokenizer import Tokenizer
from glm_batch.models.request_limits import RequestLimits
from tests.glm_actors.serving.conftest import MODEL, TINY

PROMPT = "Where is my parcel, 包裹在哪里?"


def ask(replica: Replica, **fields: Any) -> dict[str, Any]:
    body = CompletionRequest.model_validate({"model": MODEL, "temperature": 0.0} | fields)
    return asyncio.run(replica.answer(body))


def stream(replica: Replica, **fields: Any) -> list[dict[str, Any]]:
    body = CompletionRequest.model_validate(
        {"model": MODEL, "temperature": 0.0, "stream": True} | fields
    )

    async def pieces() -> list[dict[str, Any]]:
        return [
            chunk["choices"][0] async for piece in replica.stream(body) for chunk in piece.chunks
        ]

    return asyncio.run(pieces())


def usage(replica: Replica, **fields: Any) -> Any:
    """The last thing that a stream says."""
    body = CompletionRequest.model_validate(
        {"model": MODEL, "temperature": 0.0, "stream": True} | fields
    )

    async def last() -> Any:
        return [piece.usage async for piece in replica.stream(body)][-1]

    return asyncio.run(last())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(TINY)


def test_an_echo_is_the_prompt_and_what_follows(replica: Replica) -> None:
    plain = ask(replica, prompt=PROMPT, max_tokens=6)["choices"][0]
    echoed = ask(replica, prompt=PROMPT, max_tokens=6, echo=True)["choices"][0]
    assert echoed["text"] == PROMPT + plain["text"]
    assert echoed["logprobs"] is None
    chunks = stream(replica, prompt=[PROMPT, "Where"], max_tokens=6, echo=True)
    joined = {
        index: "".join(chunk["text"] for chunk in chunks if chunk["index"] == index)
        for index in (0, 1)
    }
    assert joined[0] == echoed["text"]
    assert joined[1].startswith("Where")


@pytest.mark.parametrize(
    "fields", [{"logprobs": 2}, {"logprobs": 0, "n": 2}, {}, {"return_token_ids": True}]
)
@pytest.mark.parametrize("max_tokens", [5, 0])
def test_a_streamed_echo_begins_with_its_prompt(
    replica: Replica, fields: dict[str, Any], max_tokens: int
) -> None:
    """The chunks of each choice, joined, are the choice of the whole answer; the first one is the
    prompt.
    """
    asked: dict[str, Any] = {
        "prompt": [PROMPT, "Where"],
        "echo": True,
        "max_tokens": max_tokens,
        **fields,
    }
    whole = ask(replica, **asked)
    chunks = stream(replica, **asked)
    assert chunks[0]["text"].startswith(PROMPT)
    for choice in whole["choices"]:
        own = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
        assert "".join(chunk["text"] for chunk in own) == choice["text"]
        assert [chunk["finish_reason"] for chunk in own] == [None] * (len(own) - 1) + [
            choice["finish_reason"]
        ]
        if choice["logprobs"] is None:
            assert all(chunk["logprobs"] is None for chunk in own)
            continue
        assert own[0]["text"] == asked["prompt"][choice["index"] // fields.get("n", 1)]
        assert own[0]["logprobs"]["token_logprobs"][0] is None
        joined = {
            name: [x for chunk in own for x in chunk["logprobs"][name]]
            for name in choice["logprobs"]
        }
        whole_logprobs = choice["logprobs"]
        for name in ("tokens", "text_offset"):
            assert joined[name] == whole_logprobs[name]
        assert joined["token_logprobs"][1:] == pytest.approx(
            whole_logprobs["token_logprobs"][1:], abs=1e-4
        )
        for mine, its in zip(
            joined["top_logprobs"][1:], whole_logprobs["top_logprobs"][1:], strict=True
        ):
            assert mine == pytest.approx(its, abs=1e-4)
    assert usage(replica, **asked) == whole["usage"] | {"prompt_tokens_details": ANY}


def test_a_streamed_echo_that_cannot_be_scored_is_refused(replica: Replica) -> None:
    with pytest.raises(ApiError) as caught:
        stream(replica, prompt=[[5], [1 << 40]], echo=True, logprobs=1)
    assert (caught.value.status, caught.value.code) == (400, "invalid_token")


@pytest.mark.parametrize("as_ids", [False, True])
def test_log_probabilities_of_prompt_and_output(
    replica: Replica, tokenizer: Tokenizer, as_ids: bool
) -> None:
    """What is written has the same numbers as part of a prompt, and every token stands where it is
    said to.
    """
    ids = tokenizer.encode_raw(PROMPT)
    asked: dict[str, Any] = {"prompt": ids if as_ids else PROMPT, "logprobs": 2}
    plain = ask(replica, **asked, max_tokens=6)["choices"][0]
    answer = ask(replica, **asked, max_tokens=6, echo=True, return_token_ids=True)
    (choice,) = answer["choices"]
    found = choice["logprobs"]
    assert choice["text"] == PROMPT + plain["text"]
    assert len(found["tokens"]) == len(ids) + 6
    assert found["tokens"][len(ids) :] == plain["logprobs"]["tokens"]
    assert found["text_offset"][len(ids) :] == [
        len(PROMPT) + at for at in plain["logprobs"]["text_offset"]
    ]
    for token, start in zip(found["tokens"], found["text_offset"], strict=True):
        assert "�" in token or choice["text"][start:].startswith(token)
    assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
    for own, tops in zip(found["token_logprobs"][1:], found["top_logprobs"][1:], strict=True):
        assert own <= max(tops.values()) + 1e-6
        assert 1 <= len(tops) <= 2
    again = ask(replica, prompt=ids + choice["token_ids"], logprobs=2, max_tokens=0, echo=True)[
        "choices"
    ][0]
    np.testing.assert_allclose(
        again["logprobs"]["token_logprobs"][1:], found["token_logprobs"][1:], atol=1e-4
    )
    assert (again["text"], again["finish_reason"]) == (choice["text"], "length")
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (
        len(ids),
        6,
        len(ids) + 6,
    )


def test_lists_of_prompts_keep_their_order(replica: Replica, tokenizer: Tokenizer) -> None:
    texts = ["Where", "I cannot log in.", "x"]
    lists: tuple[list[Any], ...] = (texts, [tokenizer.encode_raw(text) for text in texts])
    for prompts in lists:
        answer = ask(replica, prompt=prompts, n=2, max_tokens=2, echo=True, logprobs=1)
        assert [choice["index"] for choice in answer["choices"]] == list(range(6))
        for choice, text in zip(
            answer["choices"], [text for text in texts for _ in range(2)], strict=True
        ):
            assert choice["text"].startswith(text)
        assert answer["usage"]["prompt_tokens"] == sum(
            len(tokenizer.encode_raw(text)) for text in texts
        )
    only = ask(replica, prompt=texts, max_tokens=0, echo=True)
    assert [choice["text"] for choice in only["choices"]] == texts
    assert only["usage"]["completion_tokens"] == 0


def test_special_tokens_are_shown_where_they_were_given(
    replica: Replica, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode_control("<|user|>\nhi<|assistant|>")
    found = ask(replica, prompt=ids, max_tokens=0, echo=True, logprobs=0)["choices"][0]
    assert found["text"] == "<|user|>\nhi<|assistant|>"
    assert found["logprobs"]["text_offset"][-1] == found["text"].index("<|assistant|>")
    assert found["logprobs"]["tokens"][-1] == "<|assistant|>"
    typed = ask(replica, prompt="<|user|>\nhi<|assistant|>", max_tokens=0, echo=True, logprobs=0)[
        "choices"
    ][0]
    assert typed["text"] == found["text"]
    assert len(typed["logprobs"]["tokens"]) > len(ids)  # typed by somebody, they are text


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 0, "stream": True}, "max_tokens")],
)
def test_what_cannot_be_done_is_refused(
    replica: Replica, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(ApiError) as caught:
        ask(replica, prompt=PROMPT, **fields)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_prompts_that_cannot_run(replica: Replica) -> None:
    for prompt in ([-1], [1 << 40], [[5], [1 << 70]]):
        with pytest.raises(ApiError) as caught:
            ask(replica, prompt=prompt, echo=True, max_tokens=0, logprobs=1)
        assert (caught.value.status, caught.value.code) == (400, "invalid_token")


def test_the_size_of_an_answer_has_a_limit(replica: Replica) -> None:
    with pytest.raises(ApiError, match="1,000,000") as caught:
        ask(replica, prompt=[[5] * 2000] * 100, max_tokens=1, n=4, logprobs=2, echo=True)
    assert (caught.value.status, caught.value.param) == (400, "logprobs")


def test_no_stop_strings_are_none(replica: Replica) -> None:
    assert ask(replica, prompt="Where", max_tokens=3, stop=[])["choices"][0]["finish_reason"]


def test_an_echo_of_the_echo_engine() -> None:
    echo = Replica(ServedModel(model=TINY, engine=EngineOptions(kind="echo")), RequestLimits())
    found = ask(echo, prompt="Where", max_tokens=1, echo=True, logprobs=1)["choices"][0]["logprobs"]
    echo.close()
    assert found["token_logprobs"][0] is None
    assert all(value == -1.0 for value in found["token_logprobs"][1:-1])
