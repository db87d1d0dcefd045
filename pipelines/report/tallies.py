"""Sums over rows that come part by part, in memory that does not grow with them: counts,
histograms, chosen rows.

What is kept depends on the rows and a fixed seed alone, never on how they are cut or when they
come. Knows nothing of tasks or pages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Floats = npt.NDArray[np.float64]

SEED = 20
UNIT_BINS = 20
MAX_VALUES = 1000
NUMBERS_SAMPLED = 10_000


@dataclass(slots=True)
class Values:
    """How often each value occurs: the first MAX_VALUES different ones by name, all further ones
    together.
    """

    counts: Counter[str] = field(default_factory=Counter)
    others: int = 0

    def add(self, values: Iterable[tuple[str, int]]) -> None:
        for value, rows in values:
            if value in self.counts or len(self.counts) < MAX_VALUES:
                self.counts[value] += rows
            else:
                self.others += rows

    @property
    def total(self) -> int:
        return self.counts.total() + self.others

    def ranked(self) -> list[tuple[str, int]]:
        """The most frequent first, equal ones by name."""
        return sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))


@dataclass(slots=True)
class UnitHistogram:
    """Values in [0, 1] in UNIT_BINS equal bins, those of right, wrong and unjudged rows apart; sums
    are exact.
    """

    bins: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((3, UNIT_BINS), np.int64))
    total: float = 0.0
    highest: float = 0.0

    def add(self, values: Floats, judged: npt.NDArray[np.int64]) -> None:
        """`judged` [rows]: 0 right, 1 wrong, 2 neither. NaN counts nowhere."""
        kept = np.isfinite(values)
        values, judged = np.clip(values[kept], 0.0, 1.0), judged[kept]
        places = np.minimum((values * UNIT_BINS).astype(np.int64), UNIT_BINS - 1)
        np.add.at(self.bins, (judged, places), 1)
        self.total += float(values.sum())
        self.highest = max(self.highest, float(values.max(initial=0.0)))

    @property
    def rows(self) -> int:
        return int(self.bins.sum())

    @property
    def mean(self) -> float:
        return self.total / self.rows if self.rows else 0.0


@dataclass(slots=True)
class IntegerCounts:
    """How often each whole number occurs; there are no more of them than tokens fit into a context."""

    counts: Counter[int] = field(default_factory=Counter)

    def add(self, values: pa.ChunkedArray) -> None:
        found, rows = np.unique(values.drop_null().to_numpy(), return_counts=True)
        self.counts.update(dict(zip(found.tolist(), rows.tolist(), strict=True)))

    @property
    def rows(self) -> int:
        return self.counts.total()

    @property
    def total(self) -> int:
        return sum(value * rows for value, rows in self.counts.items())

    def quantile(self, level: float) -> int:
        """The smallest number that at least this share of the rows does not exceed; 0 without rows."""
        seen, wanted = 0, level * self.rows
        for value in sorted(self.counts):
            seen += self.counts[value]
            if seen >= wanted:
                return value
        return 0


@dataclass(slots=True)
class NumberRange:
    """Numbers of any size: how many, their extremes and mean, and a sample for a histogram."""

    rows: int = 0
    total: float = 0.0
    low: float = float("inf")
    high: float = float("-inf")
    sample: Floats = field(default_factory=lambda: np.zeros(0))
    _keys: Floats = field(default_factory=lambda: np.zeros(0))

    def add(self, values: Floats) -> None:
        values = values[np.isfinite(values)]
        if not len(values):
            return
        keys = np.random.default_rng([self.rows, len(values)]).random(len(values))
        self.rows += len(values)
        self.total += float(values.sum())
        self.low, self.high = (
            min(self.low, float(values.min())),
            max(self.high, float(values.max())),
        )
        every, sample = np.concatenate([self._keys, keys]), np.concatenate([self.sample, values])
        kept = np.argsort(every, kind="stable")[:NUMBERS_SAMPLED]
        self._keys, self.sample = every[kept], sample[kept]

    @property
    def mean(self) -> float:
        return self.total / self.rows if self.rows else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Picked:
    """A row that was chosen: where it stands, its output columns, and for what score."""

    unit: int
    row: int
    score: float
    columns: dict[str, Any]


@dataclass(slots=True)
class Lowest:
    """The `size` rows with the lowest scores; among equal scores the first of the input."""

    size: int
    rows: list[Picked] = field(default_factory=list)

    def offer(self, unit: int, table: pa.Table, scores: Floats) -> None:
        """`scores` [rows of the table]; rows with NaN are out of question. Only rows that win are
        made Python.
        """
        worst = self.rows[-1].score if len(self.rows) == self.size else np.inf
        positions = np.flatnonzero(scores <= worst)  # false for NaN
        best = positions[np.argsort(scores[positions], kind="stable")][: self.size]
        if not len(best):
            return
        taken = table.take(pa.array(best)).to_pylist()
        found = zip(best.tolist(), scores[best].tolist(), taken, strict=True)
        self.rows += [
            Picked(unit=unit, row=row, score=score, columns=columns)
            for row, score, columns in found
        ]
        self.rows.sort(key=lambda each: (each.score, each.unit, each.row))
        del self.rows[self.size :]


def random_scores(unit: int, num_rows: int) -> Floats:
    """Scores by which `Lowest` draws a sample: each row's depend on its place alone."""
    return np.random.default_rng([SEED, unit]).random(num_rows)
