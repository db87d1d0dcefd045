"""`glm-batch status`: how far an output is, read from its plan and commit records alone. Starts no Ray."""

from __future__ import annotations

from rich.console import Console

from jobs.display import status_table
from pipelines.commit import Output


def status(path: str) -> None:
    """Prints the state of an output. Raises ConfigError when no job has begun there."""
    Console(highlight=False).print(status_table(Output.at(path).status(), path))
