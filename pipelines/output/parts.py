"""Parts and commit records: a unit's rows in an output. See commit.py for the whole protocol."""

from __future__ import annotations

import hashlib
import json
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.metrics.counts import COMMITTING, Counts
from glm_batch.pipelines.planning.plan import Plan, unit_id
from glm_batch.pipelines.storage.storage import S3Store, StorageError, Store, reach

FORMAT = 1
PARTS, COMMITS = "parts", "commits"
READERS = 32  # commit records read at a time from a store with long round trips
RECORD_NAME = re.compile(rf"{COMMITS}/unit-(\d+)-g(\d+)\.json")
PART_NAME = re.compile(rf"{PARTS}/unit-(?P<unit>\d+)-g(?P<generation>\d+)-\w+\.parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRecord:
    """A unit's part: `part` is its path below the output, `checksum` the SHA-256 of its bytes.

    For people only: `at` is when it was committed (UTC, as ISO 8601), `spent` where its seconds
    went until then.
    """

    unit: int
    generation: int = 1
    part: str
    rows: int
    num_bytes: int
    checksum: str
    counts: Counts
    at: str = ""
    spent: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> bytes:
        content = asdict(self) | {
            "format": FORMAT,
            "id": unit_id(self.unit),
            "counts": self.counts.to_json(),
        }
        return json.dumps(content).encode()

    @classmethod
    def from_json(cls, data: bytes) -> CommitRecord:
        content = json.loads(data)
        content["counts"] = Counts.from_json(content["counts"])
        return cls(**{name: content[name] for name in cls.__dataclass_fields__ if name in content})


@dataclass(frozen=True, slots=True, kw_only=True)
class PartFile:
    """A part as a record or the manifest names it."""

    name: str
    rows: int
    num_bytes: int
    checksum: str


@dataclass(frozen=True, slots=True)
class Parts:
    """The committed units of an output; travels to workers as the store's description."""

    store: Store

    @property
    def place(self) -> str:
        return self.store.place

    def commit(
        self,
        unit: int,
        table: pa.Table,
        counts: Counts,
        generation: int = 1,
        spent: Mapping[str, float] | None = None,
    ) -> CommitRecord:
        """Writes a part and creates its commit record; returns the record that counts.

        `spent` are the unit's seconds so far. The record is an earlier attempt's when there is one,
        and then this attempt's part is removed again. Raises StorageError when the store fails.
        """
        with self.writable():
            return self.record(unit, generation) or self._commit(
                unit, table, counts, generation, spent or {}
            )

    def _commit(
        self,
        unit: int,
        table: pa.Table,
        counts: Counts,
        generation: int,
        spent: Mapping[str, float],
    ) -> CommitRecord:
        begun = time.monotonic()
        data = _parquet_bytes(table)
        part = f"{PARTS}/{unit_generation(unit, generation)}-{uuid.uuid4().hex[:8]}.parquet"
        reach("before_part")
        self.store.write(part, data)
        reach("after_part")
        record = CommitRecord(
            unit=unit,
            generation=generation,
            part=part,
            rows=table.num_rows,
            num_bytes=len(data),
            checksum=hashlib.sha256(data).hexdigest(),
            counts=counts,
            at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            spent={**spent, COMMITTING: round(time.monotonic() - begun, 4)},
        )
        reach("before_record")
        is_first = self.store.create(_record_name(unit, generation), record.to_json())
        reach("after_record")
        if is_first:
            return record
        self.store.delete(part)
        standing = self.record(unit, generation)
        assert standing is not None
        return standing

    def enter(self, record: CommitRecord) -> None:
        """Creates the commit record of a part that lies here already."""
        with self.writable():
            self.store.create(_record_name(record.unit, record.generation), record.to_json())

    def record(self, unit: int, generation: int = 1) -> CommitRecord | None:
        """One generation of a unit's commit record, if it has been committed."""
        try:
            return CommitRecord.from_json(self.store.read(_record_name(unit, generation)))
        except FileNotFoundError:
            return None

    def generations(self) -> dict[int, int]:
        """The highest generation of each committed unit: a listing, which reads no record."""
        found: dict[int, int] = {}
        for page in self.store.pages(COMMITS):
            for entry in page:
                if match := RECORD_NAME.fullmatch(entry.name):
                    unit, generation = int(match[1]), int(match[2])
                    found[unit] = max(found.get(unit, 0), generation)
        return found

    def records(self, plan: Plan) -> Iterator[CommitRecord]:
        """The records that count, in the order of their units, some in memory at a time."""
        found = self.generations()
        yield from self.read_records(
            (unit, found[unit]) for unit in sorted(found) if unit < plan.num_units
        )

    def read_records(self, wanted: Iterable[tuple[int, int]]) -> Iterator[CommitRecord]:
        """The records of these units and generations, some in memory at a time."""
        if not isinstance(self.store, S3Store):
            yield from (self.known_record(*each) for each in wanted)
            return
        left = iter(wanted)
        with ThreadPoolExecutor(READERS) as pool:
            while some := list(islice(left, 32 * READERS)):
                yield from pool.map(lambda each: self.known_record(*each), some)

    def read_part(self, part: PartFile) -> pa.Table:
        """A part's rows. Raises ConfigError when it is gone or not what was committed."""
        try:
            data = self.store.read(part.name)
        except FileNotFoundError:
            data = b""
        if len(data) != part.num_bytes or hashlib.sha256(data).hexdigest() != part.checksum:
            raise ConfigError(f"output: {damage(self.place, part)}")
        return pq.read_table(pa.BufferReader(data))

    def known_record(self, unit: int, generation: int) -> CommitRecord:
        """A record that a listing showed. Raises FileNotFoundError."""
        return CommitRecord.from_json(self.store.read(_record_name(unit, generation)))

    @contextmanager
    def writable(self) -> Iterator[None]:
        """Says of a store that failed which one it is, and that nothing is lost."""
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"{self.place} cannot be written ({error}); mend that (free space, access) and run "
                "the same command again: what is committed stays"
            ) from error


def part_of(record: CommitRecord) -> PartFile:
    return PartFile(
        name=record.part, rows=record.rows, num_bytes=record.num_bytes, checksum=record.checksum
    )


def damage(place: str, part: PartFile) -> str:
    match = PART_NAME.fullmatch(part.name)
    record = (
        _record_name(int(match["unit"]), int(match["generation"])) if match else "its commit record"
    )
    return (
        f"the committed part {place}/{part.name} is gone or is not what was written; restore it, "
        f"or remove {record} there and run the job again"
    )


def unit_generation(unit: int, generation: int) -> str:
    """What the names of a unit's files begin with."""
    return f"{unit_id(unit)}-g{generation}"


def _record_name(unit: int, generation: int) -> str:
    return f"{COMMITS}/{unit_generation(unit, generation)}.json"


def _parquet_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data
