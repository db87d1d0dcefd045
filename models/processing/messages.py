"""Conversations as people and files spell them: roles, text, images and videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glm_batch.models.checkpoint.media_config import MediaKind
from glm_batch.models.errors import RowError

Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "observation", "tool")
# The types of a part that shows something: its kind, and the fields of which one says where it is.
MEDIA_PARTS: dict[str, tuple[MediaKind, tuple[str, ...]]] = {
    "image": ("image", ("image", "url", "path", "bytes")),
    "image_url": ("image", ("image_url",)),
    "video": ("video", ("video", "url", "path", "bytes")),
    "video_url": ("video", ("video_url",)),
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MediaPart:
    """An image or video that a user's message shows.

    `source` is what the message says of it, not looked into: bytes, a path or URL, an object with
    bytes and path, or MediaPatches. `is_small`: few pixels of it do (`detail: low`).
    """

    kind: MediaKind
    source: object
    is_small: bool = False


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as plain JSON: absent fields dropped, a content's text parts joined.

    A user's content with media stays a list of {"type": "text", "text": ...}, {"type": "image"},
    {"type": "video"}. Raises RowError bad_messages, which names message and part.
    """
    if not messages:
        raise RowError("bad_messages", "the conversation has no messages")
    return [_check_message(f"message {index}", message) for index, message in enumerate(messages)]


def media_parts(messages: Sequence[Message]) -> list[MediaPart]:
    """The media that the messages show, in the prompt's order. Raises RowError bad_messages."""
    contents = (_content(f"message {index}", message) for index, message in enumerate(messages))
    return [piece for content in contents for piece in content if isinstance(piece, MediaPart)]


def plain_value(where: str, value: Any) -> Any:
    """A copy of JSON's own types, for templates. Raises RowError for other types."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple):
        return [plain_value(where, item) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: plain_value(where, item) for key, item in value.items()}
    raise RowError(
        "bad_messages",
        f"{where}: a {type(value).__name__} is not JSON; use strings, numbers, lists, objects",
    )


def _check_message(where: str, message: Any) -> dict[str, Any]:
    pieces = _content(where, message)
    checked = {
        key: plain_value(where, value)
        for key, value in message.items()
        if value is not None and key != "content"
    }
    return {**checked, "content": _plain_content(pieces)}


def _plain_content(pieces: list[str | MediaPart]) -> str | list[dict[str, str]]:
    """GLM templates write the parts of a content one after the other, with nothing between."""
    texts = [piece for piece in pieces if isinstance(piece, str)]
    if len(texts) == len(pieces):
        return "".join(texts)
    return [
        {"type": "text", "text": piece} if isinstance(piece, str) else {"type": piece.kind}
        for piece in pieces
    ]


def _content(where: str, message: Any) -> list[str | MediaPart]:
    """What a message says and shows, piece by piece."""
    if not isinstance(message, Mapping):
        raise _bad(
            where, f"it is {type(message).__name__}; it must be an object with role and content"
        )
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise _bad(where, f"role {role!r} is none of {', '.join(ROLES)}")
    if isinstance(content, str):
        return [content]
    if content is None and role == "assistant" and message.get("tool_calls"):
        return []
    if not isinstance(content, list | tuple):
        kind = "missing" if content is None else type(content).__name__
        raise _bad(where, f"content is {kind}; it must be a string or a list of parts")
    pieces = [_piece(f"{where}, part {index}", part) for index, part in enumerate(content)]
    for index, piece in enumerate(pieces):
        if isinstance(piece, MediaPart) and role != "user":
            raise _bad(
                f"{where}, part {index}",
                f"{_article(piece.kind)} in a message of role {role}; only a user's may show one",
            )
    return pieces


def _piece(where: str, part: Any) -> str | MediaPart:
    if not isinstance(part, Mapping):
        raise _bad(
            where,
            f"it is {type(part).__name__}; a content part is an object, such as "
            '{"type": "text", "text": ...}',
        )
    fields = _given(part)
    type_ = fields.pop("type", "text")
    if type_ == "text":
        return _text(where, fields)
    if not isinstance(type_, str) or type_ not in MEDIA_PARTS:
        raise _bad(where, f"type {type_!r} is none of text, {', '.join(MEDIA_PARTS)}")
    return _media(where, type_, fields)


def _text(where: str, fields: dict[str, Any]) -> str:
    text = fields.get("text")
    media = [name for name in fields if name in MEDIA_PARTS]
    if media:
        raise _bad(
            where,
            f"a part of text holds {media[0]} too; make two parts of it, one of type {media[0]}",
        )
    if not isinstance(text, str):
        raise _bad(where, 'a content part of text must be {"type": "text", "text": ...}')
    return text


def _media(where: str, type_: str, fields: dict[str, Any]) -> MediaPart:
    """A part that shows something; what it asks for beside that is refused, not ignored."""
    kind, names = MEDIA_PARTS[type_]
    address = fields.get(type_)
    if type_.endswith("_url") and isinstance(address, Mapping):
        inner = _given(address)
        fields = {
            **fields,
            **{name: value for name, value in inner.items() if name != "url"},
            type_: inner.get("url"),
        }
    detail = fields.pop("detail", "auto")
    if detail not in (("auto", "high", "low") if kind == "image" else ("auto",)):
        raise _bad(where, f"detail {detail!r} cannot be asked for; leave it out")
    sources = [source for name in names if (source := fields.pop(name, None)) is not None]
    if len(sources) != 1:
        found = f"{len(sources)} of the fields" if sources else "none of the fields"
        raise _bad(where, f"{_article(kind)} with {found} {', '.join(names)}; it must have one")
    if fields:
        raise _bad(
            where,
            f"the field {next(iter(fields))!r} has no meaning beside {_article(kind)}; remove it",
        )
    if type_.endswith("_url") and not isinstance(sources[0], str):
        raise _bad(
            where,
            f"its {type_} is {type(sources[0]).__name__}; it must be a string or an object with "
            "url",
        )
    return MediaPart(kind=kind, source=sources[0], is_small=detail == "low")


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Arrow fills the fields that a part lacks with nulls, or with objects of nulls."""
    return {name: value for name, value in fields.items() if not _is_null(value)}


def _is_null(value: Any) -> bool:
    return value is None or (
        isinstance(value, Mapping) and all(item is None for item in value.values())
    )


def _article(kind: MediaKind) -> str:
    return "an image" if kind == "image" else "a video"


def _bad(where: str, problem: str) -> RowError:
    return RowError("bad_messages", f"{where}: {problem}")
