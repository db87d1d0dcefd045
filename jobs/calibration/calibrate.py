"""`glm-batch calibrate`: fits a calibration on a finished job's gold answers. Starts no Ray.

Owns which rows are taken and where the file goes; the fit and the file's form are
pipelines.calibration's.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from glm_batch.jobs.report.report import kept_job
from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.calibration.calibration import Calibration, question_of
from glm_batch.pipelines.job import Job, StorageSection
from glm_batch.pipelines.output.commit import Output

LOGPROBS = "label_logprobs"
IMPOSSIBLE = "gold_label_has_probability_0"


def calibrate(
    path: str, *, to: str | None = None, bias: bool = False, endpoint_url: str | None = None
) -> None:
    """Writes the file and prints what it holds. Raises ConfigError where nothing can be fitted.

    `path` is a job's output, also that of a sweep's cell. The file goes to `to`, or else beside the
    model's directory.
    """
    output = Output.at(path, StorageSection(endpoint_url=endpoint_url))
    job = kept_job(output)
    file = _file(job, output, to)
    found = fit_output(output, job, bias=bias)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f".{file.name}.{os.getpid()}")
        part.write_text(
            json.dumps(found.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        part.replace(file)
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be written ({error.strerror}); name another place with --to"
        ) from error
    print(found.sentence())
    if found.left_out:
        print(f"{sum(found.left_out.values()):,} rows left out: {json.dumps(found.left_out)}")
    print(f"task.calibration: {file}")


def fit_output(output: Output, job: Job, *, bias: bool) -> Calibration:
    """Fits on all its rows that were answered and have a gold label. Raises ConfigError."""
    from glm_batch.pipelines.calibration.calibration import fitted
    from glm_batch.pipelines.report.review import PROBABILITIES, probability_labels, usable_rows

    if job.task.gold is None:
        raise ConfigError(
            f"{output.place}: its job names no task.gold, so there is nothing to fit to"
        )
    labels, plan, left_out = probability_labels(output, job), output.standing_plan(), Counter[str]()
    has_logprobs = job.task.label_logprobs
    if job.task.calibration is not None and not has_logprobs:
        raise ConfigError(
            f"{output.place}: its probabilities are calibrated already; take an output without "
            "task.calibration, or one with task.label_logprobs"
        )
    logprobs, gold = [], []
    for rows, numbers in usable_rows(output, job, plan, labels, left_out):
        column = rows[LOGPROBS] if has_logprobs else rows[PROBABILITIES[job.task.kind]]
        some = _matrix(column, len(labels), is_log=has_logprobs)
        possible = np.isfinite(some[np.arange(len(numbers)), numbers])
        left_out[IMPOSSIBLE] += int((~possible).sum())
        logprobs.append(some[possible])
        gold.append(numbers[possible])
    found = fitted(np.concatenate(logprobs), np.concatenate(gold), labels, with_bias=bias)
    return Calibration(
        model=plan.identity["model"],
        question=question_of(plan.identity["task"]),
        labels=tuple(labels),
        temperature=found.scaling.temperature,
        bias=found.scaling.bias or (0.0,) * len(labels),
        rows=sum(map(len, gold)),
        ece_before=found.before[0],
        ece_after=found.after[0],
        nll_before=found.before[1],
        nll_after=found.after[1],
        left_out={name: rows for name, rows in sorted(left_out.items()) if rows},
        fitted_on=plan.fingerprint,
    )


def _matrix(
    column: pa.ChunkedArray, width: int, *, is_log: bool
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[rows, width] logarithms."""
    values = np.array(column.to_pylist(), np.float64).reshape(-1, width)
    with np.errstate(divide="ignore"):
        return values if is_log else np.log(values)


def _file(job: Job, output: Output, to: str | None) -> Path:
    """Beside the model's directory, never in it: what lies there is part of the model's digest."""
    model = Path(job.model)
    if to is None:
        name = output.place.rstrip("/").rpartition("/")[2]
        return model.with_name(f"{model.name}.{name}.calibration.json")
    file = Path(to)
    if model.resolve() in file.resolve().parents:
        raise ConfigError(
            f"--to: {to} lies in the model's directory, which would be another model then; "
            "put it beside"
        )
    return file
