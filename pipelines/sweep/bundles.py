"""Bundles: a row range of a data set with the cells that still need it; the steps done to one.

A bundle travels through the pipeline as one block: its rows are read once, rendered for each cell,
and committed by cell. Rows stand in the order of the input, and those of the cells beside each
other, so that equal prompts and media meet in the engine. The steps are those of
pipelines.graph.steps for one job, and made of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from glm_batch.glm_actors.faults.spent import IN_ENGINE, spent_on, with_spent
from glm_batch.glm_actors.units.batches import request_table
from glm_batch.models.engine.api.request import Request
from glm_batch.models.errors import EngineError, RowError
from glm_batch.models.processing.prompt import Prompt
from glm_batch.pipelines.graph.steps import Commit, Order, Read, orders
from glm_batch.pipelines.input.source import Source
from glm_batch.pipelines.input.values import Row
from glm_batch.pipelines.metrics.counts import COMMITTING, PARSING, PREPARING, READING
from glm_batch.pipelines.output.journal import Journal
from glm_batch.pipelines.planning.plan import Plan, UnitSizes
from glm_batch.pipelines.tasks.affinity import with_prefix_key
from glm_batch.pipelines.tasks.row_prompts import RowPrompts
from glm_batch.pipelines.tasks.rows import (
    UNIT,
    Rendered,
    TaskSpec,
    num_rows,
    parse_unit,
    render_rows,
    rows_of,
    runner_of,
)

CELLS, CELL, DATASET, PARSED = "#cells", "#cell", "#dataset", "#parsed"
CELLS_TYPE = pa.list_(pa.struct({"cell": pa.int32(), "unit": pa.int32()}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """`cells` are (a cell's number in the sweep, its unit's number in that cell's plan)."""

    order: Order
    dataset: str
    cells: tuple[tuple[int, int], ...]

    @property
    def number(self) -> int:
        return self.order.unit

    def to_table(self) -> pa.Table:
        cells = [{"cell": cell, "unit": unit} for cell, unit in self.cells]
        table = self.order.to_table().append_column(CELLS, pa.array([cells], CELLS_TYPE))
        return table.append_column(DATASET, pa.array([self.dataset]))


def cells_of(table: pa.Table) -> list[tuple[int, int]]:
    """The cells of the bundle that this table is on its way of."""
    return [(each["cell"], each["unit"]) for each in table[CELLS][0].as_py()]


def make_bundles(
    datasets: Sequence[str],
    plans: Sequence[Plan],
    pending: Sequence[Collection[int]],
    cells: Iterable[int],
) -> list[Bundle]:
    """The pending units of these cells; the first three arguments go by a cell's number.

    Equal row ranges of a data set become one bundle. Bundles stand in the order of the input.
    """
    found: dict[tuple[int, int, int, int], Bundle] = {}
    for cell in cells:
        dataset, plan = datasets[cell], plans[cell]
        units = [unit for unit in plan.units() if unit.index in pending[cell]]
        for unit, order in zip(units, orders(plan, units), strict=True):
            place = (datasets.index(dataset), unit.file, unit.rows.start, unit.rows.stop)
            at = found.setdefault(place, Bundle(order=order, dataset=dataset, cells=()))
            found[place] = replace(at, cells=(*at.cells, (cell, unit.index)))
    return [
        replace(each, order=replace(each.order, unit=number))
        for number, (_, each) in enumerate(sorted(found.items(), key=lambda item: item[0]))
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleJournal:
    """The cells' journals as one, by numbers of bundles; requests are named by `request_id`."""

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
    return _with(table, "row_key", pa.array(keys, pa.string()))


@dataclass(frozen=True, slots=True)
class ReadBundle:
    """A bundle's order -> its rows, each once. `sources` go by data set."""

    sources: Mapping[str, Source]
    name: str = READING

    def num_rows(self, table: pa.Table) -> int:
        rows = Order.from_table(table).rows
        return rows.stop - rows.start

    def __call__(
        self, table: pa.Table, start: int, stop: int, lost: RowError | None = None
    ) -> pa.Table:
        rows = Read(self.sources[table[DATASET][0].as_py()])(table, start, stop, lost)
        return rows.append_column(CELLS, _repeated(table, CELLS, rows.num_rows))


@dataclass(frozen=True, slots=True)
class RenderBundle:
    """A bundle's rows -> requests, one for each row and cell; `specs` go by a cell's number.

    What is counted as a row here is a pair of a row and a cell.
    """

    specs: Sequence[TaskSpec]
    name: str = PREPARING

    def num_rows(self, table: pa.Table) -> int:
        return table.num_rows * len(cells_of(table)) if table.num_rows else 0

    def __call__(
        self, table: pa.Table, start: int, stop: int, lost: RowError | None = None
    ) -> pa.Table:
        cells = [cell for cell, _ in cells_of(table)]
        prompts: dict[object, Sequence[Prompt | RowError]] = {}
        owners: list[tuple[int, int]] = []  # row and place of each request, cell after cell
        rendered: list[Rendered] = []
        for place, cell in enumerate(cells):
            first, last = (max(-(-(edge - place) // len(cells)), 0) for edge in (start, stop))
            if first < last:
                spec = self.specs[cell]
                find = partial(_prompts, prompts, (first, last), runner_of(spec).prompts)
                found = render_rows(spec, table.slice(first, last - first), lost, find)
                owners += [(first + row, place) for row in found.owners.to_pylist()]
                rendered.append(found)
        order = sorted(range(len(owners)), key=owners.__getitem__)
        ids = [
            request_id(cells[place], key)
            for (_, place), key in zip(owners, _chained(rendered, "ids"), strict=True)
        ]
        named = [
            _named(request, id)
            for request, id in zip(_chained(rendered, "requests"), ids, strict=True)
        ]
        result = request_table([ids[i] for i in order], [named[i] for i in order])
        for name in (UNIT, CELLS):
            result = result.append_column(name, _repeated(table, name, len(order)))
        result = result.append_column(
            CELL, pa.array([cells[owners[i][1]] for i in order], pa.int32())
        )
        beside = pa.concat_tables(
            [each.beside for each in rendered], promote_options="default"
        ).take(order)
        for name in beside.column_names:
            result = result.append_column(name, beside[name])
        return with_prefix_key(result)


@dataclass(frozen=True, slots=True)
class ParseBundle:
    """Completions -> a row for each cell, with its output columns as Arrow bytes in PARSED.

    Cells' columns differ, so that they fit into no table together.
    """

    specs: Sequence[TaskSpec]
    name: str = PARSING

    def num_rows(self, table: pa.Table) -> int:
        return num_rows(table)

    def __call__(
        self, table: pa.Table, start: int, stop: int, lost: RowError | None = None
    ) -> pa.Table:
        pairs = rows_of(table, start, stop)
        present = np.unique(pairs[CELL].to_numpy()).tolist()
        units = dict(cells_of(table))
        parsed = [
            self._cell(cell, units[cell], pairs.filter(pc.equal(pairs[CELL], cell)), lost)
            for cell in present
        ]
        return pa.table(
            {
                UNIT: _repeated(table, UNIT, len(present)),
                CELLS: _repeated(table, CELLS, len(present)),
                CELL: pa.array(present, pa.int32()),
                PARSED: pa.array(parsed, pa.large_binary()),
            }
        )

    def _cell(self, cell: int, unit: int, rows: pa.Table, lost: RowError | None) -> bytes:
        rows = _with(rows, UNIT, pa.array([unit] * rows.num_rows, pa.int32()))
        return _to_bytes(parse_unit(self.specs[cell], rows, lost=lost))


@dataclass(frozen=True, slots=True)
class CommitBundle:
    """Output columns -> a row of `committed_table` for each cell, once its unit is committed."""

    journals: Mapping[int, Journal]
    unit_sizes: Mapping[int, UnitSizes]
    specs: Sequence[TaskSpec]
    name: str = COMMITTING

    def num_rows(self, table: pa.Table) -> int:
        return 1  # the bundle is committed as a whole

    def __call__(
        self, table: pa.Table, start: int, stop: int, lost: RowError | None = None
    ) -> pa.Table:
        if lost:
            raise EngineError(
                f"bundle {table[UNIT][0].as_py()} cannot be committed: {lost.message}"
            )
        records, cells = [], cells_of(table)
        # A cell has its share of what went into the bundle; all of them were in the engine as long
        # as it was.
        share = {
            what: s if what == IN_ENGINE else s / len(cells) for what, s in spent_on(table).items()
        }
        for cell, _ in cells:
            pieces = table.filter(pc.equal(table[CELL], cell))[PARSED]
            rows = pa.concat_tables([_from_bytes(piece.as_buffer()) for piece in pieces])
            commit = Commit(self.journals[cell], self.unit_sizes[cell], self.specs[cell])
            records.append(commit(with_spent(rows, share), 0, 1))
        return pa.concat_tables(records)


def build_renderer(
    specs: Sequence[TaskSpec], cells: Sequence[int], sources: Mapping[str, Source]
) -> list[Any]:
    """The steps of a preprocessing worker; loads tokenizers and starts decoders."""
    for cell in cells:
        runner_of(specs[cell]).start()
    return [ReadBundle(sources), RenderBundle(specs)]


def build_committer(
    specs: Sequence[TaskSpec], cells: Sequence[int], commit: CommitBundle
) -> list[Any]:
    """The steps of a committing worker."""
    for cell in cells:
        runner_of(specs[cell])
    return [ParseBundle(specs), commit]


def _prompts(
    known: dict[object, Sequence[Prompt | RowError]],
    rows: object,
    prompts: RowPrompts,
    good: Sequence[Row],
) -> Sequence[Prompt | RowError]:
    """The prompts of these rows, made once for all cells that ask in the same words."""
    key = (rows, prompts.key)
    if key not in known:
        known[key] = prompts(good)
    return known[key]


def _named(request: Request | RowError, id: str) -> Request | RowError:
    return request if isinstance(request, RowError) else replace(request, id=id)


def _chained(rendered: Sequence[Rendered], name: str) -> list[Any]:
    return [value for each in rendered for value in getattr(each, name)]


def _repeated(table: pa.Table, name: str, num_rows: int) -> pa.ChunkedArray:
    """What a column holds in its first row, as often as there are rows."""
    return table[name].take(pa.array([0] * num_rows, pa.int64()))


def _with(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, column)


def _to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _from_bytes(data: pa.Buffer) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()
