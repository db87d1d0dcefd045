"""A job file becomes a Job."""

from __future__ import annotations

import json
from collections.abc import Sequence

from glm_batch.jobs.files.sections import (
    Key,
    Place,
    keys_of,
    load_sections,
    read_sections,
    read_yaml,
)
from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.job import Job

WHAT = "a job file is a mapping of keys (model, input, output, task ...)"


def load_job(path: str, overrides: Sequence[str] = ()) -> tuple[Job, Place]:
    """Reads a job file and applies `a.b=value` overrides. Raises ConfigError that names each key
    and its place.
    """
    return load_sections(Job, path, WHAT, overrides)


def load_kept_job(text: bytes, path: str, overrides: Sequence[str] = ()) -> tuple[Job, Place]:
    """As `load_job`, of a job that was kept as JSON beside its output in `path`."""
    data = json.loads(text)
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no job: run the job with label again")
    return read_sections(Job, data, {}, path, overrides)


def is_sweep(path: str) -> bool:
    """Whether a file holds a sweep and no job. Raises ConfigError when it cannot be read."""
    data, _ = read_yaml(path, WHAT)
    return "models" in data and "datasets" in data


def job_keys() -> dict[str, Key]:
    """Every key of a job file by its dotted name, in the order in which they are declared."""
    return keys_of(Job)
