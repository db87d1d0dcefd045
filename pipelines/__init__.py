"""Ray Data graphs: rows in, committed rows out. Importing this loads neither ray nor torch."""

from __future__ import annotations

from pipelines.job import Job
from pipelines.pipeline import Result, build_dataset, run

__all__ = ["Job", "Result", "build_dataset", "run"]
