"""Calls of functions in a conversation: OpenAI's spelling, as a checkpoint's template reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from glm_batch.models.errors import RowError
from glm_batch.models.processing.chat import Chat
from glm_batch.models.processing.messages import Message

# As OpenAI's clients write calls, the same with arguments as objects, GLM-4-0414's own messages for
# each call and result, or not at all.
ToolForm = Literal["texts", "objects", "glm", "none"]
_NAME, _ARGUMENT, _RESULT = "probe_call", "probe_argument", "probe_result"


def tool_form(chat: Chat) -> ToolForm:
    """The first form in which the template prints a call's name and arguments, and its result."""
    arguments = json.dumps({_ARGUMENT: 1})
    call = {"id": "x", "type": "function", "function": {"name": _NAME, "arguments": arguments}}
    asked: list[Message] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "x", "content": _RESULT},
    ]
    forms: tuple[ToolForm, ...] = ("texts", "objects", "glm")
    for form in forms:
        try:
            text = chat.render(in_form(asked, form))
        except RowError:
            continue
        if all(word in text for word in (_NAME, _ARGUMENT, _RESULT)):
            return form
    return "none"


def uses_tools(messages: Sequence[Message]) -> bool:
    """Whether a conversation has calls or results in it."""
    return any(
        isinstance(message, Mapping)
        and (message.get("role") in ("tool", "observation") or message.get("tool_calls"))
        for message in messages
    )


def in_form(messages: Sequence[Message], form: ToolForm) -> list[Message]:
    """The conversation with its calls and results in a form.

    GLM-4-0414 has a message for each call, and results in the calls' order. Raises RowError for
    calls and results that make no sense.
    """
    if form == "glm":
        return list(_as_glm(messages))
    if form == "objects":
        return [_with_objects(f"message {i}", message) for i, message in enumerate(messages)]
    return list(messages)


def _as_glm(messages: Sequence[Message]) -> Iterator[Message]:
    order: dict[str, int] = {}
    results: list[tuple[int, Message]] = []
    for number, message in enumerate([*messages, None]):
        if isinstance(message, Mapping) and message.get("role") == "tool":
            id = message.get("tool_call_id")
            if id is not None and id not in order:
                raise _bad(f"message {number}", "its tool_call_id is that of no call before it")
            result = {"role": "observation", "content": message.get("content")}
            results.append((len(order) if id is None else order[id], result))
            continue
        yield from (result for _, result in sorted(results, key=lambda pair: pair[0]))
        results = []
        if isinstance(message, Mapping) and message.get("tool_calls"):
            if message.get("content"):
                yield {"role": "assistant", "content": message["content"]}
            for call, function in _calls(f"message {number}", message["tool_calls"]):
                order.setdefault(str(call.get("id")), len(order))
                said = function.get("arguments")
                text = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
                yield {"role": "assistant", "metadata": function["name"], "content": text}
        elif message is not None:
            yield message


def _with_objects(where: str, message: Message) -> Message:
    if not isinstance(message, Mapping) or not message.get("tool_calls"):
        return message
    calls = []
    for call, function in _calls(where, message["tool_calls"]):
        arguments = function.get("arguments")
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError) as error:
            raise _bad(where, f"the arguments of a call are no JSON: {error}") from error
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _calls(where: str, calls: Any) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """(call, its function) of each call."""
    for call in calls if isinstance(calls, list | tuple) else [None]:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(call, Mapping) or not isinstance(function, Mapping):
            raise _bad(where, "tool_calls must be a list of objects with an id and a function")
        if not isinstance(function.get("name"), str):
            raise _bad(where, "a call's function must have a name")
        yield call, function


def _bad(where: str, problem: str) -> RowError:
    return RowError("bad_messages", f"{where}: {problem}")
