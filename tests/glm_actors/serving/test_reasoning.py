"""A stream that is parted into reasoning and answer says the same as the whole text parted at once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glm_batch.glm_actors.serving.openai.chat_task import ReasoningStream
from glm_batch.glm_actors.serving.openai.protocol import ChatRequest
from glm_batch.glm_actors.serving.openai.serve_settings import ServedModel
from glm_batch.glm_actors.serving.replicas.replica import Replica
from glm_batch.models.engine.api.interface import EngineOptions
from glm_batch.models.processing.chat import Chat
from glm_batch.models.processing.tokenizer import Tokenizer
from glm_batch.models.request_limits import RequestLimits
from tests.glm_actors.serving.conftest import TINY

PROMPT = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}<|assistant|>"
)
TEMPLATES = {
    "none": PROMPT,
    "open": PROMPT + "{% if add_generation_prompt %}\n<think>{% endif %}",
    "switch": PROMPT + "{% if enable_thinking %}{% endif %}",
}
TEXTS = {
    "open": ["\nWhy?\nBecause.</think>\n\nIt is  blue. ", "never closed <b", "</think>at once", "a </thin</think> b"],
    "switch": [
        "<think>Hm, a < b.</think>\nYes </answ no", "<think>a</think><answer>b c</answer>", "just this ", "<answer>x",
        "\n<think>never closed",
    ],
    "none": ["\nplain <think> text  ", "x", ""],
}  # fmt: skip


@pytest.fixture(scope="module")
def chats() -> dict[str, Chat]:
    tokenizer = Tokenizer.from_dir(TINY)
    return {name: Chat(template, tokenizer) for name, template in TEMPLATES.items()}


def pieces_of(text: str, rng: random.Random) -> list[str]:
    cuts = sorted(rng.sample(range(len(text) + 1), k=min(len(text), rng.randrange(8))))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@pytest.mark.parametrize(
    ("form", "text"), [(form, text) for form, texts in TEXTS.items() for text in texts]
)
@pytest.mark.parametrize("thinking", [True, False])
def test_pieces_joined(chats: dict[str, Chat], form: str, text: str, thinking: bool) -> None:
    chat = chats[form]
    assert chat.thinking_form == form
    reasoning, answer = chat.split_reasoning(text, thinking=thinking)
    rng = random.Random(7)
    for pieces in [list(text), [text], *(pieces_of(text, rng) for _ in range(40))]:
        stream = ReasoningStream(chat, thinking=thinking)
        found = [stream.add(piece, last=False) for piece in pieces[:-1]]
        found.append(stream.add("".join(pieces[-1:]), last=True))
        assert "".join(first for first, _ in found) == (reasoning or "")
        assert "".join(second for _, second in found) == answer


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    """A checkpoint that reasons first; what it says is the end of its prompt."""
    folder = tmp_path_factory.mktemp("thinker")
    for file in Path(TINY).glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(TEMPLATES["open"])
    replica = Replica(
        ServedModel(model=str(folder), engine=EngineOptions(kind="echo"), thinking=True),
        RequestLimits(),
    )
    yield replica
    replica.close()


def ask(replica: Replica, **fields: Any) -> dict[str, Any]:
    """The message of an answer, whole or put together from its chunks."""
    body = ChatRequest.model_validate(
        {
            "model": "m",
            "messages": [{"role": "user", "content": "Hm. </think> Yes."}],
            "max_tokens": 200,
        }
        | fields
    )

    async def whole() -> dict[str, Any]:
        found: dict[str, Any] = (await replica.answer(body))["choices"][0]["message"]
        return found

    async def streamed() -> dict[str, Any]:
        found: dict[str, Any] = {}
        async for piece in replica.stream(body):
            for chunk in piece.chunks:
                for field, text in chunk["choices"][0]["delta"].items():
                    found[field] = found.get(field, "") + text
        return found

    return asyncio.run(streamed() if body.stream else whole())


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_has_a_field_of_its_own(thinker: Replica, stream: bool) -> None:
    message = ask(thinker, stream=stream)
    assert message["role"] == "assistant"
    assert message["reasoning_content"].endswith("Hm.")
    assert message["content"].startswith("Yes.")
    for off in (
        {"thinking": {"type": "disabled"}},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ):
        plain = ask(thinker, stream=stream, **off)
        assert "reasoning_content" not in plain
        assert "Hm. </think> Yes." in plain["content"]
