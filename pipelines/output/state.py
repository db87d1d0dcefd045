"""How far an output is, whether its parts are what was committed, and what `gc` removes of it."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import pyarrow as pa

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.metrics.counts import Counts, summed
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.journal import leftovers
from glm_batch.pipelines.output.lease import own, tidy
from glm_batch.pipelines.output.manifest import MANIFEST, is_finished, named_parts
from glm_batch.pipelines.output.parts import PART_NAME, PARTS, PartFile, part_of
from glm_batch.pipelines.planning.plan import Identity
from glm_batch.pipelines.storage.storage import TEMPORARY, Entry, reach

LATEST = 50  # units that say what a job is at just now
VERIFIERS = 4  # parts in memory at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How far an output has come. `spent` is what its LATEST units have taken."""

    num_rows: int
    num_units: int
    units_done: int
    counts: Counts
    finished: bool
    job: Identity
    spent: Mapping[str, float] = field(default_factory=dict)


def status_of(output: Output) -> Status:
    """Raises ConfigError when no job has begun here."""
    plan = output.standing_plan()
    units, counts = 0, Counts()
    latest: list[tuple[str, int, Mapping[str, float]]] = []
    for record in output.records(plan):
        units += 1
        counts += record.counts
        push = heapq.heappush if len(latest) < LATEST else heapq.heappushpop
        push(latest, (record.at, record.unit, record.spent))
    return Status(
        num_rows=plan.num_rows,
        num_units=plan.num_units,
        units_done=units,
        counts=counts,
        finished=is_finished(output, plan),
        job=plan.identity,
        spent=summed(spent for _, _, spent in latest),
    )


def verify(output: Output) -> Iterator[tuple[PartFile, str | None]]:
    """Every part that counts, in the order of the units, and what is wrong with it.

    Reads all bytes: sizes and checksums against the commit records, row counts against the files,
    and the manifest's word against both. Raises ConfigError when no job has begun here.
    """

    plan = output.standing_plan()
    named = named_parts(output) if is_finished(output, plan) else None
    with ThreadPoolExecutor(VERIFIERS) as pool:
        wanted = map(part_of, output.records(plan))
        while some := list(islice(wanted, 4 * VERIFIERS)):
            problems = pool.map(lambda part: _damage(output, part), some)
            for part, problem in zip(some, problems, strict=True):
                if problem is None and named is not None and named.get(part.name) != part.checksum:
                    problem = f"{MANIFEST} says something else of {part.name}"
                yield part, problem


def _damage(output: Output, part: PartFile) -> str | None:
    try:
        num_rows = output.read_part(part).num_rows
    except (ConfigError, OSError, pa.ArrowException) as error:
        return str(error).removeprefix("output: ")
    if num_rows == part.rows:
        return None
    return f"{part.name} holds {num_rows} rows, its record says {part.rows}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What was removed, and how many parts of units that are not committed were left."""

    removed: tuple[Entry, ...]
    waiting: int

    @property
    def num_bytes(self) -> int:
        return sum(entry.size or 0 for entry in self.removed)


def collect(output: Output, kept: Collection[str] = ()) -> Collected:
    """Removes that but for `kept`. Raises ConfigError without an output or while a driver works."""
    output.standing_plan()
    temporaries = list(_files(output, TEMPORARY))  # later ones may be the lease's own
    with own(output.store) as lease:
        generations = output.generations()
        counting = {record.part for record in output.read_records(generations.items())}
        named = {*counting, *named_parts(output), *kept}
        removed: list[Entry] = []
        waiting = 0
        for entry in _files(output, PARTS):
            match = PART_NAME.fullmatch(entry.name)
            if match is None or entry.name in named:
                continue
            if int(match["generation"]) > generations.get(int(match["unit"]), 0):
                waiting += 1
                continue
            lease.check()
            reach("before_delete")
            output.store.delete(entry.name)
            removed.append(entry)
        for entry in [*temporaries, *leftovers(output)]:
            output.store.delete(entry.name)
            removed.append(entry)
        tidy(output.store)
    return Collected(removed=tuple(removed), waiting=waiting)


def _files(output: Output, folder: str) -> Iterator[Entry]:
    entries = [
        entry for page in output.store.pages(folder) for entry in page if entry.size is not None
    ]
    return iter(sorted(entries, key=lambda entry: entry.name))
