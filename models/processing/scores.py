"""From a model's numbers to what people read: probabilities of labels and scores of classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm_batch.models.errors import RowError

MULTI_LABEL_THRESHOLD = 0.5  # a class is given when its score is above


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelScores:
    """`best` is the likeliest label's number, `off_set_mass` what goes to none of them."""

    best: int
    probabilities: list[float]
    off_set_mass: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """What makes a model's probabilities mean what they say: softmax(log p / temperature + bias).

    `bias` has a number for each label in their order, or none at all. A temperature alone leaves
    every answer as it is. Temperature scaling: Guo et al. 2017; with a bias for each label:
    Alexandari et al. 2020.
    """

    temperature: float = 1.0
    bias: tuple[float, ...] = ()

    def logits(self, logprobs: NDArray[np.float64]) -> NDArray[np.float64]:
        """[..., labels] -> the same; -inf stays -inf."""
        return logprobs / self.temperature + (np.array(self.bias, np.float64) if self.bias else 0.0)

    def scores(self, logprobs: NDArray[np.float64]) -> tuple[list[float], int]:
        """(probabilities, the best label's number) of one row's [labels].

        The best has the highest probability; where several have, that to which the model itself
        gives more, and then the first of them.
        """
        scaled = self.logits(logprobs)
        best = max(range(len(scaled)), key=lambda label: (scaled[label], logprobs[label], -label))
        return softmax(scaled).tolist(), best


def label_scores(logprobs: Sequence[float], scaling: Scaling | None = None) -> LabelScores:
    """Softmax over the labels' joint log-probabilities, and 1 - the sum of what these stand for.

    With `scaling` probabilities and best label are calibrated; off_set_mass is the model's own all
    the same. Raises RowError not_finite for what are no logarithms of probabilities.
    """
    highest = max(logprobs)
    if (
        not all(value <= 0.0 or math.isclose(value, 0.0, abs_tol=1e-4) for value in logprobs)
        or highest == -math.inf
    ):
        raise RowError("not_finite", f"the model's label log-probabilities are {list(logprobs)}")
    weights = [math.exp(value - highest) for value in logprobs]
    total = sum(weights)
    probabilities, best = [weight / total for weight in weights], logprobs.index(highest)
    if scaling is not None:
        probabilities, best = scaling.scores(np.array(logprobs, np.float64))
    return LabelScores(
        best=best, probabilities=probabilities, off_set_mass=1.0 - math.exp(highest) * total
    )


def class_scores(
    logits: NDArray[np.float64],
    names: Sequence[str],
    problem_type: str,
    scaling: Scaling | None = None,
) -> tuple[list[float], Any]:
    """(scores, label) of a head's logits [num_labels], as the problem_type has them.

    The label is a number (regression), a name, or a list of names (several labels at once).
    `scaling` is for one label of several alone.
    """
    match problem_type:
        case "regression":
            return logits.tolist(), float(logits[0])
        case "multi_label_classification":
            scores = 1.0 / (1.0 + np.exp(-logits))
            return scores.tolist(), [
                name
                for name, score in zip(names, scores, strict=True)
                if score > MULTI_LABEL_THRESHOLD
            ]
        case _ if scaling is not None:
            calibrated, best = scaling.scores(logits)
            return calibrated, names[best]
        case _:
            scores = softmax(logits)
            return scores.tolist(), names[int(scores.argmax())]


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the last axis."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))
