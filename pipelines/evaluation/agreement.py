"""Whether answers agree with gold answers: one by one, by class, and with their probabilities."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from glm_batch.pipelines.input.values import same_json

ARTICLES = frozenset({"a", "an", "the"})
NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d+)?")


def exact_match(answer: str, gold: str) -> bool:
    """Equal but for white space around them."""
    return answer.strip() == gold.strip()


def normalised_match(answer: str, gold: str) -> bool:
    return normalised(answer) == normalised(gold)


def normalised(text: str) -> str:
    """Without case, punctuation, symbols, articles and repeated white space, as in SQuAD."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(char for char in folded if unicodedata.category(char)[0] not in "PS")
    return " ".join(word for word in kept.split() if word not in ARTICLES)


def numeric_match(answer: str, gold: str, tolerance: float = 1e-6) -> bool:
    """Whether the last numbers are equal within `tolerance` of the gold's size; none is unequal."""
    left, right = last_number(answer), last_number(gold)
    return (
        left is not None
        and right is not None
        and math.isclose(left, right, rel_tol=tolerance, abs_tol=1e-12)
    )


def last_number(text: str) -> float | None:
    """The last decimal number in a text; "1,234.5" has a thousands separator."""
    found = [match for match in NUMBER.findall(text) if match]
    return float(found[-1].replace(",", "")) if found else None


def extracted(pattern: re.Pattern[str], text: str) -> str | None:
    """The last match: its first group if there is one. None where it matches nowhere."""
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    found = matches[-1].group(1 if pattern.groups else 0)
    return None if found is None else str(found)


def json_value(text: str | None) -> tuple[bool, Any]:
    """(whether it is JSON, the value)."""
    try:
        return (False, None) if text is None else (True, json.loads(text))
    except (ValueError, RecursionError):
        return False, None


def json_fields(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a JSON value by dotted names, objects opened up; a value of its own has ""."""
    if not isinstance(value, dict) or not value:
        yield prefix, value
        return
    for name, inner in value.items():
        yield from json_fields(inner, f"{prefix}.{name}" if prefix else str(name))


def field_matches(answer: Any, gold: Any) -> dict[str, bool]:
    """For each field of the gold value whether the answer has an equal one; true is not 1."""
    found = dict(json_fields(answer))
    return {
        name: name in found and same_json(found[name], value) for name, value in json_fields(gold)
    }


def majority(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer, the earliest of those that tie; None is no vote."""
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=votes.__getitem__) if votes else None


def pass_at(k: int, num_samples: int, num_right: int) -> float:
    """The chance that k samples hold a right one (Chen et al. 2021, equation 1)."""
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples")
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


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


NUM_BINS = 15


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
