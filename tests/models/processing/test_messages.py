"""What a message may look like: every spelling of text and media, and what is wrong with the
others.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from glm_batch.models.errors import RowError
from glm_batch.models.processing.messages import check_messages, media_parts

DATA_URL = "data:image/png;base64,AAAA"


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


@pytest.mark.parametrize(
    ("part", "kind", "source"),
    [
        ({"type": "image_url", "image_url": {"url": DATA_URL}}, "image", DATA_URL),
        (
            {"type": "image_url", "image_url": {"url": "https://a/b.png", "detail": "auto"}},
            "image",
            "https://a/b.png",
        ),
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": None}}, "image", "a.png"),
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}}, "image", "a.png"),
        ({"type": "image_url", "image_url": "a.png"}, "image", "a.png"),
        ({"type": "video_url", "video_url": {"url": "a.mp4"}}, "video", "a.mp4"),
        ({"type": "video_url", "video_url": "a.mp4"}, "video", "a.mp4"),
        ({"type": "image", "image": b"x"}, "image", b"x"),
        (
            {"type": "image", "image": {"bytes": b"x", "path": None}},
            "image",
            {"bytes": b"x", "path": None},
        ),
        ({"type": "image", "url": "https://a/b.png"}, "image", "https://a/b.png"),
        ({"type": "image", "path": "a.png"}, "image", "a.png"),
        ({"type": "image", "bytes": b"x", "text": None, "path": None}, "image", b"x"),
        ({"type": "video", "video": "a.mp4"}, "video", "a.mp4"),
        (
            {"type": "video", "path": "a.mp4", "image_url": {"url": None, "detail": None}},
            "video",
            "a.mp4",
        ),
        ({"type": "video", "bytes": b"x", "detail": "auto"}, "video", b"x"),
    ],
    ids=str,
)
def test_every_spelling_of_media(part: dict[str, Any], kind: str, source: object) -> None:
    messages = user(text("a"), part, text("b"))
    assert check_messages(messages) == user(text("a"), {"type": kind}, text("b"))
    assert [(found.kind, found.source) for found in media_parts(messages)] == [(kind, source)]


def test_media_are_named_in_the_prompts_order_and_never_copied() -> None:
    frame = np.zeros((2, 2, 3), np.uint8)
    messages = [
        {"role": "system", "content": "Look."},
        *user({"type": "video", "path": "1"}, text("x"), {"type": "image", "image": frame}),
        {"role": "assistant", "content": [text("a "), text("cat")]},
        *user({"type": "image", "path": "3"}),
    ]
    found = media_parts(messages)
    assert [part.kind for part in found] == ["video", "image", "image"]
    assert found[1].source is frame
    checked = check_messages(messages)
    assert [message["content"] for message in checked[::2]] == ["Look.", "a cat"]
    assert checked[3]["content"] == [{"type": "image"}]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("x", "x"),
        ([], ""),
        ([text("a"), text("b")], "ab"),
        ((text("a"), {"type": None, "text": "b", "image_url": None}), "ab"),
        ([{"text": "a"}], "a"),
        ([{**text("a"), "cache_control": {"type": "ephemeral"}}], "a"),
    ],
    ids=str,
)
def test_text_alone_becomes_one_string(content: Any, expected: str) -> None:
    messages = [{"role": "user", "content": content}]
    assert check_messages(messages) == [{"role": "user", "content": expected}]
    assert media_parts(messages) == []


def test_a_column_of_arrow_with_all_fields_reads_as_it_was_written() -> None:
    messages = [
        *user(text("a"), {"type": "image_url", "image_url": {"url": "a.png", "detail": "auto"}}),
        {"role": "assistant", "content": [text("b")]},
        *user({"type": "video", "video": "v.mp4"}),
    ]
    arrived = pa.array([messages]).to_pylist()[0]
    assert arrived != messages, "nulls were filled in"
    assert check_messages(arrived) == check_messages(messages)
    assert [part.source for part in media_parts(arrived)] == ["a.png", "v.mp4"]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (["hi"], "message 0: it is str"),
        (
            [{"role": "user", "content": "x"}, *user("x")],
            "message 1, part 0: it is str; a content part is an object",
        ),
        (user(text("x"), {"type": "text"}), "message 0, part 1: a content part of text must be"),
        (user({"type": "text", "text": 5}), "a content part of text must be"),
        (user({"type": "text", "text": "x", "image": "a"}), "a part of text holds image too"),
        (
            user({"type": "input_text", "text": "x"}),
            "type 'input_text' is none of text, image, image_url, video,",
        ),
        (user({"type": "input_audio", "input_audio": {}}), "type 'input_audio' is none of"),
        (user({"type": ["image"]}), "type ['image'] is none of"),
        (
            user({"type": "image"}),
            "an image with none of the fields image, url, path, bytes; it must have one",
        ),
        (
            user({"type": "image", "image": {"bytes": None, "path": None}}),
            "an image with none of the fields",
        ),
        (user({"type": "image", "url": "a", "path": "b"}), "an image with 2 of the fields"),
        (user({"type": "video", "image": "a"}), "a video with none of the fields video, url"),
        (
            user({"type": "image_url", "image_url": {"url": None, "detail": "auto"}}),
            "an image with none of the fields",
        ),
        (
            user({"type": "image_url", "image_url": {"url": "a", "detail": "tiny"}}),
            "detail 'tiny' cannot be asked for",
        ),
        (
            user({"type": "video_url", "video_url": "a", "detail": "low"}),
            "detail 'low' cannot be asked for",
        ),
        (user({"type": "image_url", "image_url": 5}), "its image_url is int"),
        (user({"type": "image_url", "image_url": {"url": b"x"}}), "its image_url is bytes"),
        (
            user({"type": "image_url", "image_url": {"url": "a", "size": 5}}),
            "the field 'size' has no meaning beside an",
        ),
        (
            user({"type": "video", "video": "a", "fps": 4}),
            "message 0, part 0: the field 'fps' has no meaning beside a",
        ),
        (
            user({"type": "image", "image": "a", "text": "x"}),
            "the field 'text' has no meaning beside an image",
        ),
        *(
            (
                [{"role": role, "content": [text("x"), {"type": "video", "video": "a"}]}],
                f"a message of role {role}",
            )
            for role in ("system", "assistant", "observation", "tool")
        ),
    ],
    ids=str,
)
def test_what_cannot_be_understood_is_named(messages: Any, problem: str) -> None:
    for look in (check_messages, media_parts):
        with pytest.raises(RowError, match=re.escape(problem)) as caught:
            look(messages)
        assert caught.value.code == "bad_messages"
