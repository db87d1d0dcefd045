"""Tools: what a model is told of functions, the calls that it writes, and earlier calls and results
back to it.

GLM-4-0414 writes a call as the function's name, a line break and its arguments as a JSON object;
several calls follow one another. Owns that form and the grammars that hold a model to it. Knows
nothing of prompts' tokens or of routes.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glm_batch.glm_actors.serving.openai.api_errors import bad
from glm_batch.glm_actors.serving.openai.protocol import (
    AllowedToolsChoice,
    ChatRequest,
    Function,
    ToolChoice,
)
from glm_batch.models.engine.api.request import Constraint
from glm_batch.models.engine.decoding.constraints import JSON_WHITESPACE
from glm_batch.models.errors import RowError
from glm_batch.models.processing.chat import Chat

Json = dict[str, Any]
Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call as the model has written it; `arguments` are the JSON text of an object, or the
    beginning of one.
    """

    name: str
    arguments: str
    is_whole: bool = True

    def shown(self) -> Json:
        """As OpenAI's answers have it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """A request's functions; one of those that `must` names has to be called."""

    functions: tuple[Function, ...] = ()
    told: tuple[Function, ...] = ()  # to the model, which some choices let call only some of them
    must: tuple[str, ...] = ()
    one_call: bool = False
    is_named: bool = False  # whether the request names the one function to call

    @property
    def names(self) -> frozenset[str]:
        return frozenset(function.name for function in self.functions)

    def for_template(self) -> list[Json] | None:
        """As chat templates read them; None without any."""
        return [
            {"type": "function", "function": _shown(function)} for function in self.told
        ] or None

    def read(self, text: str) -> tuple[str, list[Call]]:
        """(content, calls) of an output. What has to be a call is one also where it was cut."""
        content, calls = find_calls(text, self.names, one_call=self.one_call)
        if calls or not self.must:
            return content, calls
        name, _, arguments = text.partition("\n")
        if name.strip() not in self.names:
            return "", []
        return "", [Call(name=name.strip(), arguments=arguments.lstrip(), is_whole=False)]

    def finish_reason(self, calls: Sequence[Call], reason: str | None) -> str | None:
        """OpenAI's, of an output with these calls in it."""
        if not calls or not calls[-1].is_whole:
            return reason
        return "stop" if self.is_named else "tool_calls"

    def held_to(
        self, format_: tuple[str, Constraint] | None, chat: Chat
    ) -> tuple[str, Constraint] | None:
        """The field that asks for it, and what holds the answer to a call that must be, to a call
        or a format, or a strict function's arguments to their schema.
        """
        if self.must:
            chosen = [function for function in self.functions if function.name in self.must]
            text = call_grammar(chosen)
        elif format_ is not None and self.functions:
            text = call_grammar(self.functions, chat.separator, format_[1])
        elif format_ is None and (strict := [each for each in self.functions if each.strict]):
            text = free_grammar(strict)
        else:
            return None
        return "tools", Constraint(kind="lark", text=text)


def _shown(function: Function) -> Json:
    said = {
        "name": function.name,
        "description": function.description,
        "parameters": function.parameters,
    }
    return {key: value for key, value in said.items() if value is not None}


def tools_of(body: ChatRequest) -> Tools:
    """The functions that may be called. Raises ApiError for contradictions."""
    choice = body.tool_choice or ("auto" if body.tools else "none")
    if body.tools is None:
        for param, given in (
            ("tool_choice", choice != "none"),
            ("parallel_tool_calls", body.parallel_tool_calls),
        ):
            if given:
                raise bad(param, "it goes with tools")
        return Tools()
    functions = {tool.function.name: tool.function for tool in body.tools}
    if len(functions) < len(body.tools):
        raise bad("tools", "two of them have the same name")
    if choice == "none":
        return Tools()
    chosen = list(functions)
    if isinstance(choice, ToolChoice):
        chosen = [choice.function.name]
    elif isinstance(choice, AllowedToolsChoice):
        chosen = [each.function.name for each in choice.allowed_tools.tools]
    for name in chosen:
        if name not in functions:
            known = ", ".join(functions)
            raise bad("tool_choice", f"there is no tool {name!r}; there is {known}")
    is_free = choice == "auto" or (
        isinstance(choice, AllowedToolsChoice) and choice.allowed_tools.mode == "auto"
    )
    return Tools(
        functions=tuple(functions[name] for name in chosen),
        told=tuple(functions.values()),
        must=() if is_free else tuple(chosen),
        one_call=body.parallel_tool_calls is False,
        is_named=isinstance(choice, ToolChoice),
    )


def call_grammar(
    functions: Sequence[Function], separator: str = "", format_: Constraint | None = None
) -> str:
    """One call of one of the functions, in llguidance's form of Lark; or else, after the separator
    of an answer, what `format_` holds it to.
    """
    ways = [f"call_{number}" for number in range(len(functions))]
    rules = [
        f"call_{number}: {_name(function)} {_arguments(function)}\n"
        for number, function in enumerate(functions)
    ]
    if format_ is not None:
        ways.append("answer")
        before = f"{json.dumps(separator)} " if separator else ""
        rules.append(_answer_rules(before, format_))
    return f"start: {' | '.join(ways)}\n" + "".join(rules)


def _answer_rules(before: str, format_: Constraint) -> str:
    if format_.kind == "json_schema":
        return f"answer: {before}{_json(json.loads(format_.text))}\n"
    if format_.kind == "regex":
        pattern = format_.text.replace("/", "\\/")
        return f"answer: {before}FORMAT\nFORMAT: /{pattern}/\n"
    raise bad("structured_outputs", "choices and grammars do not go with tools: leave one out")


def free_grammar(functions: Sequence[Function]) -> str:
    """Any text; a function's name and a line break are followed by arguments that match."""
    calls = " | ".join(f"call_{number}" for number in range(len(functions)))
    rules = (
        f"begin_{number}[lazy]: TEXT {_name(function)}\ncall_{number}: begin_{number} "
        f"{_arguments(function)}\n"
        for number, function in enumerate(functions)
    )
    return f"start: ({calls})* rest\nrest: TEXT\nTEXT: /(.|\\n)*/\n" + "".join(rules)


def _name(function: Function) -> str:
    return json.dumps(f"{function.name}\n")


def _arguments(function: Function) -> str:
    try:
        return _json({"type": "object"} | (function.parameters or {}))
    except (RecursionError, ValueError) as error:
        raise bad("tools", f"the parameters of {function.name} are nested too deeply") from error


def _json(schema: Json) -> str:
    """Decoding may write any blanks between JSON tokens, and none without bounds."""
    bounds = {"x-guidance": {"whitespace_pattern": JSON_WHITESPACE}}
    return "%json " + json.dumps(schema | bounds)


def check_calls(messages: Sequence[Message]) -> None:
    """Raises RowError for calls and results that are not as OpenAI's clients write them."""
    for number, message in enumerate(messages):
        if message.get("role") == "tool" and not isinstance(message.get("tool_call_id"), str):
            raise _bad(number, "its tool_call_id is that of no call before it")
        calls = message.get("tool_calls") or []
        for call in calls if isinstance(calls, list) else [None]:
            function = call.get("function") if isinstance(call, Mapping) else None
            if not isinstance(call, Mapping) or not isinstance(function, Mapping):
                raise _bad(number, "tool_calls must be a list of objects with an id and a function")
            said = call.get("id"), function.get("name"), function.get("arguments")
            if not all(isinstance(each, str) for each in said):
                raise _bad(number, "a call's id, its function's name and arguments must be strings")


def _bad(number: int, problem: str) -> RowError:
    return RowError("bad_messages", f"message {number}: {problem}")


def find_calls(
    text: str, names: frozenset[str], *, one_call: bool = False
) -> tuple[str, list[Call]]:
    """(content, calls): the calls that end a text, and what stands before them."""
    start = 0
    while start >= 0:
        calls = _calls_at(text, start, names)
        if calls and not (one_call and len(calls) > 1):
            content = text[:start]
            return ("" if content.isspace() else content), calls
        start = text.find("\n", start) + 1 or -1
    return text, []


def _calls_at(text: str, start: int, names: frozenset[str]) -> list[Call]:
    """The calls of which the rest of a text consists; none if there is anything else in it."""
    calls = []
    while start < len(text):
        head = _HEAD.match(text, start)
        if not head or head["name"] not in names:
            return []
        try:
            _, end = _DECODER.raw_decode(text, head.end())
        except (ValueError, RecursionError):
            return []
        calls.append(Call(name=head["name"], arguments=text[head.end() : end]))
        start = end + len(text[end:]) - len(text[end:].lstrip())
    return calls


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_HEAD = re.compile(r"[ \t]*(?P<name>[A-Za-z0-9_-]{1,64})[ \t]*\n\s*(?=\{)")
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


class CallStream:
    """One output that grows; `add` gives, joined, what `find_calls` makes of the whole."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._text = ""
        self._shown = 0  # characters that were handed out
        self._line = 0  # where the first line begins that may yet turn out to be a call's
        self._is_text = False  # whether that line has turned out to be none

    def add(self, piece: str, *, last: bool) -> tuple[str, list[Call]]:
        """(content, calls) that became certain with this piece; calls come with the last one."""
        self._text += piece
        calls: list[Call] = []
        if last:
            certain, calls = self._tools.read(self._text)
        else:
            certain = self._text[: self._num_certain()]
            certain = "" if certain.isspace() else certain
        found, self._shown = certain[self._shown :], max(self._shown, len(certain))
        return found, calls

    def _num_certain(self) -> int:
        while True:
            self._is_text = self._is_text or not _may_begin(
                self._text[self._line :], self._tools.names
            )
            following = self._text.find("\n", self._line) + 1
            if not (self._is_text and following):
                return len(self._text) if self._is_text else self._line
            self._line, self._is_text = following, False


def _may_begin(text: str, names: frozenset[str]) -> bool:
    """Whether more text could make calls of this one. Nothing at all may become anything."""
    line, ended, rest = text.partition("\n")
    name = line.strip(" \t")
    if not ended:
        return any(known.startswith(name) for known in names)
    return name in names and rest.lstrip()[:1] in ("", "{")
