"""The protocol by which rows get into an output, so that a crash at any moment loses no row.

    plan.json, plan-2.json ...     created once each: files, units, fingerprint; the highest counts
    parts/UNIT-gN-ATTEMPT.parquet  a unit's rows, under a name that no other attempt has
    commits/UNIT-gN.json           created once: which part counts for the unit, by the highest N
    manifest.json                  written last; readers open this and never list a directory
    job.json                       the job as the last driver ran it, for `retry`
    lease/                         which driver owns the output: see lease.py
    journal/                       answers of units that are still in work: see journal.py

"Created once" means that the second writer is told so, which is all the protocol asks of a store. A
record of generation N + 1 is made by a retry of generation N's failed rows. Parts that no record
names are leftovers of attempts that died or came second.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.job import StorageSection
from glm_batch.pipelines.output.manifest import Manifest, read_manifest
from glm_batch.pipelines.output.parts import COMMITS, PARTS, Parts
from glm_batch.pipelines.planning.plan import (
    Identity,
    Plan,
    adds_files_only,
    differences,
    fingerprint,
)
from glm_batch.pipelines.storage.storage import TEMPORARY, check_store, open_store, reach

PLAN, JOB, LEASE, JOURNAL = "plan.json", "job.json", "lease", "journal"
FOLDERS = (PARTS, COMMITS, LEASE, JOURNAL, TEMPORARY)
PLAN_NAME = re.compile(r"plan(?:-(\d+))?\.json")


@dataclass(frozen=True, slots=True)
class Output(Parts):
    """One output: its plan and job beside its parts, and what it says when it is finished."""

    @classmethod
    def at(cls, path: str, storage: StorageSection | None = None) -> Output:
        """Raises ConfigError for a kind of place that outputs cannot be committed to."""
        return cls(open_store(path, storage or StorageSection()))

    def plan(self) -> Plan | None:
        """The plan that counts, None before a job began. Raises ConfigError for a broken one."""
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
                f"output: {self.place} was begun by another job; use another output, remove this "
                f"one, or undo the difference{hint} (there -> now):\n  {lines}"
            )
        return plan

    def begin(self, plan: Plan) -> Plan:
        """Creates the output; returns the plan that counts, another driver's if it was first.

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
        """Makes this plan, the standing one or an extension of it, what the owner works on."""
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

    def standing_plan(self) -> Plan:
        """Raises ConfigError when no job has begun here."""
        plan = self.plan()
        if plan is None:
            raise ConfigError(
                f"{self.place} holds no output of glm-batch (no {PLAN}); name a job's output"
            )
        return plan

    def manifest(self) -> Manifest:
        """Raises ConfigError when the output is not finished, or is none."""
        return read_manifest(self)

    def iter_tables(self) -> Iterator[pa.Table]:
        """The committed tables in the order of the input, one in memory at a time, verified."""
        yield from map(self.read_part, self.manifest().parts)

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
                f"output: {self.place} holds something else "
                f"({', '.join(strange[:5]) or 'parts without a plan'}); name an empty or new place"
            )


def _plan_name(number: int) -> str:
    return PLAN if number == 1 else f"plan-{number}.json"
