"""A job file becomes a Job: YAML, `--set` overrides, unknown keys, types.

Owns reading and the place (file and line, or override) of every key, so that each message can name
it. Whether the values make sense together and fit the files is the business of jobs.checks.checks.
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
from typing import Any

import pydantic
import yaml

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.job import Job

REQUIRED = "required"
Yaml = tuple[dict[str, Any], dict[str, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something wrong with one key: what, and what to do about it."""

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a job's keys were written: the file, the line of each key, and the keys that came from
    `--set`.
    """

    path: str
    lines: Mapping[str, int]
    overridden: frozenset[str]

    def of(self, key: str) -> str:
        """ "job.yaml:7" for a key in the file, "--set task.kind" for an override, "job.yaml" for an
        absent key.
        """
        given = next(
            (name for name in self.overridden if name == key or key.startswith(name + ".")), None
        )
        if given is not None:
            return f"--set {given}"
        line = self.lines.get(key)
        return self.path if line is None else f"{self.path}:{line}"

    def refuse(self, problems: Sequence[Problem]) -> None:
        """Raises one ConfigError with a line for each problem, unless there is none."""
        if problems:
            raise ConfigError("\n".join(map(self._sentence, problems)))

    def _sentence(self, problem: Problem) -> str:
        place = self.of(problem.key)
        return (
            f"{place}: {problem.message}"
            if place.endswith(f" {problem.key}")
            else f"{place}: {problem}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class JobKey:
    """One key of the public job file: its type and its default (REQUIRED when it has none)."""

    type: Any
    default: Any


def load_job(path: str, overrides: Sequence[str] = ()) -> tuple[Job, Place]:
    """Reads a job file and applies `a.b=value` overrides. Raises ConfigError that names each key
    and its place.
    """
    return _job(*read_yaml(path), path, overrides)


def load_kept_job(text: bytes, path: str, overrides: Sequence[str] = ()) -> tuple[Job, Place]:
    """As `load_job`, of a job that was kept as JSON beside its output in `path`."""
    data = json.loads(text)
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no job: run the job with label again")
    return _job(data, {}, path, overrides)


def _job(
    data: dict[str, Any], lines: Mapping[str, int], path: str, overrides: Sequence[str]
) -> tuple[Job, Place]:
    place = Place(path=path, lines=lines, overridden=apply_overrides(data, overrides))
    place.refuse(list(_unknown_keys(data, "")))
    place.refuse(list(unquoted_dates(data, "")))
    return _validate(data, place), place


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> frozenset[str]:
    """Puts `a.b=value` texts into the mapping, and tells which keys they are. Raises ConfigError."""
    assignments = [_parse_override(text) for text in overrides]
    for key, value in assignments:
        _assign(data, key, value)
    return frozenset(key for key, _ in assignments)


@cache
def job_keys() -> dict[str, JobKey]:
    """Every key of a job file by its dotted name, sections included, in the order in which they are
    declared.
    """
    return dict(_declared_keys(Job, ""))


def _declared_keys(owner: type, prefix: str) -> Iterator[tuple[str, JobKey]]:
    hints = typing.get_type_hints(owner)
    for field in dataclasses.fields(owner):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        hint = hints[field.name]
        yield (
            prefix + field.name,
            JobKey(type=hint, default=REQUIRED if default is dataclasses.MISSING else default),
        )
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _declared_keys(hint, f"{prefix}{field.name}.")


def read_yaml(
    path: str, what: str = "a job file is a mapping of keys (model, input, output, task ...)"
) -> Yaml:
    """A YAML file's mapping and the line of each of its keys. Raises ConfigError; `what` says what
    it should be.
    """
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
        raise ConfigError(
            f"{path}{_yaml_line(error)}: not valid YAML: {_one_line(error)}"
        ) from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: {what}")
    return data, dict(_key_lines(node, "", path))


def is_sweep(path: str) -> bool:
    """Whether a file holds a sweep and no job. Raises ConfigError when it cannot be read."""
    data, _ = read_yaml(path)
    return "models" in data and "datasets" in data


def _key_lines(node: yaml.Node | None, prefix: str, path: str) -> Iterator[tuple[str, int]]:
    """The line of each key. YAML would let the last of two equal keys win in silence: here they are
    refused.
    """
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


def _yaml_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f":{mark.line + 1}"


def _one_line(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or error).splitlines()[0]


def _parse_override(text: str) -> tuple[str, Any]:
    """The value is YAML, but a key that takes text takes it as it stands: a prompt's braces are no
    YAML mapping.
    """
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not key:
        raise ConfigError(
            f"--set {text}: write it as key=value, for example --set sampling.max_tokens=32"
        )
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        if not _takes_text(key):
            raise ConfigError(
                f"--set {text}: the value is not valid YAML: {_one_line(error)}"
            ) from error
        parsed = value
    return key, value if _takes_text(key) and not isinstance(parsed, str | None) else parsed


def _takes_text(key: str) -> bool:
    return key in job_keys() and job_keys()[key].type in (str, str | None)


def _assign(data: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = data.get(section)
        if inner is None:
            inner = data[section] = {}
        if not isinstance(inner, dict):
            raise ConfigError(
                f"--set {key}: {section} is not a section, so it has no keys of its own"
            )
        data = inner
    data[last] = value


def _unknown_keys(data: Mapping[Any, Any], prefix: str) -> Iterator[Problem]:
    known = job_keys()
    for name, value in data.items():
        key = f"{prefix}{name}"
        if key not in known:
            yield Problem(key=key, message=f"unknown key{_nearest(str(name), prefix)}")
        elif dataclasses.is_dataclass(known[key].type) and isinstance(value, dict):
            yield from _unknown_keys(value, key + ".")


def _nearest(name: str, prefix: str) -> str:
    """The nearest sibling; else a key of that name in another section; else what is known here."""
    known = job_keys()
    siblings = [
        key for key in known if key.startswith(prefix) and "." not in key.removeprefix(prefix)
    ]
    close = difflib.get_close_matches(prefix + name, siblings, n=1, cutoff=0.75)
    close = close or difflib.get_close_matches(
        name, [key.removeprefix(prefix) for key in siblings], n=1
    )
    if close:
        return f"; did you mean {prefix}{close[0].removeprefix(prefix)}?"
    leaves = {key.rpartition(".")[2]: key for key in reversed(known)}
    elsewhere = difflib.get_close_matches(name, leaves, n=1)
    if elsewhere:
        return f"; did you mean {leaves[elsewhere[0]]}?"
    return f"; known here: {', '.join(siblings)}"


def unquoted_dates(value: Any, key: str) -> Iterator[Problem]:
    """YAML turns unquoted dates into objects that no key takes."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from unquoted_dates(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            yield from unquoted_dates(inner, key)
    elif not isinstance(value, str | int | float | bool | None):
        yield Problem(
            key=key, message=f"YAML reads {value} as a {type(value).__name__}: put it in quotes"
        )


def _validate(data: dict[str, Any], place: Place) -> Job:
    # JSON text in strict mode is exactly YAML's view of a value: lists become tuples, but "64" is
    # no number.
    try:
        return pydantic.TypeAdapter(Job).validate_json(json.dumps(data), strict=True)
    except pydantic.ValidationError as error:
        problems: dict[str, Problem] = {}
        for each in error.errors(include_url=False):
            problem = _explain(each, data)
            problems.setdefault(problem.key, problem)  # a union reports each of its members
        place.refuse(list(problems.values()))
        raise AssertionError("a validation error without a problem") from error


def _explain(error: Any, data: dict[str, Any]) -> Problem:
    """pydantic's error in our words: the key, the value found, what it takes instead."""
    key, value, item = "", typing.cast(Any, data), ""
    for part in error["loc"]:
        name = f"{key}.{part}".lstrip(".")
        if isinstance(part, int) and isinstance(value, list):
            value, item = value[part], f"item {part + 1} of "
        elif name in job_keys():
            key, value = name, value.get(part) if isinstance(value, dict) else value
        else:
            break
    if error["type"] == "missing" and key == ".".join(map(str, error["loc"])):
        return Problem(key=key, message="the key is missing; every job needs it")
    if error["type"] == "value_error":
        return _from_post_init(key, str(error["ctx"]["error"]))
    expected = describe(job_keys()[key].type)
    found = f"{item}it is {_shown(value)}, but it must be {expected}"
    return Problem(key=key, message=found + _hint(value, expected))


def _from_post_init(section: str, text: str) -> Problem:
    """A section's own check names the key as "section.key=value: rule"."""
    name, equals, rule = text.partition("=")
    if not equals:
        return Problem(key=section, message=text)
    return Problem(key=name, message=f"it is {rule.replace(': it must', ', but it must', 1)}")


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
        return (
            "a list of whole numbers"
            if arguments[0] is int
            else f"a list of {describe(arguments[0])}"
        )
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
