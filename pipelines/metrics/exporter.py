"""Exporter: what a run commits, as Ray's metrics, which Prometheus collects from the cluster.

Owns the metrics' names; jobs/deploy/grafana.json draws them. Imports ray inside functions only. On
a cluster that the job has started itself they go with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glm_batch.glm_actors.faults.spent import ENGINE_BUSY, ENGINE_IDLE
from glm_batch.pipelines.metrics.counts import ENGINE, STAGES, Counts

PREFIX = "glm_batch_"


@dataclass(frozen=True, slots=True)
class Metric:
    """A counter beside its `job`, with the further tags that it has."""

    name: str
    description: str
    tags: tuple[str, ...] = ()


ROWS = Metric("rows", "Rows committed, by status", ("status",))
ERRORS = Metric("errors", "Rows that failed, by error code", ("code",))
TOKENS = Metric(
    "tokens", "Tokens of committed rows: prompt, cached (part of prompt), output, media", ("kind",)
)
STAGE_SECONDS = Metric(
    "stage_seconds", "Seconds of workers spent on committed rows, by stage", ("stage",)
)
ENGINE_SECONDS = Metric("engine_seconds", "Seconds of engines, busy or starved of rows", ("state",))
RECOMPUTED = Metric(
    "recomputed_rows", "Rows that were in work when their process died, and were worked on again"
)
METRICS = (ROWS, ERRORS, TOKENS, STAGE_SECONDS, ENGINE_SECONDS, RECOMPUTED)


class Exporter:
    """Counts a job's committed units. Ray must be running."""

    def __init__(self, job: str) -> None:
        """`job` is its fingerprint: what the metrics are told apart by."""
        self._job = job
        self._counters: dict[str, Any] = {}

    def count(self, counts: Counts, spent: Mapping[str, float]) -> None:
        """Adds a unit."""
        for status, rows in (
            ("ok", counts.ok),
            ("filtered", counts.filtered),
            ("error", counts.error_rows),
        ):
            self.add(ROWS, rows, status)
        for code, rows in counts.errors.items():
            self.add(ERRORS, rows, code)
        for kind in ("prompt", "cached", "output", "media"):
            self.add(TOKENS, getattr(counts, f"{kind}_tokens"), kind)
        for stage in STAGES:
            if stage != ENGINE:
                self.add(STAGE_SECONDS, spent.get(stage, 0.0), stage)
        self.add(ENGINE_SECONDS, spent.get(ENGINE_BUSY, 0.0), "busy")
        self.add(ENGINE_SECONDS, spent.get(ENGINE_IDLE, 0.0), "starved")

    def add(self, metric: Metric, value: float, *tags: str) -> None:
        """Adds to one series; what is nothing makes none."""
        from ray.util.metrics import Counter

        if value <= 0:
            return
        if metric.name not in self._counters:
            keys = ("job", *metric.tags)
            self._counters[metric.name] = Counter(
                PREFIX + metric.name, metric.description, tag_keys=keys
            )
        self._counters[metric.name].inc(
            value, dict(zip(("job", *metric.tags), (self._job, *tags), strict=True))
        )
