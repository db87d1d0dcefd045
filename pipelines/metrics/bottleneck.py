"""Which stage holds a job up, told from what its units have spent, and what would make it faster.

Owns the names of the stages. Pure arithmetic on glm_actors.faults.spent's seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from glm_batch.glm_actors.faults.spent import ENGINE_BUSY, ENGINE_IDLE, MEDIA

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
