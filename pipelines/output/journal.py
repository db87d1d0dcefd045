"""Answers of units that are still in work, so that a crash costs seconds of finished work and not
whole units.

    OUTPUT/journal/UNIT-gN-SHA256.arrow   what the engine said to some rows of a unit

A unit that stays in the engine for longer than `every_seconds` puts aside what it has finished
since the last time; whoever takes it up again finds that here, and its commit removes it. A file
that is not what its name says counts for nothing: its rows are computed again.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from glm_batch.pipelines.output.commit import JOURNAL, Output
from glm_batch.pipelines.output.parts import unit_generation
from glm_batch.pipelines.storage.storage import Entry, reach

log = logging.getLogger(__name__)
NAME = re.compile(
    rf"{JOURNAL}/(?P<key>unit-(?P<unit>\d+)-g(?P<generation>\d+))-[0-9a-f]{{64}}\.arrow"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """An output's journal as it travels. `generations`: which one each committed unit has."""

    output: Output
    every_seconds: float
    generations: Mapping[int, int] = field(default_factory=dict)

    def write(self, unit: int, table: pa.Table) -> None:
        """Makes the table durable. Raises StorageError."""
        data = _arrow_bytes(table)
        with self.output.writable():
            reach("before_journal")
            self.output.store.write(
                f"{JOURNAL}/{self._key(unit)}-{hashlib.sha256(data).hexdigest()}.arrow", data
            )
            reach("after_journal")

    def read(self, unit: int) -> list[pa.Table]:
        """What earlier attempts at the unit have put aside."""
        return [table for name in self._names(unit) if (table := self._table(name)) is not None]

    def forget(self, unit: int) -> None:
        """Removes what was put aside of a unit that is committed now."""
        for name in self._names(unit):
            self.output.store.delete(name)

    def _key(self, unit: int) -> str:
        return unit_generation(unit, self.generations.get(unit, 0) + 1)

    def _names(self, unit: int) -> Iterator[str]:
        key = self._key(unit)
        entries = [entry for page in self.output.store.pages(JOURNAL) for entry in page]
        return (
            entry.name
            for entry in entries
            if (match := NAME.fullmatch(entry.name)) and match["key"] == key
        )

    def _table(self, name: str) -> pa.Table | None:
        try:
            data = self.output.store.read(name)
        except FileNotFoundError:  # another attempt has committed the unit meanwhile
            return None
        if f"-{hashlib.sha256(data).hexdigest()}." not in name:
            log.warning("%s in %s is damaged: its rows are computed again", name, self.output.place)
            return None
        return pa.ipc.open_file(pa.BufferReader(data)).read_all()


def leftovers(output: Output) -> Iterator[Entry]:
    """What is put aside of committed units: who committed them died before it removed this."""
    generations = output.generations()
    entries = [entry for page in output.store.pages(JOURNAL) for entry in page]
    for entry in sorted(entries, key=lambda entry: entry.name):
        match = NAME.fullmatch(entry.name)
        if match and int(match["generation"]) <= generations.get(int(match["unit"]), 0):
            yield entry


def tidy(output: Output) -> None:
    """Removes the leftovers."""
    for entry in leftovers(output):
        output.store.delete(entry.name)


def _arrow_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(
        sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")
    ) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data
