"""A stream that is parted into reasoning and answer says the same as the whole text parted at once."""

from __future__ import annotations

import random

import pytest

from glm_actors.serving.reasoning import ReasoningStream
from models.processing.chat import Chat
from models.processing.tokenizer import Tokenizer
from tests.serve.conftest import TINY

PROMPT = "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}<|assistant|>"
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


@pytest.mark.parametrize(("form", "text"), [(form, text) for form, texts in TEXTS.items() for text in texts])
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
