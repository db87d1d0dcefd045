"""Duplicate row keys, found before any row is processed, in bounded memory.

Each file's key column is read once, a 64-bit hash of every key is kept (in memory, then in
temporary files), and the few keys whose hash repeats are compared in a second reading. Exact over
the whole input, whatever the units are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from glm_batch.models.errors import ConfigError

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
