"""Reading of input files: how many rows there are, and the rows of one unit as an Arrow table.

Owns Parquet and JSONL on local disks and s3://, and everything that can be wrong with a file as a
whole. Which files there are says pipelines.input.listing; what a row's values are,
pipelines.input.values.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from glm_batch.models.errors import ConfigError, RowError
from glm_batch.pipelines.input.listing import InputFile, is_remote, list_files
from glm_batch.pipelines.input.values import (
    LINE,
    NUMBER,
    Row,
    column_values,
    decode_rows,
    is_text,
    line_key,
    numbered_lines,
    parse_line,
    split_lines,
    usable_key,
)
from glm_batch.pipelines.job import StorageSection
from glm_batch.pipelines.storage.s3 import S3, ChangedError
from glm_batch.pipelines.storage.storage import StorageError

SAMPLE_ROWS = 1000
SCAN_BYTES = 4 << 20
FOOTER_THREADS = 8


class DamagedError(ConfigError):
    """Rows lie in a part of a file that cannot be decoded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRange:
    """Rows [start, stop) of one file; for JSONL also the bytes [start_byte, stop_byte) they lie in,
    and the number of the line (from 1, empty ones counted) with which they begin.
    """

    start: int
    stop: int
    start_byte: int = 0
    stop_byte: int = 0
    start_line: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """The types of the columns that are read, and the rows of each Parquet file."""

    files: Sequence[InputFile]
    schema: pa.Schema
    num_rows: Mapping[InputFile, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """How to open files, and which columns to read; a description that travels to workers."""

    storage: StorageSection
    columns: tuple[str, ...]

    def list_files(self, patterns: Sequence[str], *, may_be_gone: bool = False) -> list[InputFile]:
        """See pipelines.input.listing."""
        return list_files(patterns, self.storage, may_be_gone=may_be_gone)

    def open(self, file: InputFile) -> Any:
        """A seekable binary file for Arrow and for Python alike."""
        if is_remote(file.path):
            return self._s3.open(file.path, file.size, file.stamp)
        return pa.OSFile(file.path)

    def survey(self, files: Sequence[InputFile]) -> Survey:
        """Reads the footer of every Parquet file, and a sample of the first JSONL file's rows.

        Raises ConfigError for a column that is missing, has types that do not go together, or is
        not plain Arrow.
        """
        parquet = [file for file in files if file.format == "parquet"]
        with ThreadPoolExecutor(FOOTER_THREADS) as pool:
            looks = list(pool.map(self._look, parquet))
        schemas, looked_at = [schema for schema, _ in looks], list(parquet)
        jsonl = next((file for file in files if file.format == "jsonl"), None)
        if jsonl is not None:
            schemas.append(self._sampled_schema(jsonl))
            looked_at.append(jsonl)
        num_rows = {file: rows for file, (_, rows) in zip(parquet, looks, strict=True)}
        return Survey(files=files, schema=_unified(schemas, looked_at), num_rows=num_rows)

    def line_blocks(self, file: InputFile) -> Iterator[tuple[int, bytes]]:
        """A JSONL file as (offset, bytes) of whole lines, SCAN_BYTES or one line at a time."""
        offset, pending = 0, list[bytes]()
        with self.open(file) as stream:
            while chunk := stream.read(SCAN_BYTES):
                head, newline, tail = chunk.rpartition(b"\n")
                if newline:
                    block = b"".join([*pending, head, newline])
                    yield offset, block
                    offset, pending = offset + len(block), []
                pending.append(tail)
        if rest := b"".join(pending):
            yield offset, rest

    def key_chunks(self, file: InputFile, key: str) -> Iterator[list[str | None]]:
        """The keys of all rows in order, piece by piece; None for a row that has no usable one."""
        if file.format == "parquet":
            with self._parquet(file) as parquet:
                for batch in parquet.iter_batches(batch_size=65536, columns=[key]):
                    yield [usable_key(value) for value in column_values(batch.column(0))]
            return
        for _, block in self.line_blocks(file):
            yield [line_key(line, key) for line in split_lines(block)]

    def read(self, file: InputFile, rows: RowRange) -> pa.Table:
        """The wanted columns of Parquet rows, or raw lines of JSONL as LINE and NUMBER.

        Raises ConfigError when the file is no longer what it was when the job was planned,
        DamagedError when Parquet cannot decode these rows, and StorageError when the store fails.
        """
        try:
            if file.format == "parquet":
                return _cursor(self, file).read(rows)
            data = self._bytes(file, rows.start_byte, rows.stop_byte)
        except ChangedError as error:
            raise ConfigError(_changed(file, str(error))) from error
        except (pa.ArrowException, OSError) as error:
            _cursor.cache_clear()  # it stands somewhere in the middle
            if not _is_damage(error):
                raise StorageError(
                    f"input: {file.name} cannot be read ({error}); mend that and run the same "
                    "command again"
                ) from error
            raise DamagedError(
                f"input: {file.name} is damaged at rows {rows.start} to {rows.stop - 1}: {error}"
            ) from error
        return _complete(_lines_table(numbered_lines(data, rows.start_line)), file, rows)

    def read_rows(self, file: InputFile, rows: RowRange) -> list[Row | RowError]:
        """What `read` gives, decoded; an error for each row of a damaged row group."""
        try:
            return decode_rows(self.read(file, rows))
        except DamagedError as error:
            groups = self.by_row_group(file, rows)
            if len(groups) == 1:
                return [RowError("unreadable_input", str(error))] * (rows.stop - rows.start)
            return [row for group in groups for row in self.read_rows(file, group)]

    def by_row_group(self, file: InputFile, rows: RowRange) -> list[RowRange]:
        """The row range of a Parquet file, cut where its row groups meet."""
        metadata = self._footer(file)
        ends = np.cumsum([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])
        cuts = [rows.start, *(int(end) for end in ends if rows.start < end < rows.stop), rows.stop]
        return [RowRange(start=start, stop=stop) for start, stop in pairwise(cuts)]

    def blank(self, file: InputFile, num_rows: int) -> pa.Table:
        """As many rows as `read` would give, with nothing in them."""
        if file.format == "jsonl":
            return _lines_table([(None, b"")] * num_rows)
        return pa.table(
            {
                field.name: pa.nulls(num_rows, field.type)
                for field in self._read_schema(self._footer(file))
            }
        )

    def _read_schema(self, footer: pq.FileMetaData) -> pa.Schema:
        """The schema of what is read; a column at least, which tells how many rows there are."""
        schema = footer.schema.to_arrow_schema()
        return pa.schema([schema.field(column) for column in self.columns or schema.names[:1]])

    def _bytes(self, file: InputFile, start: int, stop: int) -> bytes:
        if is_remote(file.path):
            return self._s3.read(file.path, start, stop, file.stamp)
        with open(file.path, "rb") as stream:
            stream.seek(start)
            return stream.read(stop - start)

    @property
    def _s3(self) -> S3:
        return S3(self.storage)

    def _footer(self, file: InputFile, stream: Any = None) -> pq.FileMetaData:
        """A Parquet file's footer, after a look at it: Arrow revives extension types as soon as it
        sees them. The file is opened unless it is given.
        """
        with _readable(file):
            footer = pq.read_metadata(self.open(file) if stream is None else stream)
        _refuse_extensions(file, footer.metadata or {})
        return footer

    def _parquet(self, file: InputFile) -> pq.ParquetFile:
        with _readable(file):
            stream = self.open(file)
        footer = self._footer(file, stream)
        with _readable(file):
            # Without pre-buffering, and in pages: a row group of a million rows must not be held as
            # a whole.
            return pq.ParquetFile(stream, metadata=footer, pre_buffer=False, buffer_size=1 << 20)

    def _look(self, file: InputFile) -> tuple[pa.Schema, int]:
        """A Parquet file's columns that are read, and how many rows it has."""
        footer = self._footer(file)
        schema = _arrow_schema(file, footer)
        for column in self.columns:
            if column not in schema.names:
                raise ConfigError(_missing_column(column, file, schema.names))
            _refuse_exotic(schema.field(column).type, file, column)
        fields = [pa.field(column, schema.field(column).type) for column in self.columns]
        return pa.schema(fields), int(footer.num_rows)

    def whole_schema(self, file: InputFile) -> pa.Schema:
        """All columns of a Parquet file."""
        return _arrow_schema(file, self._footer(file))

    def _sampled_schema(self, file: InputFile) -> pa.Schema:
        """Types by what most of the first rows hold that are JSON objects."""
        lines = chain.from_iterable(split_lines(block) for _, block in self.line_blocks(file))
        sample = [row for _, row in zip(range(SAMPLE_ROWS), map(parse_line, lines), strict=False)]
        rows = [row for row in sample if not isinstance(row, RowError)]
        known = list(dict.fromkeys(chain.from_iterable(rows)))
        for column in self.columns:
            if rows and column not in known:
                raise ConfigError(_missing_column(column, file, known))
        return pa.schema(
            [(column, _sampled_type([row.get(column) for row in rows])) for column in self.columns]
        )


def _arrow_schema(file: InputFile, footer: pq.FileMetaData) -> pa.Schema:
    with _readable(file):
        return footer.schema.to_arrow_schema()


class _ParquetCursor:
    """Reads consecutive row ranges of one file without decoding anything twice.

    Units are smaller than row groups. A worker that takes them in order continues where it stopped.
    """

    def __init__(self, source: Source, file: InputFile) -> None:
        self._source, self._file = source, file
        self._next = 0
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._rest: list[pa.RecordBatch] = []
        self._schema = pa.schema([])
        self._parquet: pq.ParquetFile | None = None

    def read(self, rows: RowRange) -> pa.Table:
        if self._parquet is None or rows.start < self._next:
            self._seek(rows.start, rows.stop - rows.start)
        self._skip(rows.start - self._next)
        taken = list(self._take(rows.stop - rows.start))
        table = pa.Table.from_batches(taken, self._schema)
        return _complete(table, self._file, rows)

    def _seek(self, row: int, batch_size: int) -> None:
        self._parquet = self._source._parquet(self._file)
        groups = [
            self._parquet.metadata.row_group(i).num_rows
            for i in range(self._parquet.num_row_groups)
        ]
        starts = np.cumsum([0, *groups])
        first = int(np.searchsorted(starts, row, side="right")) - 1
        self._schema = self._source._read_schema(self._parquet.metadata)
        columns = self._schema.names
        # Group by group, so that no batch reaches into a group that may be damaged.
        self._batches = (
            batch.select(columns)
            for group in range(first, len(groups))
            for batch in self._parquet.iter_batches(batch_size, row_groups=[group], columns=columns)
        )
        self._rest, self._next = [], int(starts[first])

    def _skip(self, num_rows: int) -> None:
        for _ in self._take(num_rows):
            pass

    def _take(self, num_rows: int) -> Iterator[pa.RecordBatch]:
        while num_rows > 0:
            batch = self._rest.pop() if self._rest else next(self._batches, None)
            if batch is None:
                return
            if batch.num_rows > num_rows:
                self._rest.append(batch.slice(num_rows))
                batch = batch.slice(0, num_rows)
            num_rows -= batch.num_rows
            self._next += batch.num_rows
            yield batch


@lru_cache(maxsize=2)
def _cursor(source: Source, file: InputFile) -> _ParquetCursor:
    return _ParquetCursor(source, file)


@contextmanager
def _readable(file: InputFile) -> Iterator[None]:
    """Says of a Parquet file that cannot be read which one it is."""
    try:
        yield
    except ChangedError as error:
        raise ConfigError(_changed(file, str(error))) from error
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(
            f"input: {file.name} cannot be read as Parquet; is it truncated? ({error}); replace or "
            "leave out the file"
        ) from error


def _is_damage(error: Exception) -> bool:
    """Whether Arrow could not decode it: it raises a bare OSError then, as no system does."""
    return not isinstance(error, OSError) or (
        type(error) is OSError and error.errno is None and not error.__cause__
    )


def _changed(file: InputFile, how: str) -> str:
    return (
        f"input: {file.name} has changed since the job was planned: {how}; restore it, or start "
        "over with another output"
    )


def _lines_table(lines: Sequence[tuple[int | None, bytes]]) -> pa.Table:
    numbers, texts = [number for number, _ in lines], [line for _, line in lines]
    return pa.table({LINE: pa.array(texts, pa.binary()), NUMBER: pa.array(numbers, pa.int64())})


def _complete(table: pa.Table, file: InputFile, rows: RowRange) -> pa.Table:
    if table.num_rows != rows.stop - rows.start:
        raise ConfigError(
            _changed(file, f"rows {rows.start} to {rows.stop} are {table.num_rows} now")
        )
    return table


def _refuse_extensions(file: InputFile, metadata: dict[bytes, bytes]) -> None:
    import base64

    schema = base64.b64decode(metadata.get(b"ARROW:schema", b""))
    if b"ARROW:extension:name" in schema:
        known = re.findall(rb"(?:ray|arrow|huggingface|pandas|geoarrow)[\w.]*\.[\w.]+", schema)
        kind = f" ({known[0].decode()})" if known else ""
        raise ConfigError(
            f"input: {file.name} has a column of an Arrow extension type{kind}; only plain types "
            "are read: write the column as bytes, text, numbers, lists or structs"
        )


def _refuse_exotic(dtype: pa.DataType, file: InputFile, column: str) -> None:
    types = pa.types
    children = [dtype.field(index).type for index in range(dtype.num_fields)]
    if types.is_dictionary(dtype):
        children = [dtype.value_type]
    for child in children:
        _refuse_exotic(child, file, column)
    nested = types.is_list(dtype) or types.is_large_list(dtype) or types.is_fixed_size_list(dtype)
    nested = nested or types.is_struct(dtype) or types.is_map(dtype) or types.is_dictionary(dtype)
    text = is_text(dtype) or types.is_binary(dtype) or types.is_large_binary(dtype)
    if isinstance(dtype, pa.BaseExtensionType) or not (
        nested or text or types.is_primitive(dtype) or _scalar(dtype)
    ):
        raise ConfigError(
            f"input: {file.name}: column {column!r} has type {dtype}; only plain types are read: "
            "write it as bytes, text, numbers, lists or structs"
        )


def _scalar(dtype: pa.DataType) -> bool:
    return bool(
        pa.types.is_null(dtype)
        or pa.types.is_decimal(dtype)
        or pa.types.is_fixed_size_binary(dtype)
    )


def _unified(schemas: Sequence[pa.Schema], files: Sequence[InputFile]) -> pa.Schema:
    unified = schemas[0]
    for schema, file in zip(schemas, files, strict=True):
        try:
            unified = pa.unify_schemas([unified, schema], promote_options="permissive")
        except pa.ArrowException as error:
            raise ConfigError(
                f"input: the column types of {file.name} do not go with those of {files[0].name}: "
                f"{error}; convert one of them"
            ) from error
    types = [pa.string() if pa.types.is_null(field.type) else field.type for field in unified]
    return pa.schema(list(zip(unified.names, types, strict=True)))


def _sampled_type(values: list[Any]) -> pa.DataType:
    """The type that more than half of the values have; text where there is none."""
    kinds = Counter(_json_kind(value) for value in values if value is not None)
    if not kinds:
        return pa.null()
    kind, count = kinds.most_common(1)[0]
    if 2 * count <= kinds.total():
        return pa.string()
    try:
        return pa.array([value for value in values if _json_kind(value) == kind]).type
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):
        return pa.string()


def _json_kind(value: Any) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return "number" if is_number else type(value).__name__


def _missing_column(column: str, file: InputFile, known: Sequence[str]) -> str:
    near = get_close_matches(column, known, n=1)
    hint = (
        f"; did you mean {near[0]!r}?"
        if near
        else f"; it has {', '.join(map(repr, list(known)[:20]))}"
    )
    return f"input: {file.name} has no column {column!r}{hint}"
