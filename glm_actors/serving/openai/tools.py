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
from typing import Any, Literal

from glm_batch.glm_actors.faults.schema_check import SchemaChecker
from glm_batch.glm_actors.serving.openai.api_errors import ApiError, bad
from glm_batch.glm_actors.serving.openai.protocol import ChatRequest, Function, ToolChoice
from glm_batch.models.engine.api.request import Constraint
from glm_batch.models.engine.decoding.constraints import JSON_WHITESPACE
from glm_batch.models.errors import RowError
from glm_batch.models.request_limits import RequestLimits

Json = dict[str, Any]
Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call as the model has written it; `arguments` are the JSON text of an object."""

    name: str
    arguments: str

    def shown(self) -> Json:
        """As OpenAI's answers have it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """A request's functions; one of those that `must` names has to be called."""

    functions: tuple[Function, ...] = ()
    must: tuple[str, ...] = ()
    one_call: bool = False

    @property
    def names(self) -> frozenset[str]:
        return frozenset(function.name for function in self.functions)

    def for_template(self) -> list[Json] | None:
        """As chat templates read them; None without any."""
        return [
            {"type": "function", "function": _shown(function)} for function in self.functions
        ] or None

    def constraint(self, caps: RequestLimits, schemas: SchemaChecker) -> Constraint | None:
        """What holds the answer to a call that must be, or a strict function's arguments to their
        schema.

        Raises ApiError for schemas that decoding cannot follow.
        """
        if self.must:
            text = call_grammar(
                [function for function in self.functions if function.name in self.must]
            )
        elif strict := [function for function in self.functions if function.strict]:
            text = free_grammar(strict)
        else:
            return None
        if len(text) > caps.max_schema_bytes:
            raise bad(
                "tools",
                f"the functions' schemas have {len(text):,} bytes; this server takes "
                f"{caps.max_schema_bytes:,}",
            )
        if problem := schemas.problem(text, "lark"):
            message = f"tools: not schemas that decoding can follow: {problem[:300]}"
            raise ApiError(400, message, "invalid_constraint", "tools")
        return Constraint(kind="lark", text=text)


def _shown(function: Function) -> Json:
    said = {
        "name": function.name,
        "description": function.description,
        "parameters": function.parameters,
    }
    return {key: value for key, value in said.items() if value is not None}


def tools_of(body: ChatRequest) -> Tools:
    """The functions that may be called. Raises ApiError for contradictions."""
    choice: Literal["none", "auto", "required"] | ToolChoice = body.tool_choice or (
        "auto" if body.tools else "none"
    )
    if body.tools is None:
        for param, given in (
            ("tool_choice", choice != "none"),
            ("parallel_tool_calls", body.parallel_tool_calls),
        ):
            if given:
                raise bad(param, "it goes with tools")
        return Tools()
    functions = tuple(tool.function for tool in body.tools)
    names = [function.name for function in functions]
    if len(set(names)) < len(names):
        raise bad("tools", "two of them have the same name")
    if isinstance(choice, ToolChoice) and choice.function.name not in names:
        raise bad(
            "tool_choice", f"there is no tool {choice.function.name!r}; there is {', '.join(names)}"
        )
    if choice == "none":
        return Tools()
    if body.response_format is not None and body.response_format.type != "text":
        raise bad(
            "response_format",
            "an answer in a format of its own calls no tools; leave one of them out",
        )
    must = (
        (choice.function.name,)
        if isinstance(choice, ToolChoice)
        else names
        if choice == "required"
        else ()
    )
    return Tools(functions=functions, must=tuple(must), one_call=body.parallel_tool_calls is False)


def call_grammar(functions: Sequence[Function]) -> str:
    """One call of one of the functions, and nothing else, in llguidance's form of Lark."""
    calls = " | ".join(f"call_{number}" for number in range(len(functions)))
    rules = (
        f"call_{number}: {_name(function)} {_arguments(function)}\n"
        for number, function in enumerate(functions)
    )
    return f"start: {calls}\n" + "".join(rules)


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
    """Decoding may write any blanks between JSON tokens, and none without bounds."""
    schema = (
        {"type": "object"}
        | (function.parameters or {})
        | {"x-guidance": {"whitespace_pattern": JSON_WHITESPACE}}
    )
    try:
        return "%json " + json.dumps(schema)
    except (RecursionError, ValueError) as error:
        raise bad("tools", f"the parameters of {function.name} are nested too deeply") from error


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
            certain, calls = find_calls(
                self._text, self._tools.names, one_call=self._tools.one_call
            )
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
