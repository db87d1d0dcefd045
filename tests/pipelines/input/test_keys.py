"""Duplicate keys against a plain dictionary, in memory and spilled to disk."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.input import values
from glm_batch.pipelines.input.values import HashStore, InputRow, find_duplicates

Files = list[list[str | None]]


def reader(files: Files, piece: int) -> values.KeyReader:
    def read() -> Iterator[tuple[int, int, list[str | None]]]:
        for number, rows in enumerate(files):
            for start in range(0, len(rows), piece):
                yield number, start, rows[start : start + piece]

    return read


@given(
    files=st.lists(st.lists(st.none() | st.sampled_from("abcdefgh"), max_size=12), max_size=4),
    piece=st.integers(1, 5),
)
def test_duplicates_are_those_of_a_dictionary(files: Files, piece: int) -> None:
    first: dict[str, InputRow] = {}
    expected = {}
    for number, rows in enumerate(files):
        for row, key in enumerate(rows):
            if key is not None and first.setdefault(key, (number, row)) != (number, row):
                expected[number, row] = first[key]
    assert find_duplicates(reader(files, piece), "id") == expected


def test_equal_hashes_of_different_keys_are_no_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "hash", lambda text: 7, raising=False)
    assert find_duplicates(reader([["a", "b", "a"]], 2), "id") == {(0, 2): (0, 0)}


@pytest.mark.parametrize("in_memory", [10, 10_000])
def test_hashes_on_disk_give_what_hashes_in_memory_give(in_memory: int) -> None:
    hashes = np.random.default_rng(0).integers(-500, 500, 1000)
    values, counts = np.unique(hashes, return_counts=True)
    with HashStore(in_memory) as store:
        for part in np.array_split(hashes, 40):
            store.add(part)
        assert (store._folder is not None) == (in_memory == 10)
        found = np.concatenate(list(store.repeated()))
    np.testing.assert_array_equal(np.sort(found), values[counts > 1])


def test_a_column_that_is_no_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "MAX_DUPLICATES", 5)
    with pytest.raises(ConfigError, match="more than 5 rows repeat the 'colour'"):
        find_duplicates(reader([["red"] * 8], 3), "colour")
