"""`glm-batch report`: write the page of an output or a sweep. Starts no Ray."""

from __future__ import annotations

from rich.console import Console

from jobs.config import load_kept_job
from models.errors import ConfigError
from pipelines.commit import JOB, Output
from pipelines.job import Job, StorageSection

PAGE = "report.html"


def report(path: str, *, to: str | None = None, endpoint_url: str | None = None) -> None:
    """Writes OUTPUT/report.html, or the file `to`. Raises ConfigError when there is no output."""
    from pipelines.report.collect import collect
    from pipelines.report.page import render_job

    output = Output.at(path, StorageSection(endpoint_url=endpoint_url))
    page = render_job(collect(output, kept_job(output))).encode()
    print(write_page(output, page, to))


def kept_job(output: Output) -> Job:
    try:
        return load_kept_job(output.kept_job(), f"{output.place}/{JOB}")[0]
    except (FileNotFoundError, ValueError) as error:
        output.standing_plan()
        raise ConfigError(f"{output.place}/{JOB} is missing or broken: run the job with label again") from error


def write_page(output: Output, page: bytes, to: str | None) -> str:
    if to is None:
        with output.writable():
            output.store.write(PAGE, page)
        return f"{output.place}/{PAGE}"
    with open(to, "wb") as stream:
        stream.write(page)
    return to
