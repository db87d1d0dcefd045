"""What the answers of one task kind come to: labels, how sure they are, their lengths, whether they
are right.

One `Answers` takes an output part by part. Owns which columns mean what for each kind; scores
against gold are pipelines.evaluation's. Knows nothing of files or pages.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from glm_batch.pipelines.evaluation.reliability import NUM_BINS, Reliability, bin_numbers
from glm_batch.pipelines.evaluation.scoring import Rules, score_rows
from glm_batch.pipelines.report.tallies import (
    Floats,
    IntegerCounts,
    NumberRange,
    UnitHistogram,
    Values,
)

RIGHT, WRONG, UNJUDGED = 0, 1, 2
JUDGED = ("choose", "classify", "generate", "extract")  # kinds with one right answer
MAX_TEXT = 80  # a longer answer is counted as "a longer text"
MAX_FIELDS = 20
LONGER, NO_ANSWER = "(longer texts)", "(no answer)"
MANY_GOLDS = 200
OTHER_GOLD = "(other gold answers)"


@dataclass(slots=True)
class Gold:
    """Answers against gold. `right` counts rows, `pairs` rows by (gold, answer); bins as in
    evaluation.calibration.
    """

    rows: int = 0
    right: float = 0.0
    failed: int = 0
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)
    golds: set[str] = field(default_factory=set)
    bins: Floats = field(default_factory=lambda: np.zeros((3, NUM_BINS)))  # rows, confidence, right
    brier: float = 0.0
    brier_rows: int = 0

    @property
    def reliability(self) -> Reliability | None:
        """None where no answer has a probability."""
        rows, confidence, right = self.bins
        if not rows.sum():
            return None
        each = np.maximum(rows, 1.0)
        return Reliability(
            rows=rows.astype(np.int64), confidence=confidence / each, accuracy=right / each
        )

    def add_pairs(self, golds: Sequence[str], answers: Sequence[str | None]) -> None:
        for (gold, answer), rows in Counter(zip(golds, answers, strict=True)).items():
            if gold not in self.golds and len(self.golds) >= MANY_GOLDS:
                gold = OTHER_GOLD
            self.golds.add(gold)
            self.pairs[gold, NO_ANSWER if answer is None else answer] += rows

    def add_bins(self, confidence: Floats, right: Floats) -> None:
        kept = np.isfinite(confidence)
        numbers = bin_numbers(confidence[kept])
        for place, weights in enumerate((None, confidence[kept], right[kept])):
            self.bins[place] += np.bincount(numbers, weights, NUM_BINS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A part's rows: `right` is RIGHT, WRONG or UNJUDGED for each; `margin` and `confidence` NaN
    where unknown.
    """

    right: npt.NDArray[np.int64]
    confidence: Floats
    margin: Floats


@dataclass(slots=True)
class Answers:
    """The answers of a job's committed rows, so far."""

    kind: str
    labels: tuple[str, ...] = ()
    values: Values = field(default_factory=Values)
    fields: dict[str, Values] = field(default_factory=dict)
    finished: Values = field(default_factory=Values)
    confidence: UnitHistogram = field(default_factory=UnitHistogram)
    off_set_mass: UnitHistogram = field(default_factory=UnitHistogram)
    lengths: IntegerCounts = field(default_factory=IntegerCounts)
    numbers: NumberRange = field(default_factory=NumberRange)
    gold: Gold | None = None

    def add(self, part: pa.Table, golds: Sequence[Any] | None) -> Judged:
        """Takes a part's rows and tells how each fared."""
        ok = pc.equal(part["status"], "ok")
        confidence, margin = sureness(self.kind, part)
        right = self._judge(part, golds)
        judged = Judged(right=right, confidence=confidence, margin=margin)
        self._count(part.filter(ok))
        self.confidence.add(confidence, right)
        if "off_set_mass" in part.column_names:
            self.off_set_mass.add(to_floats(part["off_set_mass"]), right)
        return judged

    def _judge(self, part: pa.Table, golds: Sequence[Any] | None) -> npt.NDArray[np.int64]:
        result = np.full(part.num_rows, UNJUDGED, np.int64)
        if golds is None or self.kind not in JUDGED:
            return result
        places = np.flatnonzero([gold is not None for gold in golds])
        if not len(places):
            return result
        self.gold = self.gold or Gold()
        rules = Rules(kind=self.kind, labels=self._labels_of(part))
        rows = score_rows(
            rules, part.take(pa.array(places)), [golds[place] for place in places.tolist()]
        )
        accuracy = rows.values["accuracy"]
        self.gold.rows += len(places)
        self.gold.failed += int((~rows.answered).sum())
        self.gold.right += float(accuracy.sum())
        if "confidence" in rows.values:
            self.gold.add_pairs(rows.gold, rows.answers)
            self.gold.add_bins(rows.values["confidence"], accuracy)
            brier = rows.values["brier"][np.isfinite(rows.values["brier"])]
            self.gold.brier += float(brier.sum())
            self.gold.brier_rows += len(brier)
        result[places] = np.where(accuracy > 0, RIGHT, WRONG)
        return result

    def _labels_of(self, part: pa.Table) -> tuple[str, ...]:
        """The labels in the order of their probabilities; numbers where the job does not tell their
        names.
        """
        if self.labels or self.kind not in ("choose", "classify"):
            return self.labels
        scores = matrix(part["scores" if self.kind == "classify" else "label_probs"])
        return tuple(map(str, range(scores.shape[1])))

    def _count(self, answered: pa.Table) -> None:
        match self.kind:
            case "choose":
                self.values.add(_counted(answered["label"]))
            case "classify":
                self._count_classes(answered["label"])
            case "tag":
                tokens = answered["tokens"].combine_chunks().flatten()
                self.values.add(_counted(tokens.field("label")))
                self.lengths.add(pc.list_value_length(answered["tokens"]))
            case "generate":
                self._count_texts(answered)
            case "extract":
                self._count_fields(answered["json"])
            case "embed":
                self.numbers.add(np.linalg.norm(matrix(answered["vector"]), axis=1))

    def _count_classes(self, label: pa.ChunkedArray) -> None:
        if pa.types.is_floating(label.type):
            self.numbers.add(to_floats(label))
        elif pa.types.is_list(label.type):
            self.values.add(_counted(label.combine_chunks().flatten()))
            self.lengths.add(pc.list_value_length(label))
        else:
            self.values.add(_counted(label))

    def _count_texts(self, answered: pa.Table) -> None:
        text, reason = answered["text"], answered["finish_reason"]
        if pa.types.is_list(text.type):
            text, reason = text.combine_chunks().flatten(), reason.combine_chunks().flatten()
        short = pc.if_else(pc.greater(pc.utf8_length(text), MAX_TEXT), LONGER, text)
        self.values.add(_counted(short))
        self.finished.add(_counted(reason))
        self.lengths.add(answered["output_tokens"])

    def _count_fields(self, texts: pa.ChunkedArray) -> None:
        for text in texts.to_pylist():
            value = json.loads(text)
            for name, item in (
                value.items() if isinstance(value, dict) else [("(the whole value)", value)]
            ):
                if name in self.fields or len(self.fields) < MAX_FIELDS:
                    shown = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)
                    self.fields.setdefault(name, Values()).add(
                        [(shown if len(shown) <= MAX_TEXT else LONGER, 1)]
                    )


def sureness(kind: str, part: pa.Table) -> tuple[Floats, Floats]:
    """(confidence, margin) of each row, NaN where it has none.

    Confidence is the probability of the answer; the margin is how far it is ahead of the next one.
    Of several labels at once it is the distance of the nearest score from its threshold; of tags,
    the least sure token's score; of texts with log-probabilities, the geometric mean of the tokens'
    probabilities.
    """
    nothing = np.full(part.num_rows, np.nan)
    match kind:
        case "choose":
            return to_floats(part["probability"]), _lead(matrix(part["label_probs"]))
        case "classify" if pa.types.is_string(part["label"].type):
            scores = matrix(part["scores"])
            return scores.max(axis=1, initial=-np.inf) if scores.size else nothing, _lead(scores)
        case "classify" if pa.types.is_list(part["label"].type):
            scores = matrix(part["scores"])
            return nothing, np.abs(scores - 0.5).min(
                axis=1, initial=np.inf
            ) * 2 if scores.size else nothing
        case "tag":
            least = [_least(tokens) for tokens in part["tokens"].to_pylist()]
            return np.array(least, np.float64), np.array(least, np.float64)
        case "generate":
            mean = [_mean_probability(values) for values in part["logprobs"].to_pylist()]
            return np.array(mean, np.float64), np.array(mean, np.float64)
    return nothing, nothing


def matrix(column: pa.ChunkedArray) -> Floats:
    """A column of lists of equal length as [rows, length]; NaN for a null."""
    array = pa.chunked_array(column).combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    flat = array.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
    width = len(flat) // int(valid.sum()) if valid.any() else 0
    result = np.full((len(valid), width), np.nan)
    result[valid] = flat.reshape(-1, width) if width else 0.0
    return result


def to_floats(column: pa.ChunkedArray) -> Floats:
    """NaN for a null."""
    return np.asarray(column.to_numpy(), np.float64)


def label_names(
    kind: str, labels: Sequence[str] | None, facts: Mapping[str, Any]
) -> tuple[str, ...]:
    """The labels in the order of their probabilities, as far as the job and its manifest's facts
    tell them.
    """
    return tuple(labels or ()) if kind == "choose" else tuple(facts.get("label_names", ()))


def _lead(scores: Floats) -> Floats:
    """How far the highest of each row is ahead of the second."""
    if scores.shape[1] < 2:
        return np.full(len(scores), np.nan)
    top = np.sort(scores, axis=1)
    return np.asarray(top[:, -1] - top[:, -2])


def _least(tokens: list[dict[str, Any]] | None) -> float:
    return min((token["score"] for token in tokens), default=np.nan) if tokens else np.nan


def _mean_probability(values: Any) -> float:
    if not values or values[0] is None or isinstance(values[0], list):
        return np.nan
    return float(np.exp(np.mean(values)))


def _counted(values: pa.Array | pa.ChunkedArray) -> list[tuple[str, int]]:
    found = pc.value_counts(values.drop_null())
    return list(
        zip(found.field("values").to_pylist(), found.field("counts").to_pylist(), strict=True)
    )
