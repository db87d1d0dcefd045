"""Dataclasses come back equal from typed columns; what another version put aside counts for nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa
import pytest

from glm_batch.glm_actors.units.arrow_structs import arrow_type, reader, to_arrow
from glm_batch.glm_actors.units.batches import completion_table
from glm_batch.glm_actors.units.model_actor import UnitJournal
from glm_batch.models.engine.api.request import Completion


@dataclass(frozen=True)
class Inner:
    name: Literal["a", "b"]
    size: int | None = None


@dataclass(frozen=True)
class Outer:
    inner: Inner
    flags: tuple[bool, ...] = ()
    nested: tuple[tuple[int, ...], ...] = ()
    several: tuple[Inner, ...] | None = None
    named: Mapping[int, str] = field(default_factory=dict)
    data: bytes = b""
    share: float = 0.5


@pytest.mark.parametrize(
    "value",
    [
        Outer(Inner("a")),
        Outer(
            Inner("b", 1 << 62), (True, False), ((1, 2), ()), (Inner("a"),), {3: "x"}, b"\0", -1e300
        ),
    ],
)
def test_dataclasses_come_back_equal(value: Outer) -> None:
    column = pa.array([to_arrow(value), None], arrow_type(Outer))
    read = reader(Outer)
    assert [read(each) for each in column.to_pylist()] == [value, None]
    assert column.type.field("nested").type == pa.list_(pa.list_(pa.int64()))
    assert column.type.field("named").type == pa.map_(pa.int64(), pa.string())


def test_what_another_version_has_put_aside_is_computed_again() -> None:
    def put_aside(name: str) -> pa.Table:
        return completion_table([Completion(id=name, finish_reason="scored")])

    class Found:
        every_seconds = 1.0

        def write(self, unit: int, table: pa.Table) -> None: ...

        def read(self, unit: int) -> Sequence[pa.Table]:
            return [put_aside("mine"), put_aside("theirs").drop_columns(["array"])]

    assert UnitJournal(Found())._known.keys() == {"mine"}
