"""Bundles: a row range of a data set, and the cells whose units over it are still to be done.

A bundle travels through the pipeline as one block, in which each row stands once for each cell.
Owns how units of several plans become bundles, and how a bundle is told on its way. Knows nothing
of Ray or of what is done to rows.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa

from glm_batch.pipelines.graph.steps import Order
from glm_batch.pipelines.input.listing import InputFile
from glm_batch.pipelines.input.source import RowRange
from glm_batch.pipelines.output.journal import Journal
from glm_batch.pipelines.planning.plan import Plan

CELLS, CELL, DATASET = "#cells", "#cell", "#dataset"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """`cells` are pairs of a cell's number in the sweep and its unit's number in that cell's plan."""

    order: Order
    dataset: str
    cells: tuple[tuple[int, int], ...]

    @property
    def number(self) -> int:
        return self.order.unit

    def to_table(self) -> pa.Table:
        table = self.order.to_table().append_column(CELLS, pa.array([json.dumps(self.cells)]))
        return table.append_column(DATASET, pa.array([self.dataset]))


def cells_of(table: pa.Table) -> list[tuple[int, int]]:
    """The cells of the bundle that this table is on its way of."""
    return [(cell, unit) for cell, unit in json.loads(table[CELLS][0].as_py())]


def make_bundles(
    datasets: Sequence[str],
    plans: Sequence[Plan],
    pending: Sequence[Collection[int]],
    cells: Iterable[int],
) -> list[Bundle]:
    """The pending units of these cells; the first three arguments go by a cell's number.

    Equal row ranges of a data set become one bundle. Bundles stand in the order of the input.
    """
    found: dict[tuple[int, int, int, int], _Found] = {}
    for cell in cells:
        plan = plans[cell]
        duplicates = plan.duplicates_by_unit()
        for unit in plan.units():
            if unit.index in pending[cell]:
                place = (datasets.index(datasets[cell]), unit.file, unit.rows.start, unit.rows.stop)
                earlier = duplicates.get((unit.file, unit.rows.start), {})
                at = found.setdefault(
                    place, _Found(plan.files[unit.file].file, unit.rows, earlier, [])
                )
                at.cells.append((cell, unit.index))
    return [
        Bundle(
            order=Order(unit=number, file=at.file, rows=at.rows, earlier=at.earlier),
            dataset=datasets[place[0]],
            cells=tuple(at.cells),
        )
        for number, (place, at) in enumerate(sorted(found.items(), key=lambda item: item[0]))
    ]


class _Found(NamedTuple):
    file: InputFile
    rows: RowRange
    earlier: Mapping[int, str]
    cells: list[tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleJournal:
    """The cells' own journals as one, by the numbers of bundles. Requests are named by
    `request_id`.
    """

    journals: Mapping[int, Journal]
    cells: Mapping[int, tuple[tuple[int, int], ...]]
    every_seconds: float

    def write(self, bundle: int, table: pa.Table) -> None:
        """Each cell's completions go to its own journal, under the rows' own keys."""
        owners = [cell_and_key(each) for each in table["row_key"].to_pylist()]
        for cell, unit in self.cells[bundle]:
            rows = [row for row, (owner, _) in enumerate(owners) if owner == cell]
            if rows:
                self.journals[cell].write(
                    unit, _with_keys(table.take(rows), [owners[row][1] for row in rows])
                )

    def read(self, bundle: int) -> list[pa.Table]:
        return [
            _with_keys(table, [request_id(cell, key) for key in table["row_key"].to_pylist()])
            for cell, unit in self.cells[bundle]
            for table in self.journals[cell].read(unit)
        ]


def request_id(cell: int, key: str) -> str:
    """What the engine calls a row of a cell: keys of different cells are the same."""
    return f"{cell}/{key}"


def cell_and_key(id: str) -> tuple[int, str]:
    cell, _, key = id.partition("/")
    return int(cell), key


def _with_keys(table: pa.Table, keys: Sequence[str]) -> pa.Table:
    return table.set_column(
        table.schema.get_field_index("row_key"), "row_key", pa.array(keys, pa.string())
    )
