"""Counts of finished work: of a unit, a run in progress, a job; and which stage holds it up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from glm_batch.glm_actors.faults.spent import ENGINE_BUSY, ENGINE_IDLE, MEDIA

Phase = Literal["planning", "starting", "running", "done"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Sums over committed rows: `errors` by error code, tokens of all rows."""

    rows: int = 0
    ok: int = 0
    filtered: int = 0
    errors: Mapping[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    media_tokens: int = 0
    gold_rows: int = 0
    gold_correct: int = 0

    def __add__(self, other: Counts) -> Counts:
        sums = {name: getattr(self, name) + getattr(other, name) for name in _INTEGERS}
        return Counts(errors=dict(Counter(self.errors) + Counter(other.errors)), **sums)

    def __sub__(self, other: Counts) -> Counts:
        """What is left without rows that are part of these."""
        sums = {name: getattr(self, name) - getattr(other, name) for name in _INTEGERS}
        return Counts(errors=dict(Counter(self.errors) - Counter(other.errors)), **sums)

    @property
    def error_rows(self) -> int:
        return sum(self.errors.values())

    @property
    def error_rate(self) -> float:
        """Failed rows as a fraction of all rows counted; 0 when there are none."""
        return self.error_rows / self.rows if self.rows else 0.0

    @property
    def cached_share(self) -> float:
        """The fraction of prompt tokens that came from the prefix cache."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def accuracy(self) -> float | None:
        """The fraction of rows with a gold answer that are right; None without gold."""
        return self.gold_correct / self.gold_rows if self.gold_rows else None

    def to_json(self) -> dict[str, Any]:
        return {"errors": dict(self.errors)} | {name: getattr(self, name) for name in _INTEGERS}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Counts:
        return cls(errors=dict(data["errors"]), **{name: data[name] for name in _INTEGERS})


_INTEGERS = (
    "rows",
    "ok",
    "filtered",
    "prompt_tokens",
    "cached_tokens",
    "output_tokens",
    "media_tokens",
    "gold_rows",
    "gold_correct",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A moment of a run: `counts` of all that is committed, `resumed` of what was before.

    `spent` says what this run's units have taken of its workers' seconds: see
    pipelines.metrics.counts. `elapsed_s` counts from the start of this run, `working_s` from
    the moment when the engine was up and got its first unit; it is 0 until that unit is committed.
    """

    phase: Phase
    units_total: int = 0
    units_done: int = 0
    rows_total: int = 0
    counts: Counts = field(default_factory=Counts)
    resumed: Counts = field(default_factory=Counts)
    spent: Mapping[str, float] = field(default_factory=dict)
    elapsed_s: float = 0.0
    working_s: float = 0.0

    @property
    def rows_per_s(self) -> float:
        """Rows that this run committed, per second of working time."""
        return (
            (self.counts.rows - self.resumed.rows) / self.working_s if self.working_s > 0 else 0.0
        )

    @property
    def eta_s(self) -> float | None:
        """Seconds until the last row at the present rate; None before the first row."""
        return (
            (self.rows_total - self.counts.rows) / self.rows_per_s if self.rows_per_s > 0 else None
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a finished run came to. `notes` are sentences to stand below the numbers."""

    output: str
    counts: Counts
    resumed_rows: int
    elapsed_s: float
    working_s: float
    spent: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


READING, PREPARING, PARSING, COMMITTING = "reading", "preparing", "parsing", "committing"
ENGINE = "engine"
BEFORE_ENGINE, AFTER_ENGINE = (READING, MEDIA, PREPARING), (PARSING, COMMITTING)
STAGES = (*BEFORE_ENGINE, ENGINE, *AFTER_ENGINE)
BUSY_SHARE = 0.9  # of an engine that has all it needs
REMEDIES = {
    READING: "move the input nearer (reading is waiting for files), or raise preprocess.workers",
    MEDIA: "raise preprocess.workers, or let images and videos be smaller "
    "(preprocess.max_pixels, preprocess.fps)",
    PREPARING: "raise preprocess.workers: prompts are rendered and tokenized there",
    ENGINE: "as it should be; more engine.replicas, shorter prompts or fewer output tokens make "
    "it faster",
    PARSING: "let units be larger (commit.unit_rows), or give the cluster more CPUs",
    COMMITTING: "let units be larger (commit.unit_rows), or write to a nearer place",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bottleneck:
    """`engine_share` is how much of its time the engine was busy; `shares` are the other stages'
    worker seconds over all of theirs."""

    stage: str
    engine_share: float
    shares: Mapping[str, float]

    @property
    def remedy(self) -> str:
        return REMEDIES[self.stage]


def bottleneck(spent: Mapping[str, float]) -> Bottleneck | None:
    """What the sums of some units' seconds tell; None where nothing was timed.

    An engine that has rows nearly all the time is the bottleneck itself. Else it is the stage whose
    workers spent most.
    """
    busy, idle = spent.get(ENGINE_BUSY, 0.0), spent.get(ENGINE_IDLE, 0.0)
    if busy + idle <= 0:
        return None
    others = {stage: spent.get(stage, 0.0) for stage in STAGES if stage != ENGINE}
    total = sum(others.values())
    engine_share = busy / (busy + idle)
    slowest = max(others, key=others.__getitem__)
    return Bottleneck(
        stage=ENGINE if engine_share >= BUSY_SHARE or not total else slowest,
        engine_share=engine_share,
        shares={stage: seconds / total if total else 0.0 for stage, seconds in others.items()},
    )


def summed(units: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """All units' seconds by what they went into."""
    total: Counter[str] = Counter()
    for spent in units:
        total.update(spent)
    return dict(total)
