"""Removes what does not count in an output: parts of attempts that died, came second or were
retried, temporaries, the journal of units that are committed.

A part may go when it can never be named any more: its unit has a record of its generation, or of a
later one, that names another part. Parts of units that are not committed stay, as a worker may be
about to commit them. Parts that the manifest names stay, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.journal import leftovers
from glm_batch.pipelines.output.lease import own, tidy
from glm_batch.pipelines.output.manifest import named_parts
from glm_batch.pipelines.output.parts import PART_NAME, PARTS
from glm_batch.pipelines.storage.crash_points import reach
from glm_batch.pipelines.storage.storage import TEMPORARY, Entry


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
