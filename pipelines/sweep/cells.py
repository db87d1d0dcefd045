"""A sweep as data: its cells, each a job with coordinates in the grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from glm_batch.pipelines.evaluation.intervals import CONFIDENCE
from glm_batch.pipelines.evaluation.scoring import Match, Rules
from glm_batch.pipelines.job import EngineSection, Job, StorageSection

AXES = ("model", "dataset", "task", "prompt", "sampling", "seed", "max_pixels")
BEST = "best"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSection:
    """How answers are compared with gold. For generate alone."""

    match: Match = "exact"  # which comparison is the accuracy
    extract: str | None = None  # a regular expression for the part to compare
    tolerance: float = 1e-6  # of numeric, relative
    # the k of pass@k; by default 1, 2, 4 ... up to sampling.n
    pass_at: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One job. `coordinates` hold its value on each of AXES; `name` is its folder, and unique."""

    name: str
    coordinates: Mapping[str, str]
    job: Job
    score: ScoreSection = field(default_factory=ScoreSection)

    @property
    def dataset(self) -> str:
        return self.coordinates["dataset"]

    @property
    def replicas(self) -> tuple[str, EngineSection]:
        """Cells in which this is equal share their engines."""
        return self.job.model, self.job.engine

    @property
    def question(self) -> tuple[str, str, str]:
        """Cells in which this is equal answer the same rows with the same gold."""
        return self.dataset, self.coordinates["task"], self.job.task.gold or ""

    def rules(self, facts: Mapping[str, Any]) -> Rules:
        """How its answers are scored; `facts` are those of its manifest."""
        task, end = self.job.task, 1 if facts.get("end_counted") else 0
        return Rules(
            kind=task.kind,
            labels=tuple(task.labels or facts.get("label_names", ())),
            label_tokens=tuple(len(ids) + end for ids in facts.get("label_token_ids", ())),
            match=self.score.match,
            extract=self.score.extract,
            tolerance=self.score.tolerance,
            pass_at=tuple(self.score.pass_at),
        )


def tokens_per_row(tokens: Mapping[str, int], rows: int) -> float:
    """Read and written; `rows` are all of the cell, failed ones and those without gold too."""
    return (tokens["prompt"] + tokens["output"]) / rows if rows else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """All cells in the grid's order. `baseline` names coordinates to compare with, or is BEST."""

    output: str
    cells: Sequence[Cell]
    storage: StorageSection = field(default_factory=StorageSection)
    baseline: Mapping[str, str] | str = BEST
    confidence: float = CONFIDENCE
    max_error_rate: float = 0.0
