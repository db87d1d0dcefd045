"""The committed rows of an output in a database of DuckDB, and what a report asks it.

Reads each part once, by the names in the commit records and with their checksums. Memory is a part,
MEMORY for DuckDB, and the answers; the database is a file that is gone afterwards.
"""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from glm_batch.pipelines.evaluation.agreement import NUM_BINS, Reliability
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.metrics.counts import Counts
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.manifest import is_finished
from glm_batch.pipelines.output.parts import CommitRecord, PartFile, part_of
from glm_batch.pipelines.planning.plan import Plan, Unit
from glm_batch.pipelines.report.answers import (
    FACTS,
    FIELD,
    Floats,
    Question,
    counted_numbers,
    counted_values,
    label_names,
    row_facts,
)
from glm_batch.pipelines.report.input_rows import InputRows, Place
from glm_batch.pipelines.report.timeline import Clock

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

MEMORY = "512MB"
UNIT_BINS, NUMBER_BINS = 20, 24
MAX_VALUES, MAX_FIELDS = 1000, 20
IN_MATRIX = 20  # labels
METRICS = ("balanced accuracy", "macro F1", "micro F1")
COUNTED = pa.schema({"name": pa.string(), "value": pa.string(), "rows": pa.int64()})
NUMBERS = pa.schema({"name": pa.string(), "value": pa.float64()})
PARTS_READ = pa.schema(
    {
        "unit": pa.int32(), "part": pa.string(), "rows": pa.int64(), "bytes": pa.int64(),
        "sha256": pa.string(),
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """How often values occur: `counts` of the most frequent ones, by rows and then by name."""

    counts: Mapping[str, int]
    different: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """`bins` [3, bins]: right, wrong, and unjudged rows in equal bins from low to high."""

    bins: npt.NDArray[np.int64]
    low: float
    high: float
    lowest: float
    highest: float
    mean: float


@dataclass(frozen=True, slots=True)
class LabelRows:
    """Rows with a label as gold, as answer, and as both."""

    gold: int = 0
    answered: int = 0
    right: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Gold:
    """Answers against gold. `right` counts rows; `bins` [3, NUM_BINS] are rows, sums of confidence
    and of right answers in the bins of evaluation.agreement.

    For answers with probabilities also: `labels`, the job's and the most frequent ones, of
    `different` ones in all; `pairs`, rows by (gold, answer) of the labels `in_matrix`, where no
    answer is None; the most frequent `mistake` as (gold, answer, rows).
    """

    rows: int
    right: float = 0.0
    failed: int = 0
    labels: Mapping[str, LabelRows] = field(default_factory=dict)
    different: int = 0
    pairs: Mapping[tuple[str, str | None], int] = field(default_factory=dict)
    mistake: tuple[str, str, int] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    bins: Floats = field(default_factory=lambda: np.zeros((3, NUM_BINS)))
    brier: float | None = None

    @property
    def reliability(self) -> Reliability | None:
        """None where no answer has a probability."""
        rows, confidence, right = self.bins
        if not rows.sum():
            return None
        each = np.maximum(rows, 1.0)
        return Reliability(
            rows=rows.astype(np.int64), confidence=confidence / each, accuracy=right / each
        )


@dataclass(frozen=True, slots=True)
class Picked:
    """A row's output columns, and what answers.FACTS says of it."""

    columns: dict[str, Any]
    accuracy: float | None
    margin: float | None


@dataclass(slots=True, kw_only=True)
class Totals:
    """Sums over the commit records that were read."""

    counts: Counts = field(default_factory=Counts)
    spent: Counter[str] = field(default_factory=Counter)
    clock: Clock = field(default_factory=Clock)
    parts: int = 0
    num_bytes: int = 0

    def add(self, record: CommitRecord) -> None:
        self.counts += record.counts
        self.spent.update(record.spent)
        self.clock.add(record)
        self.parts += 1
        self.num_bytes += record.num_bytes


class CommittedRows:
    """An output's rows: table `facts` has one row for each, see answers.FACTS; `counted` says how
    often values occur, `numbers` what was measured, `parts` where units lie.
    """

    def __init__(self, output: Output, job: Job, db: DuckDBPyConnection) -> None:
        self.output, self.job, self.db = output, job, db
        self.plan = output.standing_plan()
        self.finished = is_finished(output, self.plan)
        self.manifest_facts = output.manifest().facts if self.finished else {}
        labels = label_names(job.task.kind, job.task.labels, self.manifest_facts)
        self.question = Question(job.task.kind, labels, tuple(job.carry))
        self.input_rows = InputRows(job, self.plan)
        self.schema: pa.Schema | None = None
        self.totals = Totals()
        for name, schema in (("facts", FACTS), ("counted", COUNTED), ("numbers", NUMBERS),
                             ("parts", PARTS_READ)):  # fmt: skip
            db.from_arrow(schema.empty_table()).create(name)
        db.begin()  # one transaction: no part waits for the disk
        for unit, record, part in committed_parts(output, self.plan):
            self.schema = self.schema or part.schema
            self.totals.add(record)
            self._add(record, part, self.input_rows.golds(unit, part))
        db.commit()

    def _add(self, record: CommitRecord, part: pa.Table, golds: list[Any] | None) -> None:
        self._append("facts", row_facts(self.question, record.unit, part, golds))
        for name, values in counted_values(self.question.kind, part):
            found = pc.value_counts(values.cast(pa.string()).drop_null())
            columns = [pa.array([name] * len(found)), *found.flatten()]
            self._append("counted", pa.table(columns, COUNTED))
        for name, numbers in counted_numbers(self.question, part):
            values = numbers.cast(pa.float64()).drop_null()
            self._append("numbers", pa.table([pa.array([name] * len(values)), values], NUMBERS))
        place = [record.unit, record.part, record.rows, record.num_bytes, record.checksum]
        self._append("parts", pa.table([[value] for value in place], PARTS_READ))

    def _append(self, table: str, rows: pa.Table) -> None:
        self.db.from_arrow(rows).insert_into(table)

    def _ask(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        return self.db.execute(query, values).fetchall()

    # ---- rows

    def lowest(self, score: str, most: int, where: str = "status = 'ok'") -> list[Place]:
        """The rows with the lowest scores, which are SQL; of equal ones the first of the input."""
        query = f"SELECT unit, row FROM facts WHERE {where} AND isfinite({score})"
        return self._ask(f"{query} ORDER BY {score}, unit, row LIMIT {most}")

    def failed(self, most: int) -> dict[str, list[Place]]:
        """For each error code some rows by chance."""
        found: dict[str, list[Place]] = defaultdict(list)
        for code, *place in self._ask(
            "SELECT code, unit, row FROM facts WHERE code IS NOT NULL QUALIFY "
            f"row_number() OVER (PARTITION BY code ORDER BY chance, unit, row) <= {most} "
            "ORDER BY code, chance, unit, row"
        ):
            found[code].append((place[0], place[1]))
        return found

    def picked(self, places: Iterable[Place]) -> dict[Place, Picked]:
        """These rows in the order of the input; one part in memory at a time."""
        by_unit: dict[int, list[int]] = defaultdict(list)
        for unit, row in sorted(set(places)):
            by_unit[unit].append(row)
        found: dict[Place, Picked] = {}
        for unit, rows in by_unit.items():
            ((name, num_rows, size, checksum),) = self._ask(
                "SELECT part, rows, bytes, sha256 FROM parts WHERE unit = ?", unit
            )
            part = self.output.read_part(
                PartFile(name=name, rows=num_rows, num_bytes=size, checksum=checksum)
            )
            facts = self._ask(
                "SELECT accuracy, margin FROM facts WHERE unit = ? AND list_contains(?, row) "
                "ORDER BY row",
                unit,
                rows,
            )
            every = zip(rows, part.take(pa.array(rows)).to_pylist(), facts, strict=True)
            found |= {(unit, row): Picked(columns, *known) for row, columns, known in every}
        return found

    # ---- numbers

    @cached_property
    def again(self) -> int:
        """Rows that were processed more than once."""
        return int(self._ask("SELECT count(*) FROM facts WHERE attempts > 1")[0][0])

    @cached_property
    def values(self) -> dict[str, Values]:
        """By what is counted, in the order in which it came up; of an object's fields the first."""
        listed = self._ask("SELECT name FROM counted GROUP BY name ORDER BY min(rowid)")
        names: list[str] = [name for (name,) in listed]
        fields = [name for name in names if name.startswith(FIELD)][:MAX_FIELDS]
        found = {}
        query = "SELECT value, sum(rows)::BIGINT AS n FROM counted WHERE name = ? GROUP BY value"
        for name in fields or names:
            ((total, different),) = self._ask(
                f"SELECT sum(n)::BIGINT, count(*) FROM ({query})", name
            )
            most = MAX_VALUES + len(self.question.labels)
            ranked = self._ask(f"{query} ORDER BY n DESC, value LIMIT {most}", name)
            found[name] = Values(counts=dict(ranked), different=different, total=total)
        return found

    @cached_property
    def numbers(self) -> dict[str, Histogram]:
        names = self._ask("SELECT name FROM numbers GROUP BY name ORDER BY min(rowid)")
        query = "SELECT 2 AS verdict, value FROM numbers WHERE name = ?"
        every = {name: self._histogram(NUMBER_BINS, query, name) for (name,) in names}
        return {name: found for name, found in every.items() if found is not None}

    @cached_property
    def confidence(self) -> Histogram | None:
        return self._shares("confidence")

    @cached_property
    def off_set_mass(self) -> Histogram | None:
        return self._shares("off_set_mass")

    def _shares(self, column: str) -> Histogram | None:
        verdict = "CASE WHEN accuracy IS NULL THEN 2 WHEN accuracy > 0 THEN 0 ELSE 1 END"
        query = (  # least() alone would make 1 of null
            f"SELECT {verdict} AS verdict, greatest(least({column}, 1), 0) AS value "
            f"FROM facts WHERE isfinite({column})"
        )
        return self._histogram(UNIT_BINS, query, whole=(0.0, 1.0))

    def _histogram(
        self, num_bins: int, query: str, *values: Any, whole: tuple[float, float] | None = None
    ) -> Histogram | None:
        """Of a query's `value` by its `verdict`, over the `whole` range or else all there is."""
        query = f"FROM ({query}) WHERE isfinite(value)"
        ((rows, lowest, highest, mean),) = self._ask(
            f"SELECT count(*), min(value), max(value), favg(value) {query}", *values
        )
        if not rows:
            return None
        few = 0.5 if lowest == highest else 0.0
        low, high = whole or (lowest - few, highest + few)
        bins = np.zeros((3, num_bins), np.int64)
        bin = f"least(floor((value - {low!r}) / {high - low!r} * {num_bins}), {num_bins - 1})::INT"
        for verdict, number, count in self._ask(
            f"SELECT verdict, {bin} AS bin, count(*) {query} GROUP BY ALL", *values
        ):
            bins[verdict, number] = count
        return Histogram(bins=bins, low=low, high=high, lowest=lowest, highest=highest, mean=mean)

    def frequencies(self, column: str) -> dict[int, int]:
        """How often each whole number occurs; no more of them than tokens fit into a context."""
        return dict(
            self._ask(f"SELECT {column}, count(*) FROM facts WHERE {column} IS NOT NULL GROUP BY 1")
        )

    @cached_property
    def gold(self) -> Gold | None:
        """None where no row has a gold answer."""
        ((rows, right, failed, brier),) = self._ask(
            "SELECT count(*), fsum(accuracy), count(*) FILTER (status <> 'ok'), "
            "favg(brier) FILTER (isfinite(brier)) FROM facts WHERE accuracy IS NOT NULL"
        )
        if not rows:
            return None
        bins = np.zeros((3, NUM_BINS))
        for number, *sums in self._ask(
            "SELECT bin, count(*), fsum(confidence), fsum(accuracy) FROM facts "
            "WHERE bin IS NOT NULL GROUP BY bin"
        ):
            bins[:, number] = sums
        found = Gold(rows=rows, right=right, failed=failed, bins=bins, brier=brier)
        has_labels = self._ask("FROM facts WHERE gold IS NOT NULL LIMIT 1")
        return self._by_label(found) if has_labels else found

    def _by_label(self, found: Gold) -> Gold:
        self.db.execute(
            "CREATE OR REPLACE TEMP TABLE labels AS SELECT label, coalesce(g.n, 0) AS gold, "
            "coalesce(a.n, 0) AS answered, coalesce(g.hits, 0) AS hits FROM "
            "(SELECT gold AS label, count(*) AS n, count(*) FILTER (answer = gold) AS hits "
            "FROM facts WHERE gold IS NOT NULL GROUP BY gold) g FULL JOIN "
            "(SELECT answer AS label, count(*) AS n FROM facts "
            "WHERE gold IS NOT NULL AND answer IS NOT NULL GROUP BY answer) a USING (label)"
        )
        ((different, *metrics),) = self._ask(
            "SELECT count(*), avg(hits / gold) FILTER (gold > 0), "
            "avg(2 * hits / (gold + answered)), 2 * sum(hits) / sum(gold + answered) FROM labels"
        )
        most = MAX_VALUES + len(self.question.labels)
        known = {label: LabelRows(*rows) for label, *rows in self._ask(
            f"FROM labels ORDER BY gold + answered DESC, label LIMIT {most}")}  # fmt: skip
        # The job's labels first, then what else stands as gold, then what else was answered.
        others = sorted(known, key=lambda each: (not known[each].gold, each))
        labels = {name: known.get(name, LabelRows()) for name in (*self.question.labels, *others)}
        shown = in_matrix(labels)
        pairs = self._ask(
            "SELECT gold, answer, count(*) FROM facts WHERE list_contains($1, gold) "
            "AND (answer IS NULL OR list_contains($1, answer)) GROUP BY ALL",
            shown,
        )
        mistakes = self._ask(
            "SELECT gold, answer, count(*) AS n FROM facts WHERE gold <> answer GROUP BY ALL "
            "ORDER BY n DESC, gold DESC, answer DESC LIMIT 1"
        )
        return replace(
            found,
            labels=labels,
            different=different + sum(name not in known for name in labels),
            pairs={(gold, answer): rows for gold, answer, rows in pairs},
            mistake=mistakes[0] if mistakes else None,
            metrics=dict(zip(METRICS, metrics, strict=True)),
        )


def in_matrix(labels: Mapping[str, LabelRows]) -> list[str]:
    """The most frequent labels, in their order."""
    ranked = sorted(labels, key=lambda each: -labels[each].gold - labels[each].answered)
    return [label for label in labels if label in set(ranked[:IN_MATRIX])]


def committed_parts(output: Output, plan: Plan) -> Iterator[tuple[Unit, CommitRecord, pa.Table]]:
    """Every committed unit with its rows, in the order of the input; one part in memory."""
    units = plan.units()
    for record in output.records(plan):
        unit = next(unit for unit in units if unit.index == record.unit)
        yield unit, record, output.read_part(part_of(record))


@contextmanager
def committed_rows(output: Output, job: Job) -> Iterator[CommittedRows]:
    """Raises ConfigError when no job has begun there or a committed part is damaged."""
    with database() as db:
        yield CommittedRows(output, job, db)


@contextmanager
def database() -> Iterator[DuckDBPyConnection]:
    """An empty database in a temporary folder. With one thread its sums are the same each time."""
    import duckdb

    with tempfile.TemporaryDirectory() as folder, duckdb.connect(f"{folder}/rows.duckdb") as db:
        db.execute(f"SET threads = 1; SET memory_limit = '{MEMORY}'")
        db.execute(f"SET temp_directory = '{folder}'")
        yield db
