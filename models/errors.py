"""The three errors of glm-batch, told apart by what the reader must do.

GlmBatchError
├── ConfigError   the job, checkpoint or option is wrong: nothing has started yet, fix it and rerun
├── RowError      one row cannot be processed: it becomes that row's record, the work goes on
└── EngineError   the engine is dead: its replica must be restarted and its units retried
"""

from __future__ import annotations


class GlmBatchError(Exception):
    """Base of every error that glm-batch raises on purpose."""


class ConfigError(GlmBatchError):
    """A configuration refused before anything starts; the text names the place and the remedy."""


class RowError(GlmBatchError):
    """What is wrong with one row: a short stable `code` for machines and a `message` for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"[{self.code}] {self.message}"


class EngineError(GlmBatchError):
    """The engine cannot go on (out of memory, lost rank, broken device)."""
