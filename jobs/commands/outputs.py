"""The commands on an output that stands: `glm-batch status`, `retry` and `gc`.

Each takes the path of an output, or of a cron output, which means its version in force.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

from rich.console import Console

from glm_batch.jobs.checks.checks import check_checkpoint
from glm_batch.jobs.commands.label import closed
from glm_batch.jobs.display.display import progress_display, status_table
from glm_batch.jobs.files.sections import load_kept_job
from glm_batch.models import rooms
from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.job import Job, StorageSection
from glm_batch.pipelines.metrics.counts import Summary
from glm_batch.pipelines.output.commit import JOB, Output
from glm_batch.pipelines.output.state import collect, status_of, verify
from glm_batch.pipelines.runs.watch import Stop

SHOWN_PROBLEMS = 20


class Opened(Protocol):
    """The output that a path means: see pipelines.cron.versions.NamedOutput."""

    @property
    def path(self) -> str: ...
    @property
    def output(self) -> Output: ...
    def owned(self) -> AbstractContextManager[None]: ...
    def parts_in_force(self) -> set[str]: ...


@dataclass(frozen=True, slots=True)
class Single:
    """An output by itself, in an installation without cron."""

    path: str
    output: Output

    def owned(self) -> AbstractContextManager[None]:
        return nullcontext()

    def parts_in_force(self) -> set[str]:
        return set()


def opened(path: str, endpoint_url: str | None = None) -> Opened:
    """The output, after a line on stderr where it is a version below `path`. Raises ConfigError."""
    storage = StorageSection(endpoint_url=endpoint_url)
    if not rooms.is_here("cron"):
        return Single(path, Output.at(path, storage))
    found = rooms.load("pipelines.cron.versions").find(path, storage)
    if found.versions is not None and found.path != path:
        is_in_force = found.versions.in_force() == found.name
        state = "is in force" if is_in_force else "is the latest begun, and none is in force yet"
        print(f"glm-batch: {path}: version {found.name} {state}", file=sys.stderr)
    return found  # type: ignore[no-any-return]


def status(path: str, *, verify: bool = False, endpoint_url: str | None = None) -> bool:
    """Prints the state of an output. False when `verify` found damage.

    Raises ConfigError when no job has begun there.
    """
    console = Console(highlight=False)
    found = opened(path, endpoint_url)
    output = found.output
    console.print(status_table(status_of(output), found.path))
    return not verify or verified(output, console)


def verified(output: Output, console: Console) -> bool:
    """Reads all committed parts and prints what is wrong with them."""
    parts = num_bytes = 0
    problems: list[str] = []
    for part, problem in verify(output):
        parts, num_bytes = parts + 1, num_bytes + part.num_bytes
        problems += [problem] if problem else []
    for problem in problems[:SHOWN_PROBLEMS]:
        print(problem, file=sys.stderr)
    more = f", {SHOWN_PROBLEMS} of them shown" if len(problems) > SHOWN_PROBLEMS else ""
    said = f"{len(problems):,} damaged{more}" if problems else "all as committed"
    console.print(f"verified {parts:,} parts, {num_bytes:,} bytes: {said}")
    return not problems


def retry(
    path: str,
    codes: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    endpoint_url: str | None = None,
    app: str | None = None,
) -> int:
    """Recomputes failed rows, prints the summary of the whole output and gives the exit code.

    With `app`, through the replicas of this live application.

    Raises ConfigError before Ray starts when the job cannot run any more.
    """
    found = opened(path, endpoint_url)
    output = found.output
    job = replace(_kept_job(output, overrides), output=found.path)
    _, problems = check_checkpoint(job)
    if problems:
        raise ConfigError("\n".join(map(str, problems)))

    def work() -> Summary:
        from glm_batch.pipelines.runs.retry_run import retry_failed

        with found.owned(), progress_display("retry", Console(file=sys.stderr)) as show:
            return retry_failed(job, output, codes, show, stop=Stop(), app=app)

    return closed(work, job, "retry")


def _kept_job(output: Output, overrides: Sequence[str]) -> Job:
    """The job as the last `label` ran it, with what is to be different now. Raises ConfigError."""
    try:
        text = output.kept_job()
        job, _ = load_kept_job(text, f"{output.place}/{JOB}", overrides)
    except (FileNotFoundError, ValueError) as error:
        output.standing_plan()
        raise ConfigError(
            f"{output.place}/{JOB} is missing or broken: run the job with label again"
        ) from error
    return job


def gc(path: str, *, endpoint_url: str | None = None) -> None:
    """Prints what was removed. Raises ConfigError when there is no output, or a driver is at work
    on it.
    """
    found = opened(path, endpoint_url)
    with found.owned():
        collected = collect(found.output, found.parts_in_force())
    console = Console(highlight=False)
    for entry in collected.removed:
        console.print(f"removed {entry.name} ({entry.size or 0:,} bytes)", soft_wrap=True)
    console.print(f"removed {len(collected.removed):,} files, {collected.num_bytes:,} bytes")
    if collected.waiting:
        console.print(
            f"left {collected.waiting:,} parts of units that are not committed yet: finish "
            f"the job first"
        )
