"""From a model's numbers to what people read: probabilities of labels and scores of classes.

One place for these formulas, whoever answers: a job's rows, a request, or Python. Knows nothing of engines or columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.errors import RowError

MULTI_LABEL_THRESHOLD = 0.5  # a class is given when its score is above


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelScores:
    """`best` is the number of the likeliest label, `off_set_mass` what the model gives to none of them."""

    best: int
    probabilities: list[float]
    off_set_mass: float


def label_scores(logprobs: Sequence[float]) -> LabelScores:
    """Softmax over the labels' joint log-probabilities, and 1 - the sum of what these stand for.

    Raises RowError not_finite for what are no logarithms of probabilities.
    """
    highest = max(logprobs)
    if not all(value <= 0.0 or math.isclose(value, 0.0, abs_tol=1e-4) for value in logprobs) or highest == -math.inf:
        raise RowError("not_finite", f"the model's label log-probabilities are {list(logprobs)}")
    weights = [math.exp(value - highest) for value in logprobs]
    total = sum(weights)
    return LabelScores(
        best=logprobs.index(highest),
        probabilities=[weight / total for weight in weights],
        off_set_mass=1.0 - math.exp(highest) * total,
    )


def class_scores(logits: NDArray[np.float64], names: Sequence[str], problem_type: str) -> tuple[list[float], Any]:
    """(scores, label) of a classification head's logits [num_labels], as the checkpoint's problem_type has them.

    The label is a number (regression), a name, or a list of names (several labels at once).
    """
    match problem_type:
        case "regression":
            return logits.tolist(), float(logits[0])
        case "multi_label_classification":
            scores = 1.0 / (1.0 + np.exp(-logits))
            return scores.tolist(), [
                name for name, score in zip(names, scores, strict=True) if score > MULTI_LABEL_THRESHOLD
            ]
        case _:
            scores = softmax(logits)
            return scores.tolist(), names[int(scores.argmax())]


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the last axis."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))
