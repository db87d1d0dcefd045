"""One incremental run over a job's input: what is new or changed is processed, the rest is taken
from earlier versions.

    list the input -> go on with an unfinished version -> a new version if the input differs from
    the one in force

A version is put in force when all its units are committed; until then, whatever happens, the last
one stays. Owns the order of these; versions on disk are pipelines.cron.versions', what changed is
pipelines.cron.changes'. Nothing starts Ray or loads a tokenizer while there is nothing to do.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.cron.changes import (
    Changes,
    changes,
    check_carried,
    claims,
    gone,
    is_current,
    next_plan,
    offers,
    same_job,
)
from glm_batch.pipelines.cron.versions import Versions, plans
from glm_batch.pipelines.input.listing import InputFile
from glm_batch.pipelines.job import Job, job_file
from glm_batch.pipelines.metrics.counts import Counts
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.lease import Lease
from glm_batch.pipelines.output.parts import PARTS, unit_generation
from glm_batch.pipelines.planning.plan import (
    Identity,
    Plan,
    Unit,
    differences,
    identify,
    job_source,
)
from glm_batch.pipelines.runs.pipeline import finish, process
from glm_batch.pipelines.runs.prepared import Checked, check
from glm_batch.pipelines.runs.watch import OnProgress, Stop, Tally, Watch

ADOPTERS = 32  # links, or copies inside a store with long round trips, at a time

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What the caller of one run decides.

    `check` is called before any work starts, with tonight's input files, and refuses a job by
    raising.
    """

    max_units: int | None = None
    drop_deleted: bool = False
    changed_job: bool = False
    check: Callable[[Job, Sequence[InputFile]], Checked] = check


@dataclass(frozen=True, slots=True, kw_only=True)
class Night:
    """What a run came to. `version` is in force at its end, `counts` are of the one worked on.

    Units are the run's own: adopted from earlier versions, processed, and left for the next run.
    """

    state: Literal["unchanged", "finished", "bounded"]
    version: str | None
    changes: Changes
    counts: Counts
    processed_rows: int = 0
    processed_units: int = 0
    adopted_units: int = 0
    left_units: int = 0
    deleted_rows: int = 0
    removed_versions: tuple[str, ...] = ()


def run_night(
    job: Job, choices: Choices, on_progress: OnProgress | None = None, *, stop: Stop | None = None
) -> Night:
    """Does what is to be done tonight.

    Raises BusyError when another run is at it, otherwise as pipelines.run does.
    """
    versions = Versions.at(job.output, job.storage)
    versions.prepare()
    with versions.owned() as lease:
        run = _Run(job, choices, versions, lease, stop or Stop(), on_progress)
        night = run.night()
        lease.confirm()
        removed = versions.prune(job.cron.keep) if night.state != "bounded" else []
    return replace(night, removed_versions=tuple(removed))


class _Run:
    """One run, by the owner of the output."""

    def __init__(
        self,
        job: Job,
        choices: Choices,
        versions: Versions,
        lease: Lease,
        stop: Stop,
        on_progress: OnProgress | None,
    ) -> None:
        self._job, self._choices, self._versions = job, choices, versions
        self._lease, self._stop, self._on_progress = lease, stop, on_progress
        self._checked: Checked | None = None
        self._processed = self._processed_units = self._adopted = 0

    def night(self) -> Night:
        name = self._versions.in_force()
        files = job_source(self._job).list_files(self._job.input, may_be_gone=name is not None)
        identity = identify(self._job, files, os.path.abspath(self._job.model))
        if name is not None and self._versions.catch_up(name):
            log.warning(
                "%s: the manifest of %s was not that of a finished retry yet",
                self._versions.store.place,
                name,
            )
        standing = self._versions.output(name).standing_plan() if name else None
        begun = [
            each
            for each in plans(self._versions, self._versions.unfinished())
            if same_job(each[1].identity, identity)
        ]
        found = changes(standing, files)
        if standing and not begun:
            self._refuse_another_job(standing, identity)
        if begun and self._can_go_on(*begun[-1], files):
            name, standing = begun[-1]
            if left := self._work(name, standing, files):
                return self._night("bounded", found, standing, left)
        if standing is None or not self._is_up_to_date(standing, files, identity):
            name, standing = self._begin(files, identity, standing, begun[-1][1] if begun else None)
            if left := self._work(name, standing, files):
                return self._night("bounded", found, standing, left)
        elif not begun:
            return self._night("unchanged", found, standing)
        return self._night("finished", found, standing)

    def _night(
        self,
        state: Literal["unchanged", "finished", "bounded"],
        found: Changes,
        plan: Plan,
        left: int = 0,
    ) -> Night:
        in_force = self._versions.in_force()
        return Night(
            state=state,
            version=in_force,
            changes=found,
            counts=Output(self._versions.store).manifest().counts if in_force else Counts(),
            processed_rows=self._processed,
            processed_units=self._processed_units,
            adopted_units=self._adopted,
            left_units=left,
            deleted_rows=sum(planned.num_rows for planned in plan.deleted),
        )

    def _refuse_another_job(self, standing: Plan, identity: Identity) -> None:
        if same_job(standing.identity, identity) or self._choices.changed_job:
            return
        lines = "\n  ".join(
            differences(standing.identity | {"input": None}, identity | {"input": None})
        )
        raise ConfigError(
            f"output: {self._versions.store.place} is another job's; undo the difference, name "
            "another output, or process every row again with --changed-job (there -> now):\n  "
            f"{lines}"
        )

    def _is_up_to_date(
        self, standing: Plan, files: Sequence[InputFile], identity: Identity
    ) -> bool:
        wanted = same_job(standing.identity, identity) and is_current(standing, files)
        return wanted and not (self._choices.drop_deleted and standing.deleted)

    def _can_go_on(self, name: str, plan: Plan, files: Sequence[InputFile]) -> bool:
        """Whether what is left of an unfinished version can still be read as it was planned.

        Under `fail_fast` it must be tonight's input: a file that was mended would wait for ever
        behind its old rows.
        """
        if self._job.fail_fast and not is_current(plan, files):
            return False
        listed, done = {file.mark for file in files}, self._versions.output(name).generations()
        left = {unit.file for unit in plan.units() if unit.index not in done}
        return all(
            plan.files[number].file.mark in listed for number in left if number < len(plan.present)
        )

    def _begin(
        self,
        files: Sequence[InputFile],
        identity: Identity,
        before: Plan | None,
        unfinished: Plan | None,
    ) -> tuple[str, Plan]:
        """A new version: the present input, and kept files that are gone since `before`."""
        survey = self._check(files).survey
        kept = () if self._choices.drop_deleted else gone(before, files)
        is_same = before is not None and same_job(before.identity, identity)
        known = unfinished or (before if is_same else None)
        plan = next_plan(self._job, survey, identity, known, kept)
        if before is not None and is_same and not self._choices.changed_job:
            check_carried(self._job, plan, before)
        if before is not None and kept and not (is_same and _same_types(self._job, plan, before)):
            raise ConfigError(
                "input: rows of deleted files cannot be processed again for a changed job: "
                f"{', '.join(each.file.name for each in kept[:5])}; add --drop-deleted, or restore "
                "the files"
            )
        name = self._versions.new_name()
        output = self._versions.output(name)
        plan = output.begin(plan)
        output.take_over(plan, job_file(replace(self._job, output=output.place)))
        return name, plan

    def _check(self, files: Sequence[InputFile]) -> Checked:
        """What is known of the job and tonight's input, once there is anything to do."""
        if self._checked is None:
            self._checked = self._choices.check(self._job, files)
        return self._checked

    def _work(self, name: str, plan: Plan, files: Sequence[InputFile]) -> int:
        """Finishes a version and puts it in force, or gives how many units had to be left."""
        output, job = self._versions.output(name), self._job
        tally = Tally(self._on_progress, job.max_error_rate if job.fail_fast else None)
        tally.tell("planning")
        prepared = self._check(files).prepared(plan)
        self._adopted += self._adopt(name, plan)
        units = tally.resume(plan, output)[: self._units_allowed()]
        if not self._stop.is_asked:
            try:
                watch = Watch(lease=self._lease, stop=self._stop)
                process(prepared, output, units, tally, watch)
            finally:
                self._processed += tally.new_rows
                self._processed_units += tally.new_units
        if tally.units_left:
            return tally.units_left
        finish(prepared, output, self._lease)
        self._versions.publish(name)
        tally.tell("done")
        return 0

    def _units_allowed(self) -> int | None:
        most = self._choices.max_units
        return None if most is None else max(most - self._processed_units, 0)

    def _adopt(self, name: str, plan: Plan) -> int:
        """Takes units from other versions, the latest first."""
        done = self._versions.output(name).generations()
        wanted = {claim: unit for unit, claim in claims(plan) if unit.index not in done}
        before = len(wanted)
        for source in reversed(self._versions.names()):
            if wanted and source != name:
                self._adopt_from(source, name, plan, wanted)
        lost = {
            plan.files[unit.file].file.name
            for unit in wanted.values()
            if unit.file >= len(plan.present)
        }
        if lost:
            raise ConfigError(
                f"output: {self._versions.store.place} has lost rows of deleted input files "
                f"({', '.join(sorted(lost)[:5])}); restore its parts or these files, or give them "
                "up with --drop-deleted"
            )
        return before - len(wanted)

    def _adopt_from(self, source: str, name: str, plan: Plan, wanted: dict[Hashable, Unit]) -> None:
        """Takes what there is of the `wanted` units, and removes them from these."""
        theirs, output = self._versions.output(source), self._versions.output(name)
        standing = theirs.plan()
        if (
            standing is None
            or not same_job(standing.identity, plan.identity)
            or not _same_types(self._job, standing, plan)
        ):
            return
        generations = theirs.generations()
        found = [
            (claim, unit)
            for claim, unit in offers(standing)
            if claim in wanted and unit.index in generations
        ]

        def adopt(each: tuple[Hashable, Unit]) -> Hashable | None:
            claim, unit = each
            return (
                claim
                if self._adopt_unit(
                    source, theirs, unit, generations[unit.index], name, output, wanted[claim]
                )
                else None
            )

        with ThreadPoolExecutor(ADOPTERS) as pool:
            for claim in list(pool.map(adopt, dict(found).items())):
                wanted.pop(claim, None)

    def _adopt_unit(
        self,
        source: str,
        theirs: Output,
        unit: Unit,
        generation: int,
        name: str,
        output: Output,
        wanted: Unit,
    ) -> bool:
        self._lease.check()
        record = theirs.known_record(unit.index, generation)
        if theirs.store.size(record.part) != record.num_bytes:
            log.warning(
                "%s/%s is gone or damaged: its rows are processed again", theirs.place, record.part
            )
            return False
        part = f"{PARTS}/{unit_generation(wanted.index, 1)}-{uuid.uuid4().hex[:8]}.parquet"
        with output.writable():
            self._versions.copy_part(source, record.part, name, part)
        output.enter(replace(record, unit=wanted.index, generation=1, part=part))
        return True


def _same_types(job: Job, one: Plan, other: Plan) -> bool:
    return all(one.schema.field(name).type == other.schema.field(name).type for name in job.carry)
