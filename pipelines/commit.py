"""The output directory and the protocol by which rows get into it, so that a crash at any moment loses no row.

    OUTPUT/plan.json              created once: fingerprint, input files, units
    OUTPUT/parts/UNIT-ATTEMPT.parquet   a unit's rows, under a name that no other attempt has
    OUTPUT/commits/UNIT.json      created once: which part counts for the unit
    OUTPUT/manifest.json          written last; readers open this and never list a directory

"Created once" means that the second writer is told so (`Output.create`), which is all the protocol asks of a store.
Parts without a commit record are leftovers of attempts that died or came second. Knows nothing of Ray or tasks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import ConfigError
from pipelines.metrics import Counts
from pipelines.plan import Identity, Plan, differences, fingerprint, unit_id

FORMAT = 1
PLAN, MANIFEST, PARTS, COMMITS, TEMPORARY = "plan.json", "manifest.json", "parts", "commits", "tmp"


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRecord:
    """What counts for one unit: `part` is a path below the output, `checksum` the SHA-256 of its bytes."""

    unit: int
    part: str
    rows: int
    num_bytes: int
    checksum: str
    counts: Counts

    def to_json(self) -> bytes:
        content = asdict(self) | {"format": FORMAT, "id": unit_id(self.unit), "counts": self.counts.to_json()}
        return json.dumps(content).encode()

    @classmethod
    def from_json(cls, data: bytes) -> CommitRecord:
        content = json.loads(data)
        content["counts"] = Counts.from_json(content["counts"])
        return cls(**{name: content[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A finished output: its rows stand in `parts`, in the order of the input."""

    fingerprint: str
    counts: Counts
    schema: pa.Schema
    parts: tuple[str, ...]
    facts: dict[str, Any]
    job: Identity


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How far an output has come, by its plan and commit records."""

    num_rows: int
    num_units: int
    units_done: int
    counts: Counts
    finished: bool
    job: Identity


@dataclass(frozen=True, slots=True)
class Output:
    """One output directory. Only its path travels to the workers."""

    root: Path

    @classmethod
    def at(cls, path: str) -> Output:
        """Raises ConfigError for a place that this version cannot commit to."""
        if "://" in path:
            raise ConfigError(
                f"output: {path}: this version commits to directories of a file system; name one of these"
            )
        return cls(Path(os.path.abspath(path)))

    def adopt(self, identity: Identity) -> Plan | None:
        """The plan that stands here, if it is this job's; None where the directory is free.

        Raises ConfigError for another job's output, with the differences, and for a directory of other things.
        """
        try:
            plan = Plan.from_json((self.root / PLAN).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            self._refuse_other_content()
            return None
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise ConfigError(f"output: {self.root / PLAN} cannot be read ({error}); use another output") from error
        if plan.fingerprint != fingerprint(identity):
            lines = "\n  ".join(differences(plan.identity, identity))
            raise ConfigError(
                f"output: {self.root} was begun by another job; use another output, remove this one, or undo the "
                f"difference (there -> now):\n  {lines}"
            )
        return plan

    def begin(self, plan: Plan) -> Plan:
        """Creates the output with this plan and returns the plan that counts: another driver's if it was first.

        Raises ConfigError when the place cannot be written, or cannot tell a second writer from the first.
        """
        try:
            for folder in (PARTS, COMMITS, TEMPORARY):
                (self.root / folder).mkdir(parents=True, exist_ok=True)
            self._check_store()
            self.create(PLAN, plan.to_json())
        except OSError as error:
            raise ConfigError(f"output: {self.root} cannot be written ({error}); choose another directory") from error
        standing = self.adopt(plan.identity)
        assert standing is not None
        return standing

    def create(self, name: str, data: bytes) -> bool:
        """Makes `name` with this content, whole and durable, unless it exists. True for the one writer that made it."""
        temporary = self._write_temporary(data)
        try:
            os.link(temporary, self.root / name)
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        _sync_directory((self.root / name).parent)
        return True

    def commit(self, unit: int, table: pa.Table, counts: Counts) -> CommitRecord:
        """Writes a unit's rows as a part and creates its commit record; returns the record that counts.

        That is an earlier attempt's when there is one, and then this attempt's part is removed again.
        """
        standing = self.record(unit)
        if standing is not None:
            return standing
        data = _parquet_bytes(table)
        part = f"{PARTS}/{unit_id(unit)}-{uuid.uuid4().hex[:8]}.parquet"
        os.replace(self._write_temporary(data), self.root / part)
        _sync_directory(self.root / PARTS)
        checksum = hashlib.sha256(data).hexdigest()
        record = CommitRecord(
            unit=unit, part=part, rows=table.num_rows, num_bytes=len(data), checksum=checksum, counts=counts
        )
        if self.create(_record_name(unit), record.to_json()):
            return record
        (self.root / part).unlink()
        standing = self.record(unit)
        assert standing is not None
        return standing

    def record(self, unit: int) -> CommitRecord | None:
        """The commit record of a unit, if it has been committed."""
        try:
            return CommitRecord.from_json((self.root / _record_name(unit)).read_bytes())
        except FileNotFoundError:
            return None

    def records(self, plan: Plan) -> Iterator[CommitRecord]:
        """The records of all committed units, in order, one at a time."""
        done = {entry.name for entry in os.scandir(self.root / COMMITS)}
        for unit in range(plan.num_units):
            if f"{unit_id(unit)}.json" in done and (record := self.record(unit)) is not None:
                yield record

    def finish(self, plan: Plan, schema: pa.Schema, facts: dict[str, Any]) -> Manifest:
        """Writes the manifest, after every unit is committed. A manifest that stands already is left as it is."""
        parts, counts = [], Counts()
        for record in self.records(plan):
            self._check_part(record)
            part = {"part": record.part, "rows": record.rows, "bytes": record.num_bytes, "sha256": record.checksum}
            parts.append(part)
            counts += record.counts
        if len(parts) != plan.num_units or counts.rows != plan.num_rows:
            raise RuntimeError(
                f"{self.root}: {len(parts)} of {plan.num_units} units with {counts.rows} of {plan.num_rows} rows "
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
        }
        self.create(MANIFEST, json.dumps(content, indent=1).encode())
        return self.manifest()

    def manifest(self) -> Manifest:
        """Raises ConfigError when the output is not finished, or is none."""
        try:
            content = json.loads((self.root / MANIFEST).read_bytes())
        except FileNotFoundError as error:
            raise ConfigError(
                f"output: {self.root} has no {MANIFEST}: its job is not finished; run it again"
            ) from error
        parts = tuple(entry["part"] for entry in content["parts"])
        return Manifest(
            fingerprint=content["fingerprint"],
            counts=Counts.from_json(content["counts"]),
            schema=pq.read_schema(self.root / parts[0]) if parts else pa.schema([]),
            parts=parts,
            facts=content["task"],
            job=content["job"],
        )

    def is_finished(self) -> bool:
        return (self.root / MANIFEST).exists()

    def iter_tables(self) -> Iterator[pa.Table]:
        """The committed tables in the order of the input, one part in memory at a time."""
        for part in self.manifest().parts:
            yield pq.ParquetFile(self.root / part).read()

    def status(self) -> Status:
        """Raises ConfigError when no job has begun here."""
        try:
            plan = Plan.from_json((self.root / PLAN).read_bytes())
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{self.root} holds no output of glm-batch ({error})") from error
        units, counts = 0, Counts()
        for record in self.records(plan):
            units += 1
            counts += record.counts
        return Status(
            num_rows=plan.num_rows,
            num_units=plan.num_units,
            units_done=units,
            counts=counts,
            finished=self.is_finished(),
            job=plan.identity,
        )

    def _write_temporary(self, data: bytes) -> Path:
        path = self.root / TEMPORARY / uuid.uuid4().hex
        try:
            with path.open("xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        return path

    def _check_store(self) -> None:
        name = f"{TEMPORARY}/probe-{uuid.uuid4().hex}"
        if not self.create(name, b"") or self.create(name, b""):
            raise OSError("its file system does not refuse to create a file twice")
        (self.root / name).unlink()

    def _check_part(self, record: CommitRecord) -> None:
        path = self.root / record.part
        if not path.is_file() or path.stat().st_size != record.num_bytes:
            raise ConfigError(
                f"output: the committed part {path} is gone or has another size; restore it, or remove "
                f"{self.root / _record_name(record.unit)} and run the job again"
            )

    def _refuse_other_content(self) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise ConfigError(f"output: {self.root} is a file; name a directory")
        known = {PARTS, COMMITS, TEMPORARY}  # a driver that died before it wrote its plan leaves these
        strange = [path.name for path in self.root.glob("*") if path.name not in known]
        if strange or any(self.root.glob(f"{PARTS}/*")):
            raise ConfigError(
                f"output: {self.root} holds something else ({', '.join(strange[:5]) or 'parts without a plan'}); "
                "name an empty or new directory"
            )


def _record_name(unit: int) -> str:
    return f"{COMMITS}/{unit_id(unit)}.json"


def _parquet_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _sync_directory(path: Path) -> None:
    """Makes new names in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
