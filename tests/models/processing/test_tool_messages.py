"""Calls of functions in conversations: what each template gets, and what it leaves out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from glm_batch.models.errors import RowError
from glm_batch.models.processing.chat import Chat
from glm_batch.models.processing.prompt import Prompter

TINY = Path(__file__).parents[3] / "examples" / "tiny_glm"
CALL = {"id": "c1", "type": "function", "function": {"name": "get", "arguments": '{"a": "ü"}'}}
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "31 degrees"},
    {"role": "user", "content": "And now?"},
]
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TEXTS = """{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls %}
[{{ c.function.name }} {{ c.function.arguments }}]{% endfor %}{% endfor %}"""
OBJECTS = """{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls %}
[{{ c.function.name }}{% for k, v in c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}]
{% endfor %}{% endfor %}"""


def prompter(template: str | None = None) -> Prompter:
    found = Prompter(str(TINY))
    if template is not None:
        found.__dict__["chat"] = Chat(template, found.tokenizer)
    return found


def test_a_template_of_0414_gets_a_message_for_each_call_and_result() -> None:
    told = prompter().render(TALK)
    assert '<|assistant|>get \n{"a": "ü"}<|observation|>\n31 degrees<|user|>\nAnd now?' in told
    assert prompter().unprinted(TALK) == []


@pytest.mark.parametrize(
    ("template", "form"), [(None, "glm"), (PLAIN, "none"), (TEXTS, "texts"), (OBJECTS, "objects")]
)
def test_each_template_gets_what_it_reads(template: str | None, form: str) -> None:
    found = prompter(template)
    assert found.tool_form == form
    if form == "texts":  # as it stands, and as transformers would have it
        assert '[get {"a": "ü"}]' in found.render(TALK)
        tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
        oracle = tokenizer.apply_chat_template(
            [{**each, "content": each["content"] or ""} for each in TALK],
            chat_template=template,
            tokenize=False,
        )
        assert found.render(TALK) == oracle
    if form == "objects":
        assert "[get a=ü]" in found.render(TALK)


@pytest.mark.parametrize("change", ["no ids", "objects", "both"])
def test_rows_may_leave_ids_out_and_give_arguments_as_objects(change: str) -> None:
    """As data sets have them; Arrow fills in nulls."""
    talk = json.loads(json.dumps(TALK))
    if change != "objects":
        talk[1]["tool_calls"][0]["id"] = None
        talk[2]["tool_call_id"] = None
    if change != "no ids":
        talk[1]["tool_calls"][0]["function"]["arguments"] = {"a": "ü"}
    for template in (None, OBJECTS):
        assert prompter(template).render(talk) == prompter(template).render(TALK)


def test_results_stand_in_the_order_of_the_calls() -> None:
    calls = [CALL | {"id": id, "function": CALL["function"] | {"name": id}} for id in ("a", "b")]
    results = [{"role": "tool", "tool_call_id": id, "content": f"of {id}"} for id in ("b", "a")]
    talk = [TALK[0], {"role": "assistant", "content": "I look.", "tool_calls": calls}, *results]
    told = prompter().render(talk)
    assert told.index("I look.") < told.index("a \n{") < told.index("b \n{") < told.index("of a")
    assert told.index("of a") < told.index("of b")


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "x", "tool_call_id": "nobody"},
        {"role": "assistant", "tool_calls": "x"},
        {"role": "assistant", "tool_calls": [{"id": "a"}]},
        {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": 1}}]},
    ],
)
def test_calls_that_make_no_sense_are_the_rows_error(message: dict[str, Any]) -> None:
    with pytest.raises(RowError) as caught:
        prompter().draft([*TALK, message])
    assert caught.value.code == "bad_messages"
    assert "message 4" in caught.value.message


def test_what_a_template_leaves_out_is_named() -> None:
    named = [*TALK[:-1], {**TALK[-1], "name": "Ann", "mood": None}]
    assert prompter().unprinted(named) == ["name"]
    assert prompter(PLAIN).unprinted(named) == ["tool_calls", "name"]
    users = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    system = [{"role": "developer", "content": "Be brief."}, TALK[0]]
    assert prompter(users).unprinted(system) == ["role developer"]
    assert prompter().unprinted(system) == []
