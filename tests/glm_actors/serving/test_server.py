"""The whole server, by clients as they are: the openai package, and HTTP where it would be too
polite.
"""

from __future__ import annotations

import base64
import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import numpy as np
import openai
import pyarrow.parquet as pq
import pydantic
import pytest

from tests.glm_actors.serving.conftest import CAPS, MODEL, ROOT, TOKEN, TWO_RANKS, Server

TICKET: list[Any] = [
    {"role": "system", "content": "You work at the support desk of a web shop."},
    {
        "role": "user",
        "content": "Write a one-line reply to this ticket.\n\nWhere is my parcel? It is late.",
    },
]
LONG: dict[str, Any] = {"max_tokens": 900, "extra_body": {"ignore_eos": True}}


def test_models_are_listed(server: Server) -> None:
    assert [model.id for model in server.client.models.list()] == [MODEL, TWO_RANKS]
    assert server.client.models.retrieve(TWO_RANKS).owned_by == "glm-batch"


def test_each_model_answers_to_its_name_on_one_rank_or_two(server: Server) -> None:
    answers = [
        server.client.chat.completions.create(
            model=model, messages=TICKET, temperature=0, max_tokens=12
        )
        for model in (MODEL, TWO_RANKS)
    ]
    assert [answer.model for answer in answers] == [MODEL, TWO_RANKS]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def test_a_stream_joined_is_the_whole_answer(server: Server) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": TICKET,
        "temperature": 0,
        "max_tokens": 40,
        "seed": 1,
        "n": 2,
    }
    whole = server.client.chat.completions.create(**asked)
    texts = {0: "", 1: ""}
    finish: dict[int, str | None] = {}
    usage = None
    options: Any = {"include_usage": True}
    for chunk in server.client.chat.completions.create(
        **asked, stream=True, stream_options=options
    ):
        assert chunk.object == "chat.completion.chunk"
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finish[choice.index] = choice.finish_reason
        usage = chunk.usage or usage
    assert [texts[choice.index] for choice in whole.choices] == [
        choice.message.content for choice in whole.choices
    ]
    assert [finish[choice.index] for choice in whole.choices] == [
        choice.finish_reason for choice in whole.choices
    ]
    assert len(texts[0]) > 20
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens > 10
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_stop_strings_and_seeds(server: Server) -> None:
    create = server.client.chat.completions.create
    free = (
        create(model=MODEL, messages=TICKET, temperature=0, max_tokens=40)
        .choices[0]
        .message.content
        or ""
    )
    stop = free[8:11]
    stopped = create(
        model=MODEL, messages=TICKET, temperature=0, max_tokens=40, stop=[stop]
    ).choices[0]
    assert stopped.message.content == free.partition(stop)[0]
    assert stopped.finish_reason == "stop"
    hot: dict[str, Any] = {
        "temperature": 2.0,
        "max_tokens": 30,
        "extra_body": {"repetition_penalty": 5.0},
    }
    drawn = [
        create(model=MODEL, messages=TICKET, seed=seed, **hot).choices[0].message.content
        for seed in (3, 3, 4)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_log_probabilities(server: Server) -> None:
    asked: Any = {
        "model": MODEL,
        "messages": TICKET,
        "temperature": 0,
        "max_tokens": 6,
        "logprobs": True,
    }
    choice = server.client.chat.completions.create(**asked, top_logprobs=3).choices[0]
    assert choice.logprobs is not None
    entries = choice.logprobs.content or []
    # the template's line break
    assert "".join(entry.token for entry in entries) == f"\n{choice.message.content}"
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.token == entry.top_logprobs[0].token
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob, abs=1e-5)
        assert bytes(entry.bytes or []).decode() == entry.token
    (complete,) = server.client.completions.create(
        model=MODEL, prompt="Where is", temperature=0, max_tokens=5, logprobs=2
    ).choices
    assert complete.logprobs is not None
    assert len(complete.logprobs.tokens or []) == len(complete.logprobs.token_logprobs or [])
    assert all(len(tops) <= 2 for tops in complete.logprobs.top_logprobs or [])


class Ticket(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    queue: str = pydantic.Field(pattern="^[a-z]{1,12}$")
    urgent: bool


def test_structured_output(server: Server) -> None:
    schema = Ticket.model_json_schema()
    response_format: Any = {
        "type": "json_schema",
        "json_schema": {"name": "ticket", "strict": True, "schema": schema},
    }
    asked: Any = {
        "model": MODEL,
        "messages": TICKET,
        "response_format": response_format,
        "max_tokens": 200,
        "n": 2,
    }
    for choice in server.client.chat.completions.create(**asked).choices:
        jsonschema.validate(json.loads(choice.message.content or ""), schema)
    parsed = server.client.chat.completions.parse(
        model=MODEL, messages=TICKET, response_format=Ticket, max_tokens=200
    ).choices[0]
    assert isinstance(parsed.message.parsed, Ticket)


def picture() -> tuple[bytes, str]:
    """A shipped picture and what it shows."""
    table = pq.read_table(next((ROOT / "examples" / "shapes").glob("*.parquet")))
    row = next(
        row
        for row in table.to_pylist()
        if row["gold_shape"] and row["image"] and len(row["image"]) > 200
    )
    return row["image"], row["gold_shape"]


def test_images_come_as_data_urls(server: Server) -> None:
    data, shape = picture()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    content: Any = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "Which shape is it?"},
    ]
    answer = server.client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": content}], temperature=0, max_tokens=8
    )
    assert shape in (answer.choices[0].message.content or "")
    for bad in (
        "http://127.0.0.1/x.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "data:image/png;base64,AAAA",
        "data:,",
    ):
        content[0]["image_url"]["url"] = bad
        with pytest.raises(openai.BadRequestError):
            server.client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": content}]
            )


def test_embeddings_in_both_encodings(server: Server) -> None:
    texts = ["Where is my parcel?", "I cannot log in."]
    found = server.client.embeddings.create(model=MODEL, input=texts)  # the package asks for base64
    floats = server.client.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    assert [item.index for item in found.data] == [0, 1]
    for packed, plain in zip(found.data, floats.data, strict=True):
        np.testing.assert_allclose(packed.embedding, plain.embedding, atol=1e-6)
        assert np.linalg.norm(plain.embedding) == pytest.approx(1.0, abs=1e-5)
    assert found.usage.prompt_tokens > 8


def test_errors_have_the_packages_classes(server: Server) -> None:
    client = server.client
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="no model 'nobody'"):
        create(model="nobody", messages=TICKET)
    with pytest.raises(openai.BadRequestError) as caught:
        create(model=MODEL, messages=TICKET, max_tokens=CAPS["max_tokens"] + 1)
    assert (caught.value.param, caught.value.code, caught.value.type) == (
        "max_tokens",
        "invalid_value",
        "invalid_request_error",
    )
    with pytest.raises(openai.BadRequestError) as caught:
        create(model=MODEL, messages=[{"role": "user", "content": "word " * 5000}], stream=True)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=client.base_url, api_key="wrong", max_retries=0).models.list()


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \xff"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/nowhere"])
def test_nothing_without_the_token(server: Server, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    answer = httpx.get(f"{server.url}{path}", headers=headers, timeout=60.0)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert TOKEN not in answer.text


def test_health_is_open_and_the_page_describes_every_route(server: Server) -> None:
    assert httpx.get(f"{server.url}/health", timeout=60.0).json() == {"status": "ok"}
    page = httpx.get(
        f"{server.url}/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60.0
    ).json()
    assert {"/v1/chat/completions", "/v1/score", "/tokenize", "/metrics"} <= page["paths"].keys()


def test_a_client_that_leaves_frees_its_blocks(server: Server) -> None:
    """In the middle of a stream, and while it waits for a whole answer."""
    blocks = server.wait_until_idle()["glm_engine_blocks"]
    stream = server.client.completions.create(
        model=MODEL, prompt="Where is", stream=True, n=4, logprobs=1, **LONG
    )
    for _, _chunk in zip(range(8), stream, strict=False):
        pass
    busy = server.metrics()
    assert busy["glm_engine_running"] == 4
    assert busy["glm_engine_free_blocks"] < blocks
    stream.close()
    idle = server.wait_until_idle()
    assert idle["glm_engine_free_blocks"] == blocks
    impatient = server.client.with_options(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        impatient.completions.create(model=MODEL, prompt="Where is", n=4, **LONG)
    assert server.wait_until_idle()["glm_engine_free_blocks"] == blocks
    assert idle["glm_output_tokens_total"] == server.metrics()["glm_output_tokens_total"]


def test_a_full_queue_is_tried_again(server: Server) -> None:
    """The package waits as long as Retry-After says, and comes again."""
    create = server.client.completions.create
    streams = [
        create(model=MODEL, prompt="Where is", stream=True, logprobs=1, **LONG) for _ in range(16)
    ]
    for stream in streams:
        next(iter(stream))
    with pytest.raises(openai.RateLimitError) as caught:
        create(model=MODEL, prompt="Where is", max_tokens=4)
    assert caught.value.response.headers["Retry-After"] == "1"
    with ThreadPoolExecutor(1) as pool:
        later = pool.submit(
            server.client.with_options(max_retries=8).completions.create,
            model=MODEL,
            prompt="Where",
        )
        for stream in streams:
            stream.close()
        assert later.result().choices[0].finish_reason
    server.wait_until_idle()


def test_many_clients_at_once(server: Server) -> None:
    """Each hears its own answer, the same as alone."""

    def ask(number: int) -> str:
        stream = server.client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": f"Ticket {number % 4}: where is it?"}],
            temperature=0, max_tokens=24, stream=True,
        )  # fmt: skip
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    alone = [ask(number) for number in range(4)]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(ask, range(24)))
    assert together == alone * 6
    found = server.wait_until_idle()
    assert found["glm_engine_free_blocks"] == found["glm_engine_blocks"]
    assert found["glm_time_to_first_token_seconds_count"] >= 28
    assert found["glm_prompt_tokens_total"] > found["glm_cached_prompt_tokens_total"] > 0


def test_a_signal_lets_requests_finish_and_takes_no_new_ones(own_server: Server) -> None:
    stream = own_server.client.completions.create(
        model=MODEL, prompt="Where is", stream=True, logprobs=1, **LONG
    )
    first = next(iter(stream))
    own_server.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 10.0
    while (answer := httpx.get(f"{own_server.url}/health", timeout=60.0)).status_code != 503:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert answer.headers["Retry-After"] == "1"
    rest = [chunk.choices[0] for chunk in stream]
    assert rest[-1].finish_reason == "length"
    assert (
        sum(
            len(choice.logprobs.tokens or [])
            for choice in [first.choices[0], *rest]
            if choice.logprobs
        )
        == 900
    )
    assert own_server.process.wait(timeout=60) == 0
