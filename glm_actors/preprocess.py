"""Preprocessor: rows in, requests out, on CPU workers.

Runs as the callable class of a Ray Data stage. What is to be done comes as a function that builds the work on the
worker, so that only a description travels. Knows nothing of tasks, prompts or files.
"""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa

Transform = Callable[[pa.Table], pa.Table]


class Preprocessor:
    """Builds its transform once, when the worker starts, and applies it to each unit's table."""

    def __init__(self, build: Callable[[], Transform]) -> None:
        self._transform = build()

    def __call__(self, table: pa.Table) -> pa.Table:
        return self._transform(table)
