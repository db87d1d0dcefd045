"""What has changed in a job's input since a plan was made, and which units of other plans hold the
same rows.

A file counts as the same while its name, size and stamp are. The rows of one that is not are
compared unit by unit, by digests of what is read of them; they are made here, when a file is
planned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.input.listing import InputFile
from glm_batch.pipelines.input.source import DamagedError, Source, Survey
from glm_batch.pipelines.input.values import column_values
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.planning.plan import (
    Identity,
    Plan,
    PlannedFile,
    Unit,
    input_identity,
    job_source,
    make_plan,
)

DIGEST_CHARS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """Names of input files by what became of them; `deleted` are kept until they are dropped."""

    new: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()


def changes(before: Plan | None, files: Sequence[InputFile]) -> Changes:
    """Compares the input with that of a plan."""
    known = {planned.file.name: planned.file for planned in before.present} if before else {}
    return Changes(
        new=tuple(file.name for file in files if file.name not in known),
        changed=tuple(
            file.name for file in files if file.name in known and file.mark != known[file.name].mark
        ),
        unchanged=tuple(
            file.name for file in files if file.name in known and file.mark == known[file.name].mark
        ),
        deleted=tuple(each.file.name for each in gone(before, files)),
    )


def is_current(plan: Plan, files: Sequence[InputFile]) -> bool:
    """Whether a plan is one of just these files, in this order."""
    return [planned.file.mark for planned in plan.present] == [file.mark for file in files]


def next_plan(
    job: Job, survey: Survey, identity: Identity, known: Plan | None, kept: Sequence[PlannedFile]
) -> Plan:
    """The plan of the present input, with the `kept` files that are gone from it behind.

    Files that are `known` as they are now are not counted again. Raises ConfigError.
    """
    plan = make_plan(job, survey, identity, known, grows=True)
    source = job_source(job)
    planned = tuple(
        each if each.digests else _with_digests(source, each, plan.unit_rows) for each in plan.files
    )
    identity = identity | {"input": input_identity([*survey.files, *(each.file for each in kept)])}
    return replace(plan, identity=identity, files=(*planned, *kept), num_deleted=len(kept))


def gone(before: Plan | None, files: Sequence[InputFile]) -> tuple[PlannedFile, ...]:
    """What a plan has and the input has not."""
    listed = {file.name for file in files}
    return tuple(each for each in before.files if each.file.name not in listed) if before else ()


def same_job(one: Identity, other: Identity) -> bool:
    """Whether two jobs differ in nothing but their input files."""
    return one | {"input": None} == other | {"input": None}


def check_carried(job: Job, plan: Plan, before: Plan) -> None:
    """Raises ConfigError where the new input would change the types of the output."""
    for name in job.carry:
        now, then = plan.schema.field(name).type, before.schema.field(name).type
        if now != then:
            raise ConfigError(
                f"carry: the column {name!r} has type {now} in the present input, and the output "
                f"holds {then}; convert the files that differ, or process every row again with "
                "--changed-job"
            )


def claims(plan: Plan) -> Iterator[tuple[Unit, Hashable]]:
    """Each unit, and what another plan must have among its `offers` to hold its rows.

    Rows of a file that is gone are taken as they are; others by place, content and duplicates.
    """
    earlier = plan.duplicates_by_unit()
    for unit in plan.units():
        gone = unit.file >= len(plan.present)
        yield unit, _place(plan, unit) if gone else (_content(plan, unit), _repeated(earlier, unit))


def offers(plan: Plan) -> Iterator[tuple[Hashable, Unit]]:
    """What units of this plan can stand for, each with its unit. See `claims`."""
    earlier = plan.duplicates_by_unit()
    for unit in plan.units():
        yield _place(plan, unit), unit
        if unit.file < len(plan.present):  # which duplicates the others had is not known any more
            yield (_content(plan, unit), _repeated(earlier, unit)), unit


def _place(plan: Plan, unit: Unit) -> Hashable:
    return plan.files[unit.file].file.mark, unit.rows.start, unit.rows.stop


def _content(plan: Plan, unit: Unit) -> Hashable:
    planned, rows = plan.files[unit.file], unit.rows
    digest = planned.digests[rows.start // plan.unit_rows] if planned.digests else ""
    return (planned.file.name, rows.start, rows.stop, digest) if digest else _place(plan, unit)


def _repeated(earlier: Mapping[tuple[int, int], Mapping[int, str]], unit: Unit) -> Hashable:
    return tuple(sorted(earlier.get((unit.file, unit.rows.start), {}).items()))


def _with_digests(source: Source, planned: PlannedFile, unit_rows: int) -> PlannedFile:
    alone = Plan(
        identity={}, unit_rows=unit_rows, files=(planned,), duplicates={}, schema=pa.schema([])
    )
    return replace(
        planned, digests=tuple(_digest(source, planned.file, unit) for unit in alone.units())
    )


def _digest(source: Source, file: InputFile, unit: Unit) -> str:
    """Of what is read of a unit; empty where that cannot be read, which is like nothing else."""
    try:
        table = source.read(file, unit.rows)
    except DamagedError:
        return ""
    digest = hashlib.sha256()
    for name in table.column_names:
        digest.update(f"{name} {table[name].type} {table.num_rows}\n".encode())
        for piece in _pieces(table[name]):
            digest.update(piece)
    return digest.hexdigest()[:DIGEST_CHARS]


def _pieces(column: pa.ChunkedArray) -> Iterator[Any]:
    """A column as bytes that depend on its values alone, not on how Arrow holds them."""
    types, dtype = pa.types, column.type
    yield np.packbits(column.is_null().to_numpy())
    values = column.drop_null()
    if types.is_dictionary(dtype):
        values = values.cast(dtype.value_type)
        dtype = dtype.value_type
    if (
        types.is_string(dtype)
        or types.is_large_string(dtype)
        or types.is_binary(dtype)
        or types.is_large_binary(dtype)
    ):
        yield pc.binary_length(values).to_numpy()
        for chunk in values.chunks:
            yield _text_bytes(chunk)
    elif types.is_integer(dtype) or types.is_floating(dtype):
        yield values.to_numpy()
    else:
        yield "\n".join(map(repr, column_values(values))).encode("utf-8", "surrogatepass")


def _text_bytes(chunk: pa.Array) -> memoryview:
    wide = pa.types.is_large_string(chunk.type) or pa.types.is_large_binary(chunk.type)
    _, offsets, data = chunk.buffers()
    bounds = np.frombuffer(offsets, np.int64 if wide else np.int32)[
        chunk.offset : chunk.offset + len(chunk) + 1
    ]
    return memoryview(data or b"")[bounds[0] : bounds[-1]] if len(chunk) else memoryview(b"")
