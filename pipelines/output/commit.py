"""The protocol by which rows get into an output, so that a crash at any moment loses no row.

    OUTPUT/plan.json, plan-2.json ...     created once each: input files, units, fingerprint; the highest counts
    OUTPUT/parts/UNIT-gN-ATTEMPT.parquet  a unit's rows, under a name that no other attempt has
    OUTPUT/commits/UNIT-gN.json           created once: which part counts for the unit; the highest N counts
    OUTPUT/manifest.json                  written last; readers open this and never list a directory
    OUTPUT/job.json                       the job as the last driver ran it, for `retry`
    OUTPUT/lease/                         which driver owns the output: see pipelines.output.lease
    OUTPUT/journal/                       answers of units that are still in work: see pipelines.output.journal

"Created once" means that the second writer is told so, which is all the protocol asks of a store. A
record of generation N + 1 is made by a retry of generation N's failed rows. Parts that no record
names are leftovers of attempts that died or came second. Knows nothing of Ray, of tasks, or of what
kind of store it writes to.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.job import StorageSection
from glm_batch.pipelines.metrics.bottleneck import COMMITTING, summed
from glm_batch.pipelines.metrics.counts import Counts
from glm_batch.pipelines.planning.plan import (
    Identity,
    Plan,
    adds_files_only,
    differences,
    fingerprint,
    unit_id,
)
from glm_batch.pipelines.storage.crash_points import reach
from glm_batch.pipelines.storage.storage import (
    TEMPORARY,
    S3Store,
    StorageError,
    Store,
    check_store,
    open_store,
)

FORMAT = 1
PLAN, JOB, MANIFEST = "plan.json", "job.json", "manifest.json"
PARTS, COMMITS, LEASE, JOURNAL = "parts", "commits", "lease", "journal"
LATEST = 50  # units that say what a job is at just now
FOLDERS = (PARTS, COMMITS, LEASE, JOURNAL, TEMPORARY)
VERIFIERS = 4  # parts in memory at a time
READERS = 32  # commit records read at a time from a store with long round trips
RECORD_NAME = re.compile(rf"{COMMITS}/unit-(\d+)-g(\d+)\.json")
PART_NAME = re.compile(rf"{PARTS}/unit-(?P<unit>\d+)-g(?P<generation>\d+)-\w+\.parquet")
PLAN_NAME = re.compile(r"plan(?:-(\d+))?\.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRecord:
    """What counts for one unit: `part` is a path below the output, `checksum` the SHA-256 of its
    bytes.

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
class Part:
    """A part as the manifest names it."""

    name: str
    rows: int
    num_bytes: int
    checksum: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A finished output: its rows stand in `parts`, in the order of the input."""

    fingerprint: str
    counts: Counts
    schema: pa.Schema
    parts: tuple[Part, ...]
    facts: dict[str, Any]
    job: Identity


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How far an output has come, by its plan and commit records. `spent` is what its LATEST units
    have taken.
    """

    num_rows: int
    num_units: int
    units_done: int
    counts: Counts
    finished: bool
    job: Identity
    spent: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Output:
    """One output. Only the description of its store travels to the workers."""

    store: Store

    @classmethod
    def at(cls, path: str, storage: StorageSection | None = None) -> Output:
        """Raises ConfigError for a kind of place that outputs cannot be committed to."""
        return cls(open_store(path, storage or StorageSection()))

    @property
    def place(self) -> str:
        return self.store.place

    # ---- the plan

    def plan(self) -> Plan | None:
        """The plan that counts here, None where no job has begun. Raises ConfigError for one that
        cannot be read.
        """
        try:
            number = max(self._plan_numbers(), default=0)
            return Plan.from_json(self.store.read(_plan_name(number))) if number else None
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise ConfigError(
                f"output: the plan in {self.place} cannot be read ({error}); use another output"
            ) from error

    def adopt(self, identity: Identity, *, extend: bool = False) -> Plan | None:
        """The plan that stands here, if it is this job's; None where the place is free.

        With `extend`, this job may have more input files than that plan. Raises ConfigError for
        another job's output, with the differences, and for a place of other things.
        """
        plan = self.plan()
        if plan is None:
            self._refuse_other_content()
        elif plan.fingerprint != fingerprint(identity) and not (
            extend and adds_files_only(plan.identity, identity)
        ):
            lines = "\n  ".join(differences(plan.identity, identity))
            hint = (
                "; --extend takes up files that were added"
                if adds_files_only(plan.identity, identity)
                else ""
            )
            raise ConfigError(
                f"output: {self.place} was begun by another job; use another output, remove this one, or undo the "
                f"difference{hint} (there -> now):\n  {lines}"
            )
        return plan

    def begin(self, plan: Plan) -> Plan:
        """Creates the output with this plan and returns the plan that counts: another driver's if
        it was first.

        Raises ConfigError when the place cannot be written, or cannot tell a second writer from the
        first.
        """
        try:
            self.store.prepare(FOLDERS)
            check_store(self.store)
            reach("before_plan")
            self.store.create(PLAN, plan.to_json())
            reach("after_plan")
        except OSError as error:
            raise ConfigError(
                f"output: {self.place} cannot be written ({error}); choose another place"
            ) from error
        standing = self.adopt(plan.identity)
        assert standing is not None
        return standing

    def take_over(self, plan: Plan, job: bytes) -> None:
        """Says that this plan is what the output's owner works on: the one that stands, or one that
        extends it.
        """
        standing = self.standing_plan()
        if standing.fingerprint != plan.fingerprint:
            number = max(self._plan_numbers()) + 1
            reach("before_plan")
            if standing.num_units > plan.num_units or not self.store.create(
                _plan_name(number), plan.to_json()
            ):
                raise ConfigError(
                    f"output: {self.place} was extended by another driver meanwhile; run it again"
                )
            reach("after_plan")
        with self.writable():
            self.store.write(JOB, job)

    def kept_job(self) -> bytes:
        """The job as JSON. Raises FileNotFoundError."""
        return self.store.read(JOB)

    # ---- units

    def commit(
        self,
        unit: int,
        table: pa.Table,
        counts: Counts,
        generation: int = 1,
        spent: Mapping[str, float] | None = None,
    ) -> CommitRecord:
        """Writes a unit's rows as a part and creates its commit record; returns the record that
        counts.

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
        yield from self._read_records(
            (unit, found[unit]) for unit in sorted(found) if unit < plan.num_units
        )

    def _read_records(self, wanted: Iterator[tuple[int, int]]) -> Iterator[CommitRecord]:
        if not isinstance(self.store, S3Store):
            yield from (self.known_record(*each) for each in wanted)
            return
        with ThreadPoolExecutor(READERS) as pool:
            while some := list(islice(wanted, 32 * READERS)):
                yield from pool.map(lambda each: self.known_record(*each), some)

    def read_part(self, part: Part) -> pa.Table:
        """A part's rows. Raises ConfigError when it is gone or not what was committed."""
        try:
            data = self.store.read(part.name)
        except FileNotFoundError:
            data = b""
        if len(data) != part.num_bytes or hashlib.sha256(data).hexdigest() != part.checksum:
            raise ConfigError(f"output: {_damage(self.place, part)}")
        return pq.read_table(pa.BufferReader(data))

    # ---- the end

    def is_finished(self, plan: Plan) -> bool:
        """Whether the manifest says what this plan and the commit records say."""
        content = self._manifest_content()
        if content is None or content["fingerprint"] != plan.fingerprint:
            return False
        named = (PART_NAME.fullmatch(each["part"]) for each in content["parts"])
        found = {int(match["unit"]): int(match["generation"]) for match in named if match}
        return len(found) == plan.num_units and found == self.generations()

    def named_parts(self) -> set[str]:
        """Every part that counts: by a record that no later generation replaces, or for readers of
        the manifest.
        """
        names = {record.part for record in self._read_records(iter(self.generations().items()))}
        content = self._manifest_content()
        return names | {each["part"] for each in content["parts"]} if content else names

    def finish(self, plan: Plan, schema: pa.Schema, facts: dict[str, Any]) -> Manifest:
        """Writes the manifest, after every unit is committed. One that says the same is left as it
        is.
        """
        parts, counts = [], Counts()
        sizes = {entry.name: entry.size for page in self.store.pages(PARTS) for entry in page}
        for record in self.records(plan):
            part = part_of(record)
            if sizes.get(part.name) != part.num_bytes:
                raise ConfigError(f"output: {_damage(self.place, part)}")
            parts.append(
                {
                    "part": part.name,
                    "rows": part.rows,
                    "bytes": part.num_bytes,
                    "sha256": part.checksum,
                }
            )
            counts += record.counts
        if len(parts) != plan.num_units or counts.rows != plan.num_rows:
            raise RuntimeError(
                f"{self.place}: {len(parts)} of {plan.num_units} units with {counts.rows} of {plan.num_rows} rows "
                "are committed: the manifest must wait for all of them"
            )
        content = {
            "format": FORMAT,
            "fingerprint": plan.fingerprint,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "rows": counts.rows,
            "counts": counts.to_json(),
            "schema": [{"name": field.name, "type": str(field.type)} for field in schema],
            "task": facts,
            "job": plan.identity,
            "parts": parts,
        } | _kept_of_deleted(plan, [str(part["part"]) for part in parts])
        if not _says_the_same(self._manifest_content(), content):
            reach("before_manifest")
            with self.writable():
                self.store.write(MANIFEST, json.dumps(content, indent=1).encode())
            reach("after_manifest")
        return self.manifest()

    def manifest(self) -> Manifest:
        """Raises ConfigError when the output is not finished, or is none."""
        content = self._manifest_content()
        if content is None:
            raise ConfigError(
                f"output: {self.place} has no {MANIFEST}: its job is not finished; run it again"
            )
        parts = tuple(
            Part(
                name=each["part"],
                rows=each["rows"],
                num_bytes=each["bytes"],
                checksum=each["sha256"],
            )
            for each in content["parts"]
        )
        return Manifest(
            fingerprint=content["fingerprint"],
            counts=Counts.from_json(content["counts"]),
            schema=self.read_part(parts[0]).schema if parts else pa.schema([]),
            parts=parts,
            facts=content["task"],
            job=content["job"],
        )

    def iter_tables(self) -> Iterator[pa.Table]:
        """The committed tables in the order of the input, one part in memory at a time, checksums
        compared.
        """
        yield from map(self.read_part, self.manifest().parts)

    def status(self) -> Status:
        """Raises ConfigError when no job has begun here."""
        plan = self.standing_plan()
        units, counts = 0, Counts()
        latest: list[tuple[str, int, Mapping[str, float]]] = []
        for record in self.records(plan):
            units += 1
            counts += record.counts
            push = heapq.heappush if len(latest) < LATEST else heapq.heappushpop
            push(latest, (record.at, record.unit, record.spent))
        return Status(
            num_rows=plan.num_rows,
            num_units=plan.num_units,
            units_done=units,
            counts=counts,
            finished=self.is_finished(plan),
            job=plan.identity,
            spent=summed(spent for _, _, spent in latest),
        )

    def verify(self) -> Iterator[tuple[Part, str | None]]:
        """Every part that counts, in the order of the units, and what is wrong with it.

        Reads all bytes: sizes and checksums against the commit records, row counts against the
        files, and the manifest's word against both. Raises ConfigError when no job has begun here.
        """
        plan = self.standing_plan()
        content = self._manifest_content() if self.is_finished(plan) else None
        named = {each["part"]: each["sha256"] for each in content["parts"]} if content else None
        with ThreadPoolExecutor(VERIFIERS) as pool:
            wanted = map(part_of, self.records(plan))
            while some := list(islice(wanted, 4 * VERIFIERS)):
                for part, problem in zip(some, pool.map(self._problem, some), strict=True):
                    misnamed = named is not None and named.get(part.name) != part.checksum
                    yield (
                        part,
                        problem
                        or (f"{MANIFEST} says something else of {part.name}" if misnamed else None),
                    )

    def _problem(self, part: Part) -> str | None:
        try:
            num_rows = self.read_part(part).num_rows
        except (ConfigError, OSError, pa.ArrowException) as error:
            return str(error).removeprefix("output: ")
        return (
            None
            if num_rows == part.rows
            else f"{part.name} holds {num_rows} rows, its record says {part.rows}"
        )

    def standing_plan(self) -> Plan:
        """Raises ConfigError when no job has begun here."""
        plan = self.plan()
        if plan is None:
            raise ConfigError(
                f"{self.place} holds no output of glm-batch (no {PLAN}); name a job's output"
            )
        return plan

    @contextmanager
    def writable(self) -> Iterator[None]:
        """Says of a store that failed which one it is, and that nothing is lost."""
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"{self.place} cannot be written ({error}); mend that (free space, access) and run the same command "
                "again: what is committed stays"
            ) from error

    def _manifest_content(self) -> dict[str, Any] | None:
        try:
            content: dict[str, Any] = json.loads(self.store.read(MANIFEST))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return content

    def known_record(self, unit: int, generation: int) -> CommitRecord:
        """A record that a listing showed. Raises FileNotFoundError."""
        return CommitRecord.from_json(self.store.read(_record_name(unit, generation)))

    def _plan_numbers(self) -> Iterator[int]:
        try:
            for page in self.store.pages():
                for entry in page:
                    if match := PLAN_NAME.fullmatch(entry.name):
                        yield int(match[1] or 1)
        except NotADirectoryError as error:
            raise ConfigError(f"output: {self.place} is a file; name a directory") from error

    def _refuse_other_content(self) -> None:
        known = {*FOLDERS, JOB}  # a driver that died before it wrote its plan leaves these
        strange = [
            entry.name for page in self.store.pages() for entry in page if entry.name not in known
        ]
        if strange or any(self.store.pages(PARTS)):
            raise ConfigError(
                f"output: {self.place} holds something else ({', '.join(strange[:5]) or 'parts without a plan'}); "
                "name an empty or new place"
            )


def part_of(record: CommitRecord) -> Part:
    return Part(
        name=record.part, rows=record.rows, num_bytes=record.num_bytes, checksum=record.checksum
    )


def _kept_of_deleted(plan: Plan, parts: Sequence[str]) -> dict[str, Any]:
    """What the manifest says of files that are no longer part of the input: the last parts are
    theirs.
    """
    entries, rest = [], list(parts)
    for planned in reversed(plan.deleted):
        first = len(rest) - -(-planned.num_rows // plan.unit_rows)
        entries.append({"file": planned.file.name, "rows": planned.num_rows, "parts": rest[first:]})
        del rest[first:]
    return {"deleted": entries[::-1]} if entries else {}


def _damage(place: str, part: Part) -> str:
    match = PART_NAME.fullmatch(part.name)
    record = (
        _record_name(int(match["unit"]), int(match["generation"])) if match else "its commit record"
    )
    return (
        f"the committed part {place}/{part.name} is gone or is not what was written; restore it, or remove "
        f"{record} there and run the job again"
    )


def _says_the_same(standing: dict[str, Any] | None, content: dict[str, Any]) -> bool:
    names = ("fingerprint", "counts", "parts")
    return standing is not None and all(standing[name] == content[name] for name in names)


def _plan_name(number: int) -> str:
    return PLAN if number == 1 else f"plan-{number}.json"


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
