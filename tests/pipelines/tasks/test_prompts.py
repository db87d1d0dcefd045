"""Templates, cells and conversations: what a row says to the model, and what is wrong with it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_batch.models.errors import ConfigError, RowError
from glm_batch.pipelines.job import Job, TaskConfig
from glm_batch.pipelines.tasks.prompts import (
    PromptTemplate,
    conversation,
    input_columns,
    media_columns,
)


def job(**task: Any) -> Job:
    return Job(model="m", input=["i"], output="o", task=TaskConfig(kind="generate", **task))


def code_of(function: Any, *arguments: Any) -> str:
    with pytest.raises(RowError) as caught:
        function(*arguments)
    return caught.value.code


# ---- prompt templates


def test_template_fills_columns_and_keeps_escaped_braces() -> None:
    template = PromptTemplate.parse('{{"a": {x}}} {y}{x}')
    assert template.columns == ("x", "y")
    assert template.format({"x": 1, "y": "ü"}) == '{"a": 1} ü1'


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(st.fixed_dictionaries({"a": TEXT, "b c": TEXT, "d-e": TEXT}))
def test_values_are_never_read_as_templates(row: dict[str, str]) -> None:
    text = PromptTemplate.parse("<{a}|{b c}|{d-e}>").format(row)
    assert text == f"<{row['a']}|{row['b c']}|{row['d-e']}>"


@pytest.mark.parametrize(
    "text", ["{", "}", "{}", "{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{0x!}", "{a{b}}"]
)
def test_a_field_that_is_no_column_name_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"task\.prompt"):
        PromptTemplate.parse(text)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (None, "null_prompt"),
        (math.nan, "not_a_number"),
        (math.inf, "not_a_number"),
        ("", "empty_text"),
        (" \n\t", "empty_text"),
        ("a\ud800", "not_utf8"),
        (b"\xff", "not_utf8"),
        ([1], "wrong_type"),
        ({"a": 1}, "wrong_type"),
    ],
)
def test_bad_cells_are_typed_errors_that_name_the_column(value: object, code: str) -> None:
    with pytest.raises(RowError) as caught:
        PromptTemplate.parse("Q: {text}").format({"text": value})
    assert caught.value.code == code
    assert "'text'" in caught.value.message


def test_missing_column_is_an_error_and_one_blank_of_two_is_not() -> None:
    template = PromptTemplate.parse("{subject}: {text}")
    assert code_of(template.format, {"text": "x"}) == "missing_column"
    assert template.format({"subject": "", "text": "x"}) == ": x"


def test_input_columns_lists_each_column_once() -> None:
    a_job = replace(job(gold="label", prompt="{text}{id}"), key="id", carry=["text", "day"])
    assert input_columns(a_job) == ("text", "id", "label", "day")


# ---- conversations with media


def parts(row: dict[str, Any], **task: Any) -> list[dict[str, Any]]:
    config = TaskConfig(kind="choose", **task)
    template = PromptTemplate.parse(config.prompt) if config.prompt else None
    (message,) = conversation(config, template, row)
    content: list[dict[str, Any]] = message["content"]
    return content


def test_media_stand_before_the_text_images_first_in_the_order_of_their_columns() -> None:
    row = {"a": b"A", "b": ["x.png", {"bytes": b"B", "path": None}], "clip": b"V", "text": "hi"}
    assert parts(row, prompt="What? {text}", image=["b", "a"], video="clip") == [
        {"type": "image", "image": "x.png"},
        {"type": "image", "image": {"bytes": b"B", "path": None}},
        {"type": "image", "image": b"A"},
        {"type": "video", "video": b"V"},
        {"type": "text", "text": "What? hi"},
    ]


@pytest.mark.parametrize("value", [None, [], [b"x", None], {"bytes": None, "path": None}])
def test_a_row_without_its_image_is_an_error_and_not_a_question_about_nothing(
    value: object,
) -> None:
    with pytest.raises(RowError) as caught:
        parts({"photo": value}, prompt="What?", image="photo")
    assert caught.value.code == "null_media"
    assert "'photo'" in caught.value.message


def test_a_missing_media_column_is_told() -> None:
    with pytest.raises(RowError, match="'photo'") as caught:
        parts({}, prompt="What?", image="photo")
    assert caught.value.code == "missing_column"


def test_media_columns_are_read_once_each() -> None:
    a_job = replace(job(prompt="{text}", image=["a", "b"], video="c"), carry=["a"])
    assert media_columns(a_job.task) == ("a", "b", "c")
    assert input_columns(a_job) == ("text", "a", "b", "c")
