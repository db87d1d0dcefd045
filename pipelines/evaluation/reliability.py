"""Whether probabilities mean what they say: reliability bins, calibration error, Brier score.

Over rows that were answered: a row that failed has no probability.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NUM_BINS = 15

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reliability:
    """Equal bins of (0, 1] by confidence: rows, mean confidence, accuracy (0 in an empty bin)."""

    rows: npt.NDArray[np.int64]
    confidence: Floats
    accuracy: Floats

    @property
    def ece(self) -> float:
        """Expected calibration error: gaps between confidence and accuracy, by rows of each bin."""
        return float(
            expected_calibration_error(
                self.rows, self.rows * self.confidence, self.rows * self.accuracy
            )
        )


def bin_numbers(confidence: Floats, num_bins: int = NUM_BINS) -> npt.NDArray[np.int64]:
    """Bin i holds (i / num_bins, (i + 1) / num_bins], and the first one 0 too."""
    return np.clip(np.ceil(confidence * num_bins).astype(np.int64) - 1, 0, num_bins - 1)


def reliability(confidence: Floats, right: Floats, num_bins: int = NUM_BINS) -> Reliability:
    """`confidence` in [0, 1] and `right` 0 or 1, both [rows]."""
    bins = bin_numbers(confidence, num_bins)
    rows = np.bincount(bins, minlength=num_bins)
    each = np.maximum(rows, 1)
    return Reliability(
        rows=rows,
        confidence=np.bincount(bins, confidence, num_bins) / each,
        accuracy=np.bincount(bins, right, num_bins) / each,
    )


def expected_calibration_error(
    rows: npt.NDArray[np.generic], confidence: Floats, right: Floats
) -> Floats:
    """[..., bins] -> [...]: rows, sums of confidence and of right answers (Guo et al. 2017)."""
    return np.asarray(
        np.abs(confidence - right).sum(-1)
        / np.maximum(np.asarray(rows, np.float64).sum(-1), 1e-300)
    )


def brier(probabilities: Floats, gold: npt.NDArray[np.int64]) -> Floats:
    """Squared distances of [rows, labels] from the gold label's 1, for each row, in [0, 2].

    `gold` [rows] is the gold label's number, -1 for a label outside of the set.
    """
    truth = np.zeros_like(probabilities)
    known = np.flatnonzero(gold >= 0)
    truth[known, gold[known]] = 1.0
    # A gold label outside of the set adds the square of its probability, 0, from 1.
    return np.asarray(((probabilities - truth) ** 2).sum(-1) + (gold < 0))
