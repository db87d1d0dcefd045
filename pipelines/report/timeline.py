"""When units were in work and were committed: throughput over time, stalls, pauses, retries.

Reads the times that commit records hold. A pause is a time in which no unit was in any engine:
between two runs of a job, while one starts, or while nothing came to the engines. A stall is a time
in which units were in work and none was committed, much longer than between others.
"""

from __future__ import annotations

import calendar
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from glm_batch.glm_actors.faults.spent import IN_ENGINE
from glm_batch.pipelines.output.parts import CommitRecord

Floats = npt.NDArray[np.float64]
Span = tuple[float, float]

MAX_BINS = 48
LEAST_GAP_S = 5.0
UNUSUAL = 8.0  # times the usual time between two commits


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Unix seconds. `edges` [bins + 1] and `rates` [bins] (rows/s) leave pauses out: see `active`.

    `known` units have times in their records, `unknown` ones have not.
    """

    known: int
    unknown: int
    retried_units: int
    start: float = 0.0
    end: float = 0.0
    active_s: float = 0.0
    rows: int = 0
    unit_s: float = 0.0
    edges: Floats = field(default_factory=lambda: np.zeros(1))
    rates: Floats = field(default_factory=lambda: np.zeros(0))
    pauses: tuple[Span, ...] = ()
    stalls: tuple[Span, ...] = ()

    @property
    def rows_per_s(self) -> float:
        """Over the time in which units were in work."""
        return self.rows / self.active_s if self.active_s > 0 else 0.0

    def active(self, moment: float) -> float:
        """Seconds of work before a moment: what an axis without pauses shows."""
        return float(_active(np.array([moment]), self.start, self.pauses)[0])


@dataclass(slots=True)
class Clock:
    """Takes what is needed of each commit record, some dozen bytes."""

    # begin in an engine, commit, rows
    times: list[tuple[float, float, int]] = field(default_factory=list)
    unknown: int = 0
    retried_units: int = 0

    def add(self, record: CommitRecord) -> None:
        self.retried_units += record.generation > 1
        if not record.at:
            self.unknown += 1
        else:
            committed = float(calendar.timegm(time.strptime(record.at, "%Y-%m-%dT%H:%M:%SZ")))
            self.times.append(
                (committed - record.spent.get(IN_ENGINE, 0.0), committed, record.rows)
            )

    def timeline(self) -> Timeline:
        if not self.times:
            return Timeline(known=0, unknown=self.unknown, retried_units=self.retried_units)
        begins, ends, rows = (
            np.array(values, np.float64) for values in zip(*sorted(self.times), strict=True)
        )
        commits = np.sort(ends)
        intervals = np.diff(commits)
        usual = float(np.median(intervals)) if len(intervals) else 0.0
        least = max(LEAST_GAP_S, UNUSUAL * usual)
        pauses = tuple(_gaps(begins, ends, least))
        start, end = float(begins.min()), float(commits[-1])
        active_s = (end - start) - sum(stop - begin for begin, stop in pauses)
        edges = np.linspace(0.0, max(active_s, 1e-3), _num_bins(len(commits)) + 1)
        spent = (_active(begins, start, pauses), _active(ends, start, pauses))
        return Timeline(
            known=len(commits),
            unknown=self.unknown,
            retried_units=self.retried_units,
            start=start,
            end=end,
            active_s=active_s,
            rows=int(rows.sum()),
            unit_s=float(np.median(ends - begins)),
            edges=edges,
            rates=_rates(*spent, rows, edges),
            pauses=pauses,
            stalls=tuple(_stalls(commits, pauses, least)),
        )


def _num_bins(num_units: int) -> int:
    return int(np.clip(num_units // 2, 1, MAX_BINS))


def _rates(begins: Floats, ends: Floats, rows: Floats, edges: Floats) -> Floats:
    """A unit's rows count evenly over its time in the engine."""
    took = np.maximum(ends - begins, 1e-9)
    done = np.array([(np.clip((edge - begins) / took, 0.0, 1.0) * rows).sum() for edge in edges])
    return np.asarray(np.diff(done) / np.diff(edges))


def _gaps(begins: Floats, ends: Floats, least: float) -> Iterable[Span]:
    """Times of at least this length in which no unit was in work; `begins` is sorted."""
    reached = np.maximum.accumulate(ends)
    for end, begin in zip(reached[:-1].tolist(), begins[1:].tolist(), strict=True):
        if begin - end >= least:
            yield end, begin


def _stalls(commits: Floats, pauses: tuple[Span, ...], least: float) -> Iterable[Span]:
    for begin, end in zip(commits[:-1].tolist(), commits[1:].tolist(), strict=True):
        paused = sum(
            min(end, stop) - max(begin, start)
            for start, stop in pauses
            if start < end and stop > begin
        )
        if end - begin - paused >= least:
            yield begin, end


def _active(moments: Floats, start: float, pauses: tuple[Span, ...]) -> Floats:
    """Seconds of work from `start` to each moment."""
    passed = moments - start
    for begin, stop in pauses:
        passed = passed - np.clip(moments - begin, 0.0, stop - begin)
    return passed
