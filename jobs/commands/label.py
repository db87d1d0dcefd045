"""`glm-batch label`: run a job, show how it goes, sum it up.

Owns the order of these three, and which ending has which exit code. What is checked lies in
jobs.checks.checks, what runs in pipelines, how it looks in jobs.display.display.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from glm_batch.jobs.checks.checks import check_job
from glm_batch.jobs.display.display import progress_display, summary_table
from glm_batch.jobs.files.sections import load_job
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.metrics.counts import Summary
from glm_batch.pipelines.runs.watch import InterruptedRunError, Stop, TooManyErrorsError

EXIT_OK, EXIT_ROW_ERRORS, EXIT_SIGNAL = 0, 3, 128


def label(
    path: str, overrides: Sequence[str], *, extend: bool = False, app: str | None = None
) -> int:
    """Runs a job file to its end, prints the summary and gives the exit code.

    With `app`, through the replicas of this live application.

    Raises ConfigError before Ray starts for a job that cannot run, EngineError when the engine
    gives up.
    """
    job, place = load_job(path, overrides)
    checked = check_job(job, place)
    from glm_batch.pipelines.runs.pipeline import run

    name = Path(path).stem

    def work() -> Summary:
        with progress_display(name, Console(file=sys.stderr)) as show:
            return run(checked, show, stop=Stop(), extend=extend, app=app).summary

    return closed(work, job, name)


def closed(work: Callable[[], Summary], job: Job, name: str) -> int:
    """Does the work, prints its summary or why it ended early, and gives the exit code."""
    try:
        summary = replace(work(), output=job.output)
    except InterruptedRunError as error:
        print(f"glm-batch: {error}", file=sys.stderr)
        return EXIT_SIGNAL + error.signum
    except TooManyErrorsError as error:
        print(f"glm-batch: {error}", file=sys.stderr)
        return EXIT_ROW_ERRORS
    Console(highlight=False).print(
        summary_table(summary, name=name, max_error_rate=job.max_error_rate)
    )
    return EXIT_OK if summary.counts.error_rate <= job.max_error_rate else EXIT_ROW_ERRORS
