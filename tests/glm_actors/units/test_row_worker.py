"""A row at which preprocessing raises what nobody foresaw costs that row; an error of the whole job
is no row's.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pytest

from glm_batch.glm_actors.units.batches import request_table, to_requests
from glm_batch.glm_actors.units.row_worker import RowWorker
from glm_batch.models.engine.api.request import Classify, Embed, Request
from glm_batch.models.errors import ConfigError, RowError
from glm_batch.models.processing.patches import Media, MediaItem


class Doubling:
    """Makes a request of each number; raises `error` at some."""

    def __init__(self, bad: Iterable[int], error: Exception) -> None:
        self.bad, self.error = set(bad), error

    name = "doubling"

    def num_rows(self, table: pa.Table) -> int:
        return int(table.num_rows)

    def __call__(
        self, table: pa.Table, start: int, stop: int, lost: RowError | None = None
    ) -> pa.Table:
        numbers = table["n"].to_pylist()[start:stop]
        if not lost and self.bad & set(numbers):
            raise self.error
        works = [Classify() if n % 2 else Embed() for n in numbers]
        requests = [
            lost or Request(id=f"r{n}", input_ids=[n], work=w)
            for n, w in zip(numbers, works, strict=True)
        ]
        return request_table([f"r{n}" for n in numbers], requests)


def prepare(bad: Iterable[int], num_rows: int, error: Exception | None = None) -> pa.Table:
    transform = Doubling(bad, error or ZeroDivisionError("an odd corner"))
    return RowWorker(lambda: [transform])(pa.table({"n": list(range(num_rows))}))


@pytest.mark.parametrize(
    ("bad", "num_rows"), [([], 5), ([2], 5), ([0, 4], 5), ([0, 1, 2], 4), ([0], 1)]
)
def test_a_row_that_raises_fails_alone(bad: list[int], num_rows: int) -> None:
    table = prepare(bad, num_rows)
    assert table["row_key"].to_pylist() == [f"r{n}" for n in range(num_rows)]
    assert table["error_code"].to_pylist() == [
        "internal_error" if n in bad else None for n in range(num_rows)
    ]
    assert all("an odd corner" in table["error_message"][n].as_py() for n in bad)
    good = [n for n in range(num_rows) if n not in bad]
    assert [list(request.input_ids) for request in to_requests(table)] == [[n] for n in good]
    assert [type(request.work) for request in to_requests(table)] == [
        Classify if n % 2 else Embed for n in good
    ]


def test_what_every_row_raises_is_no_row_s_fault() -> None:
    with pytest.raises(ZeroDivisionError, match="an odd corner"):
        prepare(range(5), 5)


def test_our_own_errors_pass() -> None:
    with pytest.raises(ConfigError, match="no such thing"):
        prepare([2], 5, ConfigError("no such thing"))


class Showing(Doubling):
    """The same with an image for each number; a table of errors alone has no columns for images."""

    def __call__(
        self, table: pa.Table, start: int, stop: int, lost: RowError | None = None
    ) -> pa.Table:
        numbers = table["n"].to_pylist()[start:stop]
        if not lost and self.bad & set(numbers):
            raise self.error
        item = MediaItem(
            kind="image", patches=np.zeros((1, 4), np.uint8), grid_thw=(1, 1, 1), digest=b"d"
        )
        media = Media(items=(item,), positions=np.zeros((3, 1), np.int64))
        requests = [
            lost or Request(id=f"r{n}", input_ids=[n], work=Embed(), media=media) for n in numbers
        ]
        return request_table([f"r{n}" for n in numbers], requests)


def test_a_row_that_raises_fails_alone_beside_images() -> None:
    step = Showing([1], ZeroDivisionError("an odd corner"))
    table = RowWorker(lambda: [step])(pa.table({"n": [0, 1, 2]}))
    assert table["error_code"].to_pylist() == [None, "internal_error", None]
    assert [request.media is not None for request in to_requests(table)] == [True, True]
