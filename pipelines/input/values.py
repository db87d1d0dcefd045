"""What was read, as Python rows: lines of JSONL, cells of Arrow columns, keys, none of them twice.

A row that is wrong by itself becomes a RowError here.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from glm_batch.models.errors import ConfigError, RowError
from glm_batch.pipelines.input.listing import InputFile

Row = dict[str, Any]

# The columns of a unit's table that comes from JSONL: each row's own bytes, and where in the file
# they stand (from 1).
LINE, NUMBER = "line", "line_number"


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for what Python cannot hold: a year after 9999, lists of text that is not UTF-8."""


def split_lines(data: bytes) -> list[bytes]:
    """The lines that are rows: empty lines are not."""
    return [line for line in data.split(b"\n") if line and line != b"\r"]


def numbered_lines(data: bytes, first: int) -> list[tuple[int, bytes]]:
    """The lines that are rows with their numbers; `first` is the first line's."""
    return [
        (number, line)
        for number, line in enumerate(data.split(b"\n"), first)
        if line and line != b"\r"
    ]


def parse_line(line: bytes) -> Row | RowError:
    """One line of JSONL as a row."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return RowError("not_utf8", f"the line is not UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return RowError("bad_json", f"the line is not JSON: {error}")
    if not isinstance(row, dict):
        return RowError(
            "bad_json", f"the line is JSON but no object: it holds {type(row).__name__}"
        )
    return row


def json_or_text(value: Any) -> Any:
    """What a cell stands for as JSON: a text is read as JSON where it is JSON."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def same_json(left: Any, right: Any) -> bool:
    """Whether two JSON values are equal: 12 is 12.0 wherever it stands, true is not 1."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(
            same_json(value, right[name]) for name, value in left.items()
        )
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(same_json, left, right))
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


def decode_rows(table: pa.Table) -> list[Row | RowError]:
    """The rows of a unit's table, in order. Bytes that are no UTF-8 stay bytes in their column."""
    if LINE in table.column_names and NUMBER in table.column_names:
        return [parse_line(line) for line in table[LINE].to_pylist()]
    columns = [column_values(table[name]) for name in table.column_names]
    names = table.column_names
    if not columns:
        return [{} for _ in range(table.num_rows)]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def column_values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Python values: bytes for text that is not UTF-8, Unreadable for what Python cannot hold."""
    try:
        values: list[Any] = column.to_pylist()
        return values
    except (ValueError, OverflowError):
        if not is_text(column.type):
            return [_scalar_value(value) for value in column]
        raw = column.cast(
            pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
        )
        return [_text_or_bytes(value) for value in raw.to_pylist()]


def row_key(file: InputFile, row: int) -> str:
    """The key of a row that has no other: input file and row number from 0."""
    return f"{file.name}:{row}"


def key_text(row: Row, key: str) -> str:
    """A row's key as text. Raises RowError when it is null or cannot be one."""
    value = row.get(key)
    if value is None:
        raise RowError("null_key", f"the key column {key!r} is null")
    if isinstance(value, bytes):
        raise RowError("not_utf8", f"the key column {key!r} is not UTF-8")
    text = usable_key(value)
    if text is None:
        raise RowError(
            "wrong_type",
            f"the key column {key!r} holds {type(value).__name__}; keys are text or integers",
        )
    return text


def usable_key(value: Any) -> str | None:
    """A value as a key; None where it cannot be one."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    text = str(value)
    return text if text.isascii() or _is_unicode(text) else None


def line_key(line: bytes, key: str) -> str | None:
    """The key of a line of JSONL; None where it has no usable one."""
    row = parse_line(line)
    return None if isinstance(row, RowError) else usable_key(row.get(key))


def is_text(dtype: pa.DataType) -> bool:
    return bool(pa.types.is_string(dtype) or pa.types.is_large_string(dtype))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text_or_bytes(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def _scalar_value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError):
        return Unreadable()


HASHES_IN_MEMORY = 4_000_000  # 32 MB; beyond it they go to disk, 8 bytes each
NUM_BUCKETS = 64
MAX_DUPLICATES = 100_000

InputRow = tuple[int, int]
"""(index of the file, row in it)"""
KeyReader = Callable[[], Iterable[tuple[int, int, list[str | None]]]]
"""Gives (file, first row, keys) for consecutive pieces of the input; it is called twice."""


def find_duplicates(read_keys: KeyReader, key: str) -> dict[InputRow, InputRow]:
    """Each row whose key an earlier row has, mapped to the first row with that key.

    Raises ConfigError beyond MAX_DUPLICATES of them: then the column is no key.
    """
    with HashStore() as store:
        for _, _, keys in read_keys():
            # Python's own string hash: 64 bits, and the same for equal keys within this process.
            store.add(np.fromiter((hash(text) for text in keys if text is not None), np.int64))
        repeated: set[int] = set()
        for hashes in store.repeated():
            repeated.update(hashes.tolist())
            _refuse_no_key(len(repeated), key)
    return _compare(read_keys, repeated, key) if repeated else {}


def _compare(read_keys: KeyReader, repeated: set[int], key: str) -> dict[InputRow, InputRow]:
    first: dict[str, InputRow] = {}
    duplicates: dict[InputRow, InputRow] = {}
    for file, start, keys in read_keys():
        for row, text in enumerate(keys, start):
            if text is None or hash(text) not in repeated:
                continue
            place = first.setdefault(text, (file, row))
            if place != (file, row):
                duplicates[file, row] = place
        _refuse_no_key(len(duplicates), key)
    return duplicates


def _refuse_no_key(num_duplicates: int, key: str) -> None:
    if num_duplicates > MAX_DUPLICATES:
        raise ConfigError(
            f"key: more than {MAX_DUPLICATES:,} rows repeat the {key!r} of another row; name a "
            "column with unique values, or leave key out to number the rows"
        )


class HashStore:
    """Finds repeated 64-bit hashes. A context manager: it may own temporary files."""

    def __init__(self, in_memory: int = HASHES_IN_MEMORY) -> None:
        self._in_memory = in_memory
        self._arrays: list[NDArray[np.int64]] = []
        self._count = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> HashStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def add(self, hashes: NDArray[np.int64]) -> None:
        self._arrays.append(hashes)
        self._count += len(hashes)
        if self._count > self._in_memory:
            self._spill()

    def repeated(self) -> Iterator[NDArray[np.int64]]:
        """Every hash that was added more than once, once each, in pieces."""
        if self._folder is not None:
            self._spill()
        return map(_repeated, self._buckets())

    def _buckets(self) -> Iterator[NDArray[np.int64]]:
        if self._folder is None:
            yield np.concatenate(self._arrays) if self._arrays else np.empty(0, np.int64)
            return
        for path in sorted(Path(self._folder.name).iterdir()):
            yield np.fromfile(path, np.int64)

    def _spill(self) -> None:
        """Appends what is in memory to one file for each remainder of the hashes."""
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="glm-batch-keys-")
        hashes = np.sort(np.concatenate(self._arrays)) if self._arrays else np.empty(0, np.int64)
        bucket_of = hashes % NUM_BUCKETS
        for bucket in range(NUM_BUCKETS):
            with open(Path(self._folder.name) / f"{bucket:03d}", "ab") as stream:
                hashes[bucket_of == bucket].tofile(stream)
        self._arrays, self._count = [], 0


def _repeated(hashes: NDArray[np.int64]) -> NDArray[np.int64]:
    ordered = np.sort(hashes)
    return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
