"""What is done to a unit on the workers, as steps over its rows: read, render, parse, commit.

Each is a glm_actors.units.row_worker.Step, so that a row that raises or ends its process costs a
row. Before `Read` a unit is an order: one row that says what to read. Owns how the steps fit
together; the work on rows is pipelines.tasks.rows'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from glm_batch.glm_actors.faults.spent import spent_on
from glm_batch.glm_actors.units.arrow_structs import arrow_type, reader, to_arrow
from glm_batch.glm_actors.units.row_worker import Step
from glm_batch.models.errors import EngineError, RowError
from glm_batch.pipelines.input.listing import InputFile
from glm_batch.pipelines.input.source import DamagedError, RowRange, Source
from glm_batch.pipelines.metrics.counts import COMMITTING, PARSING, PREPARING, READING
from glm_batch.pipelines.output.journal import Journal
from glm_batch.pipelines.output.parts import CommitRecord
from glm_batch.pipelines.planning.plan import Plan, Unit, UnitSizes
from glm_batch.pipelines.tasks.rows import (
    UNIT,
    TaskSpec,
    count_rows,
    lost_table,
    num_rows,
    parse_unit,
    render_unit,
    runner_of,
    unit_table,
)

ORDER, RECORD = "#order", "record"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is to be read of a unit. `earlier`: see pipelines.tasks.rows.unit_table."""

    unit: int
    file: InputFile
    rows: RowRange
    earlier: Mapping[int, str]

    def to_table(self) -> pa.Table:
        order = pa.array([to_arrow(self)], arrow_type(Order))
        return pa.table({UNIT: pa.array([self.unit], pa.int32()), ORDER: order})

    @classmethod
    def from_table(cls, table: pa.Table) -> Order:
        order: Order = reader(Order)(table[ORDER][0].as_py())
        return order


def orders(plan: Plan, units: Sequence[Unit]) -> list[Order]:
    """What says to the workers which rows a unit is."""
    earlier = plan.duplicates_by_unit()
    return [
        Order(
            unit=unit.index,
            file=plan.files[unit.file].file,
            rows=unit.rows,
            earlier=earlier.get((unit.file, unit.rows.start), {}),
        )
        for unit in units
    ]


@dataclass(frozen=True, slots=True)
class Read:
    """An order -> the unit's rows: see pipelines.tasks.rows.unit_table."""

    source: Source
    name: str = READING

    def num_rows(self, table: pa.Table) -> int:
        rows = Order.from_table(table).rows
        return rows.stop - rows.start

    def __call__(
        self, table: pa.Table, start: int, stop: int, lost: RowError | None = None
    ) -> pa.Table:
        order = Order.from_table(table)
        if lost:
            return lost_table(
                self._travelling(order, self.source.blank(order.file, stop - start), start), lost
            )
        if order.file.format == "jsonl":
            lines = self.source.read(order.file, order.rows)  # where each line begins is not known
            return self._travelling(order, lines.slice(start, stop - start), start)
        rows = RowRange(start=order.rows.start + start, stop=order.rows.start + stop)
        try:
            return self._travelling(order, self.source.read(order.file, rows), start)
        except DamagedError as error:
            return self._without_damage(order, rows, error)

    def _without_damage(self, order: Order, rows: RowRange, error: DamagedError) -> pa.Table:
        """What can be read of the rows, row group by row group, and errors for the rest."""
        groups = self.source.by_row_group(order.file, rows)
        if len(groups) > 1:
            table, first = order.to_table(), order.rows.start
            return pa.concat_tables(
                [self(table, group.start - first, group.stop - first) for group in groups]
            )
        blank = self.source.blank(order.file, rows.stop - rows.start)
        return lost_table(
            self._travelling(order, blank, rows.start - order.rows.start),
            RowError("unreadable_input", str(error)),
        )

    def _travelling(self, order: Order, table: pa.Table, start: int) -> pa.Table:
        earlier = {row - start: first for row, first in order.earlier.items()}
        return unit_table(table, order.unit, order.file, order.rows.start + start, earlier)


@dataclass(frozen=True, slots=True)
class Render:
    """A unit's rows -> requests."""

    spec: TaskSpec
    name: str = PREPARING

    def start(self) -> None:
        runner_of(self.spec).start()

    def num_rows(self, table: pa.Table) -> int:
        return table.num_rows  # type: ignore[no-any-return]

    def __call__(
        self, table: pa.Table, start: int, stop: int, lost: RowError | None = None
    ) -> pa.Table:
        return render_unit(self.spec, table.slice(start, stop - start), lost)


@dataclass(frozen=True, slots=True)
class Parse:
    """Completions -> output columns."""

    spec: TaskSpec
    name: str = PARSING

    def start(self) -> None:
        runner_of(self.spec)

    def num_rows(self, table: pa.Table) -> int:
        return num_rows(table)

    def __call__(
        self, table: pa.Table, start: int, stop: int, lost: RowError | None = None
    ) -> pa.Table:
        return parse_unit(self.spec, table, start, stop, lost)


def build_renderer(read: Step, spec: TaskSpec) -> list[Step]:
    """A preprocessing worker's steps; tokenizer and decoder are loaded while it starts."""
    step = Render(spec)
    step.start()
    return [read, step]


def build_parser(spec: TaskSpec, *commit: Step) -> list[Step]:
    """A parsing worker's steps, which may commit, too; its tokenizer is loaded as it starts."""
    step = Parse(spec)
    step.start()
    return [step, *commit]


@dataclass(frozen=True, slots=True)
class Commit:
    """Output columns -> `committed_table`, once the unit is committed."""

    journal: Journal
    unit_sizes: UnitSizes
    spec: TaskSpec
    name: str = COMMITTING

    def num_rows(self, table: pa.Table) -> int:
        return 1  # the unit is committed as a whole

    def __call__(
        self, table: pa.Table, start: int, stop: int, lost: RowError | None = None
    ) -> pa.Table:
        units = table[UNIT].unique().to_pylist()
        if lost:
            raise EngineError(f"unit {units[0]} cannot be committed: {lost.message}")
        if len(units) != 1 or table.num_rows != self.unit_sizes[units[0]]:
            raise RuntimeError(
                f"{table.num_rows} rows of the units {units[:3]} in a block: Ray split or merged "
                "units"
            )
        rows = table.select(self.spec.schema.names)
        record = self.journal.output.commit(
            units[0], rows, count_rows(table), spent=spent_on(table)
        )
        self.journal.forget(units[0])
        return committed_table(record)


def committed_table(record: CommitRecord) -> pa.Table:
    """One row: a unit's commit record."""
    return pa.table({RECORD: pa.array([to_arrow(record)], arrow_type(CommitRecord))})


def committed_records(table: pa.Table) -> list[CommitRecord]:
    """What `committed_table` made, of several units."""
    return [reader(CommitRecord)(row) for row in table[RECORD].to_pylist()]
