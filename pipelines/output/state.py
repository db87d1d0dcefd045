"""How far an output is, and whether its parts are what was committed."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import pyarrow as pa

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.metrics.bottleneck import summed
from glm_batch.pipelines.metrics.counts import Counts
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.manifest import MANIFEST, is_finished, named_parts
from glm_batch.pipelines.output.parts import PartFile, part_of
from glm_batch.pipelines.planning.plan import Identity

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
