"""A YAML mapping becomes a dataclass of sections, also of sections that the user names.

Owns messages about unknown keys, wrong types and missing ones, each with its dotted name; a key of
a named section is "models.NAME.engine". Knows nothing of what the sections mean.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import pydantic

from glm_batch.jobs.files.job_file import Place, Problem, describe, unquoted_dates

T = TypeVar("T")


def read_sections(owner: type[T], data: dict[str, Any], place: Place) -> T:
    """Raises ConfigError with all unknown keys, or else all values of a wrong type."""
    place.refuse([*unknown_keys(data, owner, ""), *unquoted_dates(data, "")])
    try:
        # JSON text in strict mode is exactly YAML's view of a value: "64" is no number.
        return pydantic.TypeAdapter(owner).validate_json(json.dumps(data), strict=True)
    except pydantic.ValidationError as error:
        problems: dict[str, Problem] = {}
        for each in error.errors(include_url=False):
            problem = _explained(owner, each, data)
            problems.setdefault(problem.key, problem)  # a union reports each of its members
        place.refuse(list(problems.values()))
        raise AssertionError("a validation error without a problem") from error


def unknown_keys(data: Mapping[Any, Any], owner: Any, prefix: str) -> Iterator[Problem]:
    """The keys that no section has, with the nearest that it does have."""
    named = typing.get_origin(owner) is dict
    hints = {} if named else typing.get_type_hints(owner)
    for name, value in data.items():
        hint = typing.get_args(owner)[1] if named else hints.get(name)
        if hint is None:
            close = difflib.get_close_matches(str(name), hints, n=1)
            told = (
                f"did you mean {prefix}{close[0]}?" if close else f"known here: {', '.join(hints)}"
            )
            yield Problem(key=f"{prefix}{name}", message=f"unknown key; {told}")
        elif isinstance(value, dict) and _has_keys(hint):
            yield from unknown_keys(value, hint, f"{prefix}{name}.")


def _has_keys(hint: Any) -> bool:
    """Whether it is a section, or a mapping of named sections."""
    return dataclasses.is_dataclass(hint) or (
        typing.get_origin(hint) is dict and _has_keys(typing.get_args(hint)[1])
    )


def _explained(owner: Any, error: Any, data: Any) -> Problem:
    """pydantic's error in our words: the key, the value found, what it takes instead."""
    hint, value, names = owner, data, list[str]()
    for part in error["loc"]:
        if dataclasses.is_dataclass(hint) and isinstance(part, str):
            hint = typing.get_type_hints(hint).get(part)
        elif typing.get_origin(hint) is dict:
            hint = typing.get_args(hint)[1]
        else:
            break
        names.append(str(part))
        value = value.get(part) if isinstance(value, dict) else None
    key = ".".join(names)
    if error["type"] == "missing":
        return Problem(key=key, message="the key is missing")
    if error["type"] == "value_error":
        return Problem(key=key, message=str(error["ctx"]["error"]))
    return Problem(
        key=key,
        message=f"it is {json.dumps(value, ensure_ascii=False)}, but it must be {describe(hint)}",
    )
