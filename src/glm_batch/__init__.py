"""glm-batch: the GLM models over very large tables, one committed record for every input row.

    from glm_batch import Job, run, build_dataset, load

The four packages lie at the top level of the repository and are linked from here, so that one
layout serves wheels, editable installs, Ray's workers and type checkers: `models` (the networks and
the engine), `glm_actors` (Ray actors around them), `pipelines` (jobs over tables) and `jobs` (the
command line). Each may import those named before it. Names are loaded when they are first asked
for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glm_batch.models import load as load
    from glm_batch.models.engine import Request as Request
    from glm_batch.models.engine import SamplingParams as SamplingParams
    from glm_batch.models.engine import build_engine as build_engine
    from glm_batch.models.version import __version__ as __version__
    from glm_batch.pipelines import Job as Job
    from glm_batch.pipelines import build_dataset as build_dataset
    from glm_batch.pipelines import run as run

_HOMES = {
    "Job": "glm_batch.pipelines",
    "Request": "glm_batch.models.engine",
    "SamplingParams": "glm_batch.models.engine",
    "__version__": "glm_batch.models.version",
    "build_dataset": "glm_batch.pipelines",
    "build_engine": "glm_batch.models.engine",
    "load": "glm_batch.models",
    "run": "glm_batch.pipelines",
}

__all__ = [
    "Job",
    "Request",
    "SamplingParams",
    "__version__",
    "build_dataset",
    "build_engine",
    "load",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
