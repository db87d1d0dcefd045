"""`glm-batch label`: run a job, show how it goes, sum it up.

Owns the order of these three. What is checked lies in jobs.checks, what runs in pipelines, how it looks in
jobs.display.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from jobs.checks import check_job
from jobs.config import load_job
from jobs.display import progress_display, summary_table


def label(path: str, overrides: Sequence[str]) -> bool:
    """Runs a job file to its end and prints the summary. False when more rows failed than max_error_rate allows.

    Raises ConfigError before Ray starts for a job that cannot run, EngineError when the engine gives up.
    """
    job, place = load_job(path, overrides)
    check_job(job, place)
    from pipelines.pipeline import run

    name = Path(path).stem
    with progress_display(name, Console(file=sys.stderr)) as show:
        result = run(job, show)
    summary = replace(result.summary, output=job.output)
    Console(highlight=False).print(summary_table(summary, name=name, max_error_rate=job.max_error_rate))
    return summary.counts.error_rate <= job.max_error_rate
