"""`glm-batch cron`: one incremental run, summed up for machines in one line of JSON on stdout.

Owns that line, the webhook that gets it too, and how long the run may take. What is run lies in
pipelines.cron.incremental. A webhook that cannot be reached is a warning: it decides nothing.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console

from glm_batch.jobs.checks.checks import check_job, check_keys, check_output
from glm_batch.jobs.commands.label import EXIT_OK, EXIT_ROW_ERRORS, EXIT_SIGNAL
from glm_batch.jobs.display.display import progress_display
from glm_batch.jobs.files.sections import load_job
from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.cron.incremental import Choices, Night, run_night
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.output.lease import BusyError
from glm_batch.pipelines.runs.watch import InterruptedRunError, Stop, TooManyErrorsError

EXIT_FAILED, EXIT_BAD_CONFIG = 1, 2
WEBHOOK_TIMEOUT_S = 5.0
DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
CLOCK = re.compile(r"(\d{1,2}):(\d{2})")


def cron(
    path: str,
    overrides: Sequence[str],
    *,
    max_units: int | None = None,
    until: str | None = None,
    drop_deleted: bool = False,
    changed_job: bool = False,
) -> int:
    """Runs once, prints the line and gives the exit code. Errors are in the line, too, before they
    are raised.

    Raises ConfigError before anything starts for a job that cannot run, EngineError when the engine
    gives up.
    """
    begun = _Start()
    job: Job | None = None
    try:
        seconds = None if until is None else seconds_until(until, datetime.now())
        job, place = load_job(path, overrides)
        place.refuse([*check_keys(job), *check_output(job)])
        choices = Choices(
            max_units=max_units,
            drop_deleted=drop_deleted,
            changed_job=changed_job,
            check=lambda job, files: check_job(job, place, files),
        )
        said = _run(job, Path(path).stem, choices, Stop(seconds=seconds))
    except (
        Exception
    ) as error:  # the process's border: recorded for whoever watches, then told to people as ever
        said = _failure(error)
        _tell(job, said, begun)
        raise
    _tell(job, said, begun)
    return int(said["exit_code"])


def seconds_until(text: str, now: datetime) -> float:
    """Seconds from `now` to the next HH:MM on the local clock, or a duration like 90m or 1h30m in
    seconds.
    """
    if (clock := CLOCK.fullmatch(text)) and int(clock[1]) < 24 and int(clock[2]) < 60:
        end = now.replace(hour=int(clock[1]), minute=int(clock[2]), second=0, microsecond=0)
        if end <= now:
            end += timedelta(days=1)
        return end.timestamp() - now.timestamp()
    if text and (duration := DURATION.fullmatch(text)):
        hours, minutes, seconds = (int(number or 0) for number in duration.groups())
        return hours * 3600.0 + minutes * 60.0 + seconds
    raise ConfigError(
        f"--until {text}: write a time of day (06:30) or a duration (45m, 1h30m, 90s)"
    )


def _run(job: Job, name: str, choices: Choices, stop: Stop) -> dict[str, Any]:
    """What the line says of a run that is no error."""
    try:
        with stop.interrupting(), progress_display(name, Console(file=sys.stderr)) as show:
            night = run_night(job, choices, show, stop=stop)
    except BusyError as error:
        print(f"glm-batch: {error}", file=sys.stderr)
        return {"state": "busy", "exit_code": EXIT_OK, "message": str(error)}
    except InterruptedRunError as error:
        print(f"glm-batch: {error}", file=sys.stderr)
        return {
            "state": "interrupted",
            "exit_code": EXIT_SIGNAL + error.signum,
            "message": str(error),
        }
    except KeyboardInterrupt:
        message = "interrupted; what is committed stays, and the next run goes on from there"
        print(f"glm-batch: {message}", file=sys.stderr)
        signum = stop.signum or signal.SIGINT
        return {"state": "interrupted", "exit_code": EXIT_SIGNAL + signum, "message": message}
    except TooManyErrorsError as error:
        print(f"glm-batch: {error}", file=sys.stderr)
        return {"state": "too_many_errors", "exit_code": EXIT_ROW_ERRORS, "message": str(error)}
    return _sum(night, job)


def _sum(night: Night, job: Job) -> dict[str, Any]:
    too_many = night.state != "bounded" and night.counts.error_rate > job.max_error_rate
    if night.changes.deleted and night.deleted_rows:
        print(
            f"glm-batch: {len(night.changes.deleted)} input files are gone; their "
            f"{night.deleted_rows:,} rows are kept "
            "(--drop-deleted gives them up)",
            file=sys.stderr,
        )
    return {
        "state": night.state,
        "exit_code": EXIT_ROW_ERRORS if too_many else EXIT_OK,
        "version": night.version,
        "files": {name: len(names) for name, names in asdict(night.changes).items()},
        "deleted": list(night.changes.deleted),
        "deleted_rows": night.deleted_rows,
        "rows": night.counts.rows,
        "ok": night.counts.ok,
        "errors": dict(night.counts.errors),
        "processed_rows": night.processed_rows,
        "processed_units": night.processed_units,
        "adopted_units": night.adopted_units,
        "left_units": night.left_units,
        "removed_versions": list(night.removed_versions),
    }


def _failure(error: Exception) -> dict[str, Any]:
    is_bad = isinstance(error, ConfigError)
    return {
        "state": "failed",
        "exit_code": EXIT_BAD_CONFIG if is_bad else EXIT_FAILED,
        "error": type(error).__name__,
        "message": str(error),
    }


def _tell(job: Job | None, said: dict[str, Any], begun: _Start) -> None:
    head = {
        "output": job.output if job else None,
        "started": begun.utc,
        "seconds": begun.seconds_since(),
    }
    line = json.dumps(head | said, ensure_ascii=False)
    print(line, flush=True)
    if job is not None and job.cron.webhook is not None:
        _notify(job.cron.webhook, line)


def _notify(url: str, line: str) -> None:
    """Posts the line, and waits WEBHOOK_TIMEOUT_S for an answer in all: however slowly a name or a
    reply comes.
    """
    outcome = [f"no answer within {WEBHOOK_TIMEOUT_S:g} s"]
    poster = threading.Thread(
        target=lambda: outcome.insert(0, _post(url, line)), name="webhook", daemon=True
    )
    poster.start()
    poster.join(WEBHOOK_TIMEOUT_S)
    if reason := outcome[0]:
        print(
            f"glm-batch: cron.webhook was not told ({reason}); the run is not affected",
            file=sys.stderr,
        )


def _post(url: str, line: str) -> str:
    """Why the line did not arrive; empty when it did. The URL is not in it, as that may be a
    secret.
    """
    import httpx

    headers = {"Content-Type": "application/json"}
    try:
        with httpx.stream(
            "POST", url, content=line.encode(), headers=headers, timeout=WEBHOOK_TIMEOUT_S
        ) as reply:
            return "" if reply.is_success else f"status {reply.status_code}"
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        return type(error).__name__


class _Start:
    """The moment in which it is made: a label for people, and what has passed since, whatever
    happens to the clock.
    """

    def __init__(self) -> None:
        self.utc = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._at = time.monotonic()

    def seconds_since(self) -> float:
        return round(time.monotonic() - self._at, 3)
