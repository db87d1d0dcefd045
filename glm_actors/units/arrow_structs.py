"""Frozen dataclasses as Arrow structs by their declared types, so that data travel as typed columns
and not as JSON in cells.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal, get_args, get_origin

import pyarrow as pa

_PLAIN = {
    int: pa.int64(),
    float: pa.float64(),
    str: pa.string(),
    bool: pa.bool_(),
    bytes: pa.binary(),
}


def arrow_type(hint: Any) -> pa.DataType:
    """The Arrow type of values declared as `hint`: a plain type, Literal of strings, `X | None`, a
    mapping, a tuple or another sequence of one type, or a dataclass of these.
    """
    hint = _without_none(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return pa.struct([(name, arrow_type(each)) for name, each in _hints(hint).items()])
    if get_origin(hint) is Literal:
        return pa.string()
    if get_args(hint):
        of = [arrow_type(each) for each in get_args(hint) if each is not Ellipsis]
        return pa.map_(*of) if _is_mapping(hint) else pa.list_(of[0])
    return _PLAIN[hint]


def to_arrow(value: Any) -> Any:
    """A value as pyarrow takes it: dataclasses as dicts, mappings as pairs."""
    if dataclasses.is_dataclass(value):
        names = value.__dataclass_fields__
        return {name: to_arrow(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        return [to_arrow(each) for each in value]
    return value


@cache
def reader(hint: Any) -> Callable[[Any], Any]:
    """Makes of what pyarrow gives back a value declared as `hint`; sequences become tuples."""
    hint = _without_none(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        fields = [(name, reader(each)) for name, each in _hints(hint).items()]
        return lambda row: (
            None if row is None else hint(**{name: read(row[name]) for name, read in fields})
        )
    if get_origin(hint) is Literal or not get_args(hint):
        return _as_it_is
    if _is_mapping(hint):
        return lambda pairs: None if pairs is None else dict(pairs)
    inner = reader(get_args(hint)[0])
    if inner is _as_it_is:
        return lambda values: None if values is None else tuple(values)
    return lambda values: None if values is None else tuple(map(inner, values))


def _as_it_is(value: Any) -> Any:
    return value


def _is_mapping(hint: Any) -> bool:
    origin = get_origin(hint)
    return isinstance(origin, type) and issubclass(origin, Mapping)


@cache
def _hints(dataclass: Any) -> dict[str, Any]:
    found = typing.get_type_hints(dataclass)
    return {name: found[name] for name in dataclass.__dataclass_fields__}


def _without_none(hint: Any) -> Any:
    """`X` of `X | None`."""
    if get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (each for each in get_args(hint) if each is not type(None))
    return hint
