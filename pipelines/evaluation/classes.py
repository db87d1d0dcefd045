"""How well answers fall into their classes: the confusion matrix and what is computed from it.

Point values are scikit-learn's. The same formulas over a stack of resampled matrices give the
intervals. A row without an answer counts as wrong: it lies in a column of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Confusion:
    """`counts` [labels, labels + 1]: rows by gold and answer; in the last column had none."""

    labels: tuple[str, ...]
    counts: Ints


def confusion(
    gold: Sequence[str], answers: Sequence[str | None], labels: Sequence[str] = ()
) -> Confusion:
    """The labels are the given ones and whatever else the gold answers hold, sorted, after them."""
    from sklearn.metrics import confusion_matrix

    every = _all_labels(gold, labels)
    codes = {label: number for number, label in enumerate(every)}
    num = len(every)
    left = [codes[label] for label in gold]
    right = [num if answer is None else codes.get(answer, num) for answer in answers]
    counts = (
        confusion_matrix(left, right, labels=range(num + 1))
        if left
        else np.zeros((num + 1, num + 1), np.int64)
    )
    return Confusion(labels=every, counts=np.asarray(counts[:num], np.int64))


def class_metrics(
    gold: Sequence[str], answers: Sequence[str | None], labels: Sequence[str] = ()
) -> dict[str, float]:
    """balanced_accuracy, macro_f1 and micro_f1 by scikit-learn; NaN without rows.

    Balanced accuracy averages over the labels that occur as gold, macro F1 over those that occur as
    gold or answer.
    """
    from sklearn.metrics import f1_score, recall_score

    if not gold:
        return dict.fromkeys(RESAMPLED, float("nan"))
    codes = {label: number for number, label in enumerate(_all_labels(gold, labels))}
    truth = [codes[label] for label in gold]
    given = [-1 if answer is None else codes.get(answer, -1) for answer in answers]
    as_gold = sorted(set(truth))
    seen = sorted(set(truth) | set(given) - {-1})
    return {
        "balanced_accuracy": float(
            recall_score(truth, given, labels=as_gold, average="macro", zero_division=0)
        ),
        "macro_f1": float(f1_score(truth, given, labels=seen, average="macro", zero_division=0)),
        "micro_f1": float(f1_score(truth, given, labels=seen, average="micro", zero_division=0)),
    }


def balanced_accuracy(counts: Ints) -> Floats:
    """[..., labels, labels + 1] -> [...]: the mean recall of the labels that have rows."""
    right, of_gold, _ = _margins(counts)
    has_rows = of_gold > 0
    return _ratio(_ratio(right, of_gold).sum(-1), has_rows.sum(-1))


def macro_f1(counts: Ints) -> Floats:
    """[..., labels, labels + 1] -> [...]: the mean F1 of labels that occur as gold or answer."""
    right, of_gold, answered = _margins(counts)
    occurring = of_gold + answered
    return _ratio(_ratio(2 * right, occurring).sum(-1), (occurring > 0).sum(-1))


def micro_f1(counts: Ints) -> Floats:
    """[..., labels, labels + 1] -> [...]: the F1 of all decisions; accuracy if all are answered."""
    right, of_gold, answered = _margins(counts)
    return _ratio(2 * right.sum(-1), of_gold.sum(-1) + answered.sum(-1))


RESAMPLED = {"balanced_accuracy": balanced_accuracy, "macro_f1": macro_f1, "micro_f1": micro_f1}


def resampled_counts(counts: Ints, num_resamples: int, rng: np.random.Generator) -> Ints:
    """[resamples, labels, labels + 1]: to draw rows with replacement is to draw from the cells."""
    total = int(counts.sum())
    draws = rng.multinomial(total, counts.ravel() / total, size=num_resamples)
    return draws.reshape(num_resamples, *counts.shape)


def _margins(counts: Ints) -> tuple[Ints, Ints, Ints]:
    """(right, gold, answered) by label, each [..., labels]."""
    return np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1), counts[..., :-1].sum(-2)


def _ratio(numerator: npt.NDArray[np.generic], denominator: npt.NDArray[np.generic]) -> Floats:
    """0 where the denominator is 0."""
    over = np.maximum(np.asarray(denominator, np.float64), np.finfo(np.float64).tiny)
    return np.asarray(np.where(denominator == 0, 0.0, numerator / over))


def _all_labels(gold: Sequence[str], labels: Sequence[str]) -> tuple[str, ...]:
    return (*labels, *sorted(set(gold) - set(labels)))
