"""`glm-batch retry`: process the failed rows of an output again, with the job that is kept beside
it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from glm_batch.jobs.checks.checks import check_checkpoint
from glm_batch.jobs.commands.label import closed
from glm_batch.jobs.commands.place import opened
from glm_batch.jobs.display.display import progress_display
from glm_batch.jobs.files.job_file import load_kept_job
from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.metrics.counts import Summary
from glm_batch.pipelines.output.commit import JOB, Output
from glm_batch.pipelines.runs.stop import Stop


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
