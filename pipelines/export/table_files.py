"""Writes a finished output as Parquet, Arrow, CSV or JSON lines, in the order of its input.

The parts are those that the manifest names, so that each row is there once, whatever was retried;
some parts are in memory at a time. The input's columns can be added to them: these are read again,
row range by row range, from files that must be what the job read. A column whose values
no one type holds exactly stands as JSON text. CSV has lists and structs as JSON text and bytes as
base64; JSON has bytes as data: URLs and null for NaN.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from glm_batch.models.errors import ConfigError, RowError
from glm_batch.pipelines.input.listing import InputFile, is_remote
from glm_batch.pipelines.input.source import DamagedError, RowRange, Source
from glm_batch.pipelines.input.values import column_values, parse_line, same_json, split_lines
from glm_batch.pipelines.job import Job, StorageSection
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.parts import PART_NAME
from glm_batch.pipelines.planning.plan import Plan
from glm_batch.pipelines.report.input_rows import InputRows
from glm_batch.pipelines.report.review import json_text, to_jsonl
from glm_batch.pipelines.storage.s3 import S3
from glm_batch.pipelines.storage.storage import StorageError, open_store

GROUP_ROWS, GROUP_BYTES = 100_000, 64 << 20  # of what is written at once: a Parquet row group
INFERRED_ROWS = 10_000  # of JSONL, whose types are found at once
WHOLE = pa.decimal128(16, 0)  # stands for whole JSON numbers that a float64 holds exactly
SMALL = (pa.int8(), pa.int16(), pa.int32(), pa.uint8(), pa.uint16(), pa.uint32())


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where files go: one file, or with `file_rows` a new directory of files with so many rows."""

    path: str
    form: str
    file_rows: int | None = None
    endpoint_url: str | None = None


@dataclass(slots=True)
class Made:
    """What was written; `without_input` rows are of files that are no longer part of the input."""

    rows: int = 0
    files: int = 0
    without_input: int = 0


def write_tables(output: Output, job: Job | None, target: Target) -> Made:
    """With the columns of the input where a job is given. Raises ConfigError for an output that is
    not finished, input that is not what it was, or a place that cannot be written.
    """
    plan, manifest, made = output.standing_plan(), output.manifest(), Made()
    _refuse_place(output, target)
    schema, added = manifest.schema, None
    if job is not None:
        added = InputColumns(job, plan, schema)
        schema = pa.schema([*schema, *added.fields.values()])

    def tables() -> Iterator[pa.Table]:
        for part in manifest.parts:
            rows = output.read_part(part)
            if added is not None:
                match = PART_NAME.search(part.name)
                assert match is not None
                rows = added.added_to(rows, int(match["unit"]), made)
            yield rows

    with ExitStack() as stack:
        writer = stack.enter_context(_writer(target, 0, schema))
        made.files = 1
        for table in _regrouped(tables(), target.file_rows):
            if target.file_rows and made.rows == made.files * target.file_rows:
                stack.close()
                writer = stack.enter_context(_writer(target, made.files, schema))
                made.files += 1
            writer(table)
            made.rows += table.num_rows
    return made


def _refuse_place(output: Output, target: Target) -> None:
    if f"{target.path}/".startswith(f"{output.place}/"):
        raise ConfigError(f"--to: {target.path} lies in the output; name a place outside of it")
    if target.file_rows is not None:
        place = open_store(target.path, StorageSection(endpoint_url=target.endpoint_url))
        if any(place.pages()):
            raise ConfigError(f"--to: {target.path} is not empty; name a new directory")


class InputColumns:
    """Adds the input's columns to parts. One that has an output column's name becomes `input.NAME`;
    carried ones are there already.
    """

    def __init__(self, job: Job, plan: Plan, schema: pa.Schema) -> None:
        rows = InputRows(job, plan)
        self._plan, self._storage, self._units = plan, job.storage, plan.units()
        self._num_files = len(plan.files) - plan.num_deleted
        if not all(map(rows.is_readable, range(self._num_files))):
            problem = next(iter(rows.problems.values()))
            raise ConfigError(
                f"--with-input: {problem}; restore it, or export without the input's columns"
            )
        types = input_types(self._source(), plan)
        self._types = {name: types[name] for name in types if name not in job.carry}
        taken = schema.names
        self.fields = {
            name: pa.field(f"input.{name}" if name in taken else name, dtype or pa.string())
            for name, dtype in self._types.items()
        }

    def added_to(self, rows: pa.Table, unit: int, made: Made) -> pa.Table:
        """A unit's rows with the input's columns; units come in their order."""
        place = next(each for each in self._units if each.index == unit)
        columns: dict[str, Any] = {}
        if place.file < self._num_files:
            columns = self._columns(self._plan.files[place.file].file, place.rows)
        else:
            made.without_input += rows.num_rows
        for name, field in self.fields.items():
            column = columns.get(name)
            rows = rows.append_column(
                field, pa.nulls(rows.num_rows, field.type) if column is None else column
            )
        return rows

    def _source(self, *columns: str) -> Source:
        return Source(storage=self._storage, columns=columns)

    def _columns(self, file: InputFile, rows: RowRange) -> dict[str, pa.Array | pa.ChunkedArray]:
        if file.format == "jsonl":
            found = self._source().read_rows(file, rows)
            good = [{} if isinstance(row, RowError) else row for row in found]
            return {
                name: _json_text(values) if dtype is None else pa.array(values, dtype)
                for name, dtype in self._types.items()
                for values in [[row.get(name) for row in good]]
            }
        names = self._source().whole_schema(file).names
        source = self._source(*(name for name in self._types if name in names))
        table = _without_damage(source, file, rows)
        return {
            name: _json_text(column_values(table[name]))
            if dtype is None
            else table[name].cast(dtype)
            for name, dtype in self._types.items()
            if name in source.columns
        }


def input_types(source: Source, plan: Plan) -> dict[str, pa.DataType | None]:
    """The types of all columns of the input, in the order in which they come up; of JSONL files by
    all of their rows. None where only JSON text can hold every value.
    """
    found: dict[str, set[pa.DataType | None]] = {}
    for planned in plan.files[: len(plan.files) - plan.num_deleted]:
        if planned.file.format == "parquet":
            schema = source.whole_schema(planned.file)
            looks = [{field.name: _stored(field.type) for field in schema}]
        else:
            looks = list(_jsonl_types(source, planned.file))
        for name, dtype in chain.from_iterable(look.items() for look in looks):
            found.setdefault(name, set()).add(dtype)
    return {name: _one_type(types - {pa.null()}) for name, types in found.items()}


def _stored(dtype: pa.DataType) -> pa.DataType:
    """Without what only says how values lie in memory."""
    return dtype.value_type if pa.types.is_dictionary(dtype) else dtype


def _jsonl_types(source: Source, file: InputFile) -> Iterator[dict[str, pa.DataType | None]]:
    lines = chain.from_iterable(split_lines(block) for _, block in source.line_blocks(file))
    rows = (row for row in map(parse_line, lines) if not isinstance(row, RowError))
    while some := list(islice(rows, INFERRED_ROWS)):
        names = dict.fromkeys(chain.from_iterable(some))
        yield {name: _inferred_type([row.get(name) for row in some]) for name in names}


def _inferred_type(values: list[Any]) -> pa.DataType | None:
    try:
        array = pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return None
    if not same_json(array.to_pylist(), values):
        return None
    if pa.types.is_integer(array.type):
        return (
            WHOLE if all(value is None or abs(value) <= 2**53 for value in values) else pa.int64()
        )
    return array.type


def _one_type(types: set[pa.DataType | None]) -> pa.DataType | None:
    """What holds values of all of these types exactly."""
    if not types:
        return pa.null()
    if len(types) == 1 and WHOLE not in types:
        return next(iter(types))
    if types <= {WHOLE, *SMALL, pa.int64()}:
        return pa.int64()
    return pa.float64() if types <= {WHOLE, *SMALL, pa.float32(), pa.float64()} else None


def _json_text(values: list[Any]) -> pa.Array:
    texts = [None if value is None else json_text(value) for value in values]
    return pa.array(texts, pa.string())


def _without_damage(source: Source, file: InputFile, rows: RowRange) -> pa.Table:
    """Nothing stands for the rows of a damaged row group: they were committed as errors."""
    try:
        return source.read(file, rows)
    except DamagedError:
        groups = source.by_row_group(file, rows)
        if len(groups) == 1:
            return source.blank(file, rows.stop - rows.start)
        return pa.concat_tables([_without_damage(source, file, group) for group in groups])


def _regrouped(tables: Iterable[pa.Table], file_rows: int | None) -> Iterator[pa.Table]:
    """The same rows in larger tables, none of which goes beyond a file's last row."""
    waiting: list[pa.Table] = []
    left = file_rows
    for table in tables:
        while table.num_rows:
            some = table if left is None else table.slice(0, left - sum(map(len, waiting)))
            table = table.slice(some.num_rows)
            waiting.append(some)
            rows = sum(map(len, waiting))
            is_full = rows == left
            if is_full or rows >= GROUP_ROWS or sum(t.nbytes for t in waiting) >= GROUP_BYTES:
                yield pa.concat_tables(waiting)
                waiting = []
                left = None if left is None else file_rows if is_full else left - rows
    if waiting:
        yield pa.concat_tables(waiting)


Writer = Callable[[pa.Table], None]


@contextmanager
def _writer(target: Target, number: int, schema: pa.Schema) -> Iterator[Writer]:
    """Takes tables for one file, which appears as a whole at the end."""
    name = f"{target.path}/part-{number:05}.{target.form}" if target.file_rows else target.path
    try:
        with (
            _new_file(name, target.endpoint_url) as stream,
            FORMATS[target.form](stream, schema) as write,
        ):
            yield write
    except OSError as error:
        raise StorageError(
            f"{name} cannot be written ({error}); nothing of it stands there"
        ) from error


@contextmanager
def _new_file(path: str, endpoint_url: str | None) -> Iterator[io.RawIOBase]:
    if is_remote(path):
        with S3(StorageSection(endpoint_url=endpoint_url)).replacing(path) as upload:
            yield _Stream(upload.write)
        return
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    hidden = os.path.join(folder, f".{name}.{os.getpid()}")
    try:
        with open(hidden, "wb") as stream:
            yield _Stream(stream.write)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(hidden, path)
    finally:
        if os.path.exists(hidden):
            os.unlink(hidden)


class _Stream(io.RawIOBase):
    """A file that is only written to, for Arrow."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write, self._position = write, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._write(bytes(data))
        self._position += len(data)
        return len(data)

    def tell(self) -> int:
        return self._position


@contextmanager
def _parquet(stream: io.RawIOBase, schema: pa.Schema) -> Iterator[Writer]:
    with pq.ParquetWriter(stream, schema, compression="zstd") as writer:
        yield writer.write_table


@contextmanager
def _arrow(stream: io.RawIOBase, schema: pa.Schema) -> Iterator[Writer]:
    with pa.ipc.new_file(stream, schema) as writer:
        yield writer.write_table


@contextmanager
def _csv(stream: io.RawIOBase, schema: pa.Schema) -> Iterator[Writer]:
    """Lists and structs are JSON text, bytes base64."""
    texts = {field.name for field in schema if pa.types.is_nested(field.type)}
    binary = {
        field.name
        for field in schema
        if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)
    }
    held = pa.schema(
        [
            (field.name, pa.string() if field.name in texts | binary else _stored(field.type))
            for field in schema
        ]
    )

    def write(table: pa.Table) -> None:
        columns = []
        for name, column in zip(table.column_names, table.columns, strict=True):
            if name in texts:
                columns.append(_json_text(column_values(column)))
            elif name in binary:
                columns.append(
                    pa.array([_base64(value) for value in column.to_pylist()], pa.string())
                )
            else:
                columns.append(column.cast(held.field(name).type))
        writer.write_table(pa.table(columns, held))

    with pyarrow.csv.CSVWriter(stream, held) as writer:
        yield write


def _base64(value: bytes | None) -> str | None:
    return None if value is None else base64.b64encode(value).decode()


@contextmanager
def _jsonl(stream: io.RawIOBase, schema: pa.Schema) -> Iterator[Writer]:
    def write(table: pa.Table) -> None:
        stream.write(to_jsonl(table))

    yield write


FORMATS = {"parquet": _parquet, "arrow": _arrow, "csv": _csv, "jsonl": _jsonl}
