"""A YAML file becomes a dataclass of sections: job files, sweeps and serve configurations alike.

Every refusal names the key and its place, a line of the file or a `--set`, and says what to do.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.job import Job

REQUIRED = "required"
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something wrong with one key: what, and what to do about it."""

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where keys were written: the file, the line of each, and those that came from `--set`."""

    path: str
    lines: Mapping[str, int]
    overridden: frozenset[str]

    def of(self, key: str) -> str:
        """ "job.yaml:7" for a key in the file, "--set task.kind" for an override, "job.yaml" for an
        absent key.
        """
        for given in self.overridden:
            if given == key or key.startswith(given + "."):
                return f"--set {given}"
        line = self.lines.get(key)
        return self.path if line is None else f"{self.path}:{line}"

    def refuse(self, problems: Sequence[Problem]) -> None:
        """Raises one ConfigError with a line for each problem, unless there is none."""
        if problems:
            raise ConfigError("\n".join(map(self._sentence, problems)))

    def _sentence(self, problem: Problem) -> str:
        place = self.of(problem.key)
        told = problem.message if place.endswith(f" {problem.key}") else problem
        return f"{place}: {told}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """The type of a key and its default, which is REQUIRED where it has none."""

    type: Any
    default: Any


@cache
def keys_of(owner: type) -> dict[str, Key]:
    """Every key by its dotted name, sections included, as declared; not those of named sections."""
    return dict(_declared(owner, ""))


def _declared(owner: type, prefix: str) -> Iterator[tuple[str, Key]]:
    hints = typing.get_type_hints(owner)
    for field in dataclasses.fields(owner):
        hint, default = hints[field.name], field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        default = REQUIRED if default is dataclasses.MISSING else default
        yield prefix + field.name, Key(type=hint, default=default)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _declared(hint, f"{prefix}{field.name}.")


def load_sections(
    owner: type[T], path: str, what: str, overrides: Sequence[str] = ()
) -> tuple[T, Place]:
    """Reads a file and applies `a.b=value` overrides; `what` says what the file should be.

    Raises ConfigError with all unknown keys, or else all values of a wrong type.
    """
    return read_sections(owner, *read_yaml(path, what), path, overrides)


def read_sections(
    owner: type[T],
    data: dict[str, Any],
    lines: Mapping[str, int],
    path: str,
    overrides: Sequence[str] = (),
) -> tuple[T, Place]:
    """As `load_sections`, of a mapping that was read from `path`."""
    place = Place(path=path, lines=lines, overridden=_override(owner, data, overrides))
    place.refuse(list(_unknown_keys(owner, owner, data, "")))
    place.refuse(list(_unquoted_dates(data, "")))
    try:
        # JSON text in strict mode is exactly YAML's view of a value: lists become tuples, but "64"
        # is no number.
        found = pydantic.TypeAdapter(owner).validate_json(json.dumps(data), strict=True)
    except pydantic.ValidationError as error:
        problems: dict[str, Problem] = {}
        for each in error.errors(include_url=False):
            problem = _explained(owner, each, data)
            problems.setdefault(problem.key, problem)  # a union reports each of its members
        place.refuse(list(problems.values()))
        raise AssertionError("a validation error without a problem") from error
    return found, place


def read_yaml(path: str, what: str) -> tuple[dict[str, Any], dict[str, int]]:
    """A file's mapping, and the line of each of its keys. Raises ConfigError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{path}: the file cannot be read: {reason}") from error
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        data = loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f":{mark.line + 1}"
        raise ConfigError(f"{path}{line}: not valid YAML: {_one_line(error)}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: {what}")
    return data, dict(_key_lines(node, "", path))


def _key_lines(node: yaml.Node | None, prefix: str, path: str) -> Iterator[tuple[str, int]]:
    """The line of each key. Of two equal keys YAML would take the last: here they are refused."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        name, line = str(key_node.value), key_node.start_mark.line + 1
        if name in seen:
            raise ConfigError(
                f"{path}:{line}: {prefix}{name}: the key stands twice (first in line {seen[name]})"
            )
        seen[name] = line
        yield prefix + name, line
        yield from _key_lines(value_node, f"{prefix}{name}.", path)


def _one_line(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or error).splitlines()[0]


def _override(owner: type, data: dict[str, Any], overrides: Sequence[str]) -> frozenset[str]:
    """Puts `a.b=value` texts into the mapping, and tells which keys they are."""
    assignments = [_assignment(owner, text) for text in overrides]
    for key, value in assignments:
        *sections, last = key.split(".")
        section = data
        for name in sections:
            if section.get(name) is None:
                section[name] = {}
            section = section[name]
            if not isinstance(section, dict):
                raise ConfigError(
                    f"--set {key}: {name} is not a section, so it has no keys of its own"
                )
        section[last] = value
    return frozenset(key for key, _ in assignments)


def _assignment(owner: Any, text: str) -> tuple[str, Any]:
    """The value is YAML, but a key that takes text takes it as it stands: a prompt's braces are no
    YAML mapping.
    """
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not key:
        raise ConfigError(
            f"--set {text}: write it as key=value, for example --set sampling.max_tokens=32"
        )
    for name in key.split("."):
        owner = _inner(owner, name)
    takes_text = owner in (str, str | None)
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        if not takes_text:
            raise ConfigError(
                f"--set {text}: the value is not valid YAML: {_one_line(error)}"
            ) from error
        parsed = value
    return key, value if takes_text and not isinstance(parsed, str | None) else parsed


def _inner(hint: Any, name: object) -> Any:
    """The type of a section's key, or of the section `name` of a mapping; None where there is
    none.
    """
    if dataclasses.is_dataclass(hint):
        return typing.get_type_hints(hint).get(str(name))
    return typing.get_args(hint)[1] if _is_named(hint) else None


def _is_named(hint: Any) -> bool:
    """Whether it is a mapping whose keys are the user's, and its values sections or such mappings,
    or plain values of one type.
    """
    return typing.get_origin(hint) is dict and typing.get_args(hint)[1] is not Any


def _unknown_keys(
    owner: type, hint: Any, data: Mapping[Any, Any], prefix: str
) -> Iterator[Problem]:
    for name, value in data.items():
        inner = _inner(hint, name)
        if inner is None:
            told = f"unknown key; {_nearest(owner, hint, str(name), prefix)}"
            yield Problem(key=f"{prefix}{name}", message=told)
        elif isinstance(value, dict) and (dataclasses.is_dataclass(inner) or _is_named(inner)):
            yield from _unknown_keys(owner, inner, value, f"{prefix}{name}.")


def _nearest(owner: type, hint: Any, name: str, prefix: str) -> str:
    """The nearest sibling; else a key of that name in another section; else what is known here."""
    siblings = [field.name for field in dataclasses.fields(hint)]
    if close := difflib.get_close_matches(name, siblings, n=1):
        return f"did you mean {prefix}{close[0]}?"
    leaves = {key.rpartition(".")[2]: key for key in reversed(keys_of(owner))}
    if elsewhere := difflib.get_close_matches(name, leaves, n=1):
        return f"did you mean {leaves[elsewhere[0]]}?"
    return f"known here: {', '.join(siblings)}"


def _unquoted_dates(value: Any, key: str) -> Iterator[Problem]:
    """YAML turns unquoted dates into objects that no key takes."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _unquoted_dates(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            yield from _unquoted_dates(inner, key)
    elif not isinstance(value, str | int | float | bool | None):
        read = f"YAML reads {value} as a {type(value).__name__}: put it in quotes"
        yield Problem(key=key, message=read)


def _explained(owner: Any, error: Any, data: Any) -> Problem:
    """pydantic's error in our words: the key, the value found, what it takes instead."""
    hint, value, item, names = owner, data, "", list[str]()
    for part in error["loc"]:
        if isinstance(part, int) and isinstance(value, list):
            value, item = value[part], f"item {part + 1} of "
        elif (inner := _inner(hint, part)) is not None:
            hint, value = inner, value.get(part) if isinstance(value, dict) else value
            names.append(str(part))
        else:
            break  # a member of a union
    key = ".".join(names)
    if error["type"] == "missing" and len(names) == len(error["loc"]):
        return Problem(key=key, message="the key is missing, and it has no default")
    if error["type"] == "value_error":
        return _from_post_init(key, str(error["ctx"]["error"]))
    expected = describe(hint)
    found = f"{item}it is {_shown(value)}, but it must be {expected}"
    return Problem(key=key, message=found + _hint(value, expected))


def _from_post_init(section: str, text: str) -> Problem:
    """A section's own check names the key as "section.key=value: rule"."""
    name, equals, rule = text.partition("=")
    if not equals:
        return Problem(key=section, message=text)
    key = f"{section}.{name.rpartition('.')[2]}"
    return Problem(key=key, message=f"it is {rule.replace(': it must', ', but it must', 1)}")


def _shown(value: Any) -> str:
    return "null" if value is None else json.dumps(value, ensure_ascii=False)


def _hint(value: Any, expected: str) -> str:
    if value is None:
        return "; give it a value, or remove the line for the default"
    if "text" not in expected or not isinstance(value, bool | int | float):
        return ""
    if isinstance(value, bool):
        return "; YAML reads yes, no, on and off as true and false: put the word in quotes"
    return "; put a number that is meant as text in quotes"


def describe(hint: Any) -> str:
    """A type in words: a whole number or "auto"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        words = [json.dumps(word) for word in arguments]
        return words[0] if len(words) == 1 else f"one of {', '.join(words)}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is tuple and Ellipsis not in arguments:
        return f"a list of {len(arguments)} whole numbers"
    if origin in (list, tuple):
        whole = arguments[0] is int
        return "a list of whole numbers" if whole else f"a list of {describe(arguments[0])}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a section of keys"
    names = {
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(hint, str(hint))


WHAT = "a job file is a mapping of keys (model, input, output, task ...)"


def load_job(path: str, overrides: Sequence[str] = ()) -> tuple[Job, Place]:
    """Reads a job file and applies `a.b=value` overrides. Raises ConfigError that names each key
    and its place.
    """
    return load_sections(Job, path, WHAT, overrides)


def load_kept_job(text: bytes, path: str, overrides: Sequence[str] = ()) -> tuple[Job, Place]:
    """As `load_job`, of a job that was kept as JSON beside its output in `path`."""
    data = json.loads(text)
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no job: run the job with label again")
    return read_sections(Job, data, {}, path, overrides)


def is_sweep(path: str) -> bool:
    """Whether a file holds a sweep and no job. Raises ConfigError when it cannot be read."""
    data, _ = read_yaml(path, WHAT)
    return "models" in data and "datasets" in data


def job_keys() -> dict[str, Key]:
    """Every key of a job file by its dotted name, in the order in which they are declared."""
    return keys_of(Job)
