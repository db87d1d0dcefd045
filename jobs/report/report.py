"""`glm-batch report`: the page of an output or a sweep, and what to go on with. Starts no Ray.

Owns which files are written where. What stands in them is pipelines.report's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_batch.jobs.commands.outputs import opened
from glm_batch.jobs.files.sections import load_kept_job, read_yaml
from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.job import Job, StorageSection
from glm_batch.pipelines.output.commit import JOB, Output

PAGE = "report.html"
YAML = (".yaml", ".yml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to be written: the page always, `review` rows and a file of probabilities on demand.

    `to` is a directory for the page and the rows; None is the output itself.
    """

    to: str | None = None
    review: int | None = None
    pred_probs: str | None = None


def report(path: str, wanted: Wanted, *, endpoint_url: str | None = None) -> None:
    """Writes the files and prints where they lie.

    `path` is an output, a sweep's output, or the YAML file of either. Raises ConfigError when there
    is nothing to report on.
    """
    from glm_batch.pipelines.report.sweep_page import is_sweep

    place = _place(path)
    output = Output.at(place, StorageSection(endpoint_url=endpoint_url))
    if is_sweep(output):
        _report_sweep(output, wanted)
    else:
        _report_job(opened(place, endpoint_url).output, wanted)


def _report_job(output: Output, wanted: Wanted) -> None:
    from glm_batch.pipelines.report.committed_rows import committed_rows
    from glm_batch.pipelines.report.page import render_job

    job = kept_job(output)
    with committed_rows(output, job) as rows:
        _write(output, wanted.to, PAGE, render_job(rows).encode())
        if wanted.review is not None:
            from glm_batch.pipelines.report.review import review_table

            _write_review(output, wanted.to, review_table(rows, wanted.review))
    if wanted.pred_probs is not None:
        from glm_batch.pipelines.report.review import write_pred_probs

        said = write_pred_probs(output, job, wanted.pred_probs)
        left = (
            f", {sum(said['left_out'].values()):,} left out: {json.dumps(said['left_out'])}"
            if said["left_out"]
            else ""
        )
        print(f"{wanted.pred_probs}: {said['rows']:,} rows, {len(said['labels'])} labels{left}")


def _report_sweep(output: Output, wanted: Wanted) -> None:
    from glm_batch.pipelines.report.sweep_page import (
        SweepCell,
        read_results,
        render_sweep,
        sweep_cells,
    )

    if wanted.pred_probs is not None:
        raise ConfigError("--pred-probs: name the output of one cell, not that of the sweep")

    def job_of(cell: SweepCell) -> tuple[Output, Job]:
        own = Output.at(cell.content["output"], getattr(output.store, "storage", None))
        return own, kept_job(own)

    _write(output, wanted.to, PAGE, render_sweep(output, job_of).encode())
    if wanted.review is not None:
        from glm_batch.pipelines.report.review import sweep_review_table

        cells = sweep_cells(read_results(output))
        jobs = {cell.name: job_of(cell) for cell in cells}
        _write_review(output, wanted.to, sweep_review_table(output, cells, jobs, wanted.review))


def kept_job(output: Output) -> Job:
    """The job as the last `label` ran it. Raises ConfigError."""
    try:
        return load_kept_job(output.kept_job(), f"{output.place}/{JOB}")[0]
    except (FileNotFoundError, ValueError) as error:
        output.standing_plan()
        raise ConfigError(
            f"{output.place}/{JOB} is missing or broken: run the job with label again"
        ) from error


def _place(path: str) -> str:
    """The output that a YAML file names, or the path itself."""
    if not path.endswith(YAML):
        return path
    place = read_yaml(path, "a job file or a sweep is a mapping of keys")[0].get("output")
    if not isinstance(place, str):
        raise ConfigError(f"{path} names no output: give the output itself")
    return place


def _write_review(output: Output, to: str | None, table: Any) -> None:
    from glm_batch.pipelines.report.review import JSONL, PARQUET, to_jsonl, to_parquet

    _write(output, to, PARQUET, to_parquet(table))
    _write(output, to, JSONL, to_jsonl(table))


def _write(output: Output, to: str | None, name: str, data: bytes) -> None:
    if to is None:
        with output.writable():
            output.store.write(name, data)
        print(f"{output.place}/{name}")
        return
    folder = Path(to)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    except OSError as error:
        raise ConfigError(f"--to: {to} cannot be written ({error}); name a directory") from error
    print(folder / name)
