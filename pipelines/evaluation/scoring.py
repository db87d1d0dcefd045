"""A finished job's rows and gold answers become row scores, and these metrics with intervals.

Rows without a gold answer count nowhere. A row that failed is wrong: its `accuracy` is 0, and so is
every other score that says whether an answer is right. What only an answer has (a probability, a
log-likelihood) is NaN for it. Owns which metrics a task kind has; the formulas stand in the modules
beside this one.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from glm_batch.pipelines.evaluation import agreement
from glm_batch.pipelines.evaluation.agreement import (
    NUM_BINS,
    Reliability,
    bin_numbers,
    brier,
    exact_match,
    expected_calibration_error,
    extracted,
    field_matches,
    json_fields,
    json_value,
    last_number,
    majority,
    normalised,
    normalised_match,
    numeric_match,
    pass_at,
    reliability,
)
from glm_batch.pipelines.evaluation.intervals import (
    CONFIDENCE,
    Estimate,
    bca,
    mean_estimate,
    num_resamples,
    resample,
)
from glm_batch.pipelines.input.values import json_or_text, same_json

Match = Literal["exact", "normalised", "numeric"]
Floats = npt.NDArray[np.float64]
QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How answers are read. `labels` of choose or classify stand in the order of probabilities.

    `label_tokens` counts the tokens of each label that were scored. `match` says which comparison
    of texts is the accuracy; before it, `extract` takes a part of the text.
    """

    kind: str
    labels: tuple[str, ...] = ()
    label_tokens: tuple[int, ...] = ()
    match: Match = "exact"
    extract: str | None = None
    tolerance: float = 1e-6
    pass_at: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RowScores:
    """Scores of the rows that have a gold answer, in the order of the input.

    `values` are [rows] each, NaN where a row has none; `texts` are the golds and answers as they
    were compared.
    """

    keys: list[str]
    gold: list[str]
    answers: list[str | None]
    answered: npt.NDArray[np.bool_]
    values: dict[str, Floats]

    def to_table(self) -> pa.Table:
        """One row for each, to be kept beside the results."""
        own = {
            "row_key": pa.array(self.keys, pa.string()),
            "answered": pa.array(self.answered),
            "gold": pa.array(self.gold, pa.string()),
            "answer": pa.array(self.answers, pa.string()),
        }
        return pa.table(
            own | {name: pa.array(values, from_pandas=True) for name, values in self.values.items()}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What the rows with a gold answer come to; `errors` counts those that failed by code."""

    rows: int
    without_gold: int
    errors: dict[str, int]
    metrics: dict[str, Estimate]
    confusion: agreement.Confusion | None = None
    reliability: Reliability | None = None
    quantiles: dict[str, float] = field(default_factory=dict)


def score(
    rules: Rules, table: pa.Table, golds: Sequence[Any], confidence: float = CONFIDENCE
) -> tuple[RowScores, Score]:
    """`table` holds the job's output columns, `golds` each row's gold answer or None."""
    has_gold = np.array([gold is not None for gold in golds], bool)
    kept = table.filter(pa.array(has_gold))
    rows = score_rows(rules, kept, [gold for gold in golds if gold is not None])
    codes = Counter(code for code in kept["error_code"].to_pylist() if code is not None)
    codes.update("filtered" for status in kept["status"].to_pylist() if status == "filtered")
    return rows, replace(
        summarised(rules, rows, confidence),
        without_gold=int((~has_gold).sum()),
        errors=dict(sorted(codes.items())),
    )


def score_rows(rules: Rules, table: pa.Table, golds: Sequence[Any]) -> RowScores:
    """Every row of the table has a gold answer here."""
    scorer = {"choose": _choices, "classify": _classes, "generate": _texts, "extract": _objects}[
        rules.kind
    ]
    answered = np.array([status == "ok" for status in table["status"].to_pylist()], bool)
    gold, answers, values = scorer(rules, table, golds, answered)
    return RowScores(
        keys=table["row_key"].to_pylist(),
        gold=gold,
        answers=answers,
        answered=answered,
        values=values,
    )


def summarised(rules: Rules, rows: RowScores, confidence: float = CONFIDENCE) -> Score:
    """The metrics of the rows, each with random numbers of its own: none depends on others."""
    metrics = {
        name: mean_estimate(values, _random(name), confidence)
        for name, values in rows.values.items()
        if name not in NOT_AVERAGED
    }
    result = Score(rows=len(rows.keys), without_gold=0, errors={}, metrics=metrics)
    if not rows.keys:
        return result
    if rules.kind in ("choose", "classify") and "confidence" in rows.values:
        table = agreement.confusion(rows.gold, rows.answers, rules.labels)
        metrics |= _class_estimates(rows, table, confidence)
        metrics |= _calibration_estimates(rows, confidence)
        result = replace(result, confusion=table, reliability=_reliability(rows))
    if "gold_log_likelihood" in rows.values and "gold_tokens" in rows.values:
        metrics |= _token_estimates(rows, confidence)
    return replace(result, quantiles=_quantiles(rows))


NOT_AVERAGED = ("confidence", "off_set_mass", "gold_tokens")

Scored = tuple[list[str], list[str | None], dict[str, Floats]]


def _choices(
    rules: Rules, table: pa.Table, golds: Sequence[Any], answered: npt.NDArray[np.bool_]
) -> Scored:
    gold = [str(each) for each in golds]
    answers = table["label"].to_pylist()
    values = {"accuracy": _zeros_or([a == g for a, g in zip(answers, gold, strict=True)], answered)}
    probabilities = _matrix(table, "label_probs", len(rules.labels))
    values |= _probability_scores(rules, gold, probabilities)
    values["off_set_mass"] = _column(table, "off_set_mass")
    if "label_logprobs" in table.column_names:
        values |= _likelihood_scores(
            rules, gold, _matrix(table, "label_logprobs", len(rules.labels)), answered
        )
    return gold, answers, values


def _classes(
    rules: Rules, table: pa.Table, golds: Sequence[Any], answered: npt.NDArray[np.bool_]
) -> Scored:
    if pa.types.is_list(table["label"].type):
        return _label_sets(table, golds, answered)
    gold = [str(each) for each in golds]
    answers = table["label"].to_pylist()
    values = {"accuracy": _zeros_or([a == g for a, g in zip(answers, gold, strict=True)], answered)}
    values |= _probability_scores(rules, gold, _matrix(table, "scores", len(rules.labels)))
    return gold, answers, values


def _label_sets(table: pa.Table, golds: Sequence[Any], answered: npt.NDArray[np.bool_]) -> Scored:
    """Several labels a row: right where the sets are equal; `sample_f1` is a row's own F1."""
    sets = [
        {str(label) for label in (gold if isinstance(gold, list | tuple) else [gold])}
        for gold in golds
    ]
    given = [None if label is None else set(label) for label in table["label"].to_pylist()]
    pairs = list(zip(given, sets, strict=True))
    values = {
        "accuracy": _zeros_or([a == g for a, g in pairs], answered),
        "sample_f1": _zeros_or([_set_f1(a or set(), g) for a, g in pairs], answered),
    }
    texts = [
        None if labels is None else json.dumps(sorted(labels), ensure_ascii=False)
        for labels in given
    ]
    return [json.dumps(sorted(labels), ensure_ascii=False) for labels in sets], texts, values


def _texts(
    rules: Rules, table: pa.Table, golds: Sequence[Any], answered: npt.NDArray[np.bool_]
) -> Scored:
    gold = [str(each) for each in golds]
    samples = [each if isinstance(each, list) else [each] for each in table["text"].to_pylist()]
    if rules.extract is not None:
        pattern = re.compile(rules.extract)
        samples = [
            [None if text is None else extracted(pattern, text) for text in texts]
            for texts in samples
        ]
    values: dict[str, Floats] = {}
    compared = {name: compare for name, compare in _comparisons(rules).items() if name != "numeric"}
    if rules.match == "numeric" or any(last_number(each) is not None for each in gold):
        compared = _comparisons(rules)
    rights = {name: _right_samples(compare, samples, gold) for name, compare in compared.items()}
    values["accuracy"] = _zeros_or([_share(right) for right in rights[rules.match]], answered)
    values |= {
        name: _zeros_or([_share(right) for right in each], answered)
        for name, each in rights.items()
    }
    if rules.extract is not None:
        values["extracted"] = _zeros_or(
            [_share([t is not None for t in texts]) for texts in samples], answered
        )
    num_samples = max((len(texts) for texts in samples), default=1)
    if num_samples > 1:
        values |= _sample_scores(rules, samples, gold, rights[rules.match], answered, num_samples)
    if "gold_logprob" in table.column_names:
        values |= {"gold_log_likelihood": _column(table, "gold_logprob")}
        values |= {"gold_tokens": _column(table, "gold_num_tokens")}
    return gold, [texts[0] for texts in samples], values


def _objects(
    rules: Rules, table: pa.Table, golds: Sequence[Any], answered: npt.NDArray[np.bool_]
) -> Scored:
    """JSON: right where the whole is equal; `field_accuracy` is the share of the gold's fields."""
    wanted = [json_or_text(gold) for gold in golds]
    texts = table["json"].to_pylist()
    found = [json_value(text) for text in texts]
    fields = [
        field_matches(value, gold) if ok else {}
        for (ok, value), gold in zip(found, wanted, strict=True)
    ]
    equal = [ok and same_json(value, gold) for (ok, value), gold in zip(found, wanted, strict=True)]
    values = {
        "accuracy": _zeros_or(equal, answered),
        "field_accuracy": _zeros_or([_share(list(each.values())) for each in fields], answered),
    }
    every = [{name for name, _ in json_fields(gold) if name} for gold in wanted]
    for name in sorted(set().union(*every)):
        right = np.array([float(each.get(name, False)) for each in fields])
        values[f"field.{name}"] = np.where(
            [name in names for names in every], np.where(answered, right, 0.0), np.nan
        )
    return [json.dumps(gold, sort_keys=True, ensure_ascii=False) for gold in wanted], texts, values


def _probability_scores(rules: Rules, gold: list[str], probabilities: Floats) -> dict[str, Floats]:
    """Brier score and confidence, NaN for rows without probabilities."""
    codes = np.array(
        [rules.labels.index(each) if each in rules.labels else -1 for each in gold], np.int64
    )
    return {
        "brier": brier(probabilities, codes),
        "confidence": probabilities.max(axis=-1, initial=-np.inf),
    }


def _likelihood_scores(
    rules: Rules, gold: list[str], logprobs: Floats, answered: npt.NDArray[np.bool_]
) -> dict[str, Floats]:
    """Of the joint log-probability (nats) of each label: the gold one's, and a long label's chance.

    `accuracy_norm` takes the label with the highest log-probability for each of its characters.
    """
    lengths = np.array([max(len(label), 1) for label in rules.labels], np.float64)
    best = np.where(np.isnan(logprobs), -np.inf, logprobs / lengths).argmax(axis=-1)
    codes = np.array(
        [rules.labels.index(each) if each in rules.labels else -1 for each in gold], np.int64
    )
    of_gold = np.where(codes >= 0, logprobs[np.arange(len(gold)), codes], np.nan)
    values = {
        "accuracy_norm": _zeros_or(list(best == codes), answered),
        "gold_log_likelihood": of_gold,
    }
    if rules.label_tokens:
        counts = np.array(rules.label_tokens, np.float64)[codes]
        values["gold_tokens"] = np.where(np.isnan(of_gold), np.nan, counts)
    return values


def _comparisons(rules: Rules) -> dict[str, Callable[[str, str], bool]]:
    return {
        "exact": exact_match,
        "normalised": normalised_match,
        "numeric": partial(numeric_match, tolerance=rules.tolerance),
    }


def _right_samples(
    compare: Callable[[str, str], bool], samples: list[list[str | None]], gold: list[str]
) -> list[list[bool]]:
    return [
        [t is not None and compare(t, g) for t in texts]
        for texts, g in zip(samples, gold, strict=True)
    ]


def _sample_scores(
    rules: Rules,
    samples: list[list[str | None]],
    gold: list[str],
    right: list[list[bool]],
    answered: npt.NDArray[np.bool_],
    num_samples: int,
) -> dict[str, Floats]:
    """Majority vote and pass@k over the samples of each row."""
    compare = _comparisons(rules)[rules.match]
    votes = []
    for texts, wanted in zip(samples, gold, strict=True):
        first = {normalised(text): text for text in reversed(texts) if text is not None}
        vote = majority([None if text is None else normalised(text) for text in texts])
        votes.append(vote is not None and compare(first[vote], wanted))
    values = {"majority": _zeros_or(votes, answered)}
    for k in rules.pass_at or [
        2**power for power in range(num_samples.bit_length()) if 2**power <= num_samples
    ]:
        rates = [
            pass_at(k, num_samples, sum(each)) if len(each) == num_samples else 0.0
            for each in right
        ]
        values[f"pass@{k}"] = _zeros_or(rates, answered)
    return values


def _class_estimates(
    rows: RowScores, table: agreement.Confusion, confidence: float
) -> dict[str, Estimate]:
    points = agreement.class_metrics(rows.gold, rows.answers, table.labels)
    counts = agreement.resampled_counts(table.counts, num_resamples(1), _random("confusion"))
    found = {}
    for name, formula in agreement.RESAMPLED.items():
        low, high = bca(formula(counts), points[name], confidence=confidence)
        found[name] = Estimate(value=points[name], low=low, high=high, rows=len(rows.keys))
    return found


def _calibration_estimates(rows: RowScores, confidence: float) -> dict[str, Estimate]:
    sure, right = _answered(rows, "confidence"), _answered(rows, "accuracy")
    if not len(sure):
        return {"ece": Estimate(value=math.nan, low=math.nan, high=math.nan, rows=0)}
    in_bin = np.eye(NUM_BINS)[bin_numbers(sure)]  # [rows, bins]
    stacked = np.concatenate([in_bin, in_bin * sure[:, None], in_bin * right[:, None]], axis=1)

    def ece(weights: Floats) -> Floats:
        return expected_calibration_error(*np.split(weights @ stacked, 3, axis=-1))

    value = reliability(sure, right).ece
    low, high = bca(resample(ece, len(sure), _random("ece")), value, confidence=confidence)
    return {"ece": Estimate(value=value, low=low, high=high, rows=len(sure))}


def _reliability(rows: RowScores) -> Reliability:
    return reliability(_answered(rows, "confidence"), _answered(rows, "accuracy"))


def _answered(rows: RowScores, name: str) -> Floats:
    """A score of the rows that have a confidence."""
    return rows.values[name][np.isfinite(rows.values["confidence"])]


def _token_estimates(rows: RowScores, confidence: float) -> dict[str, Estimate]:
    """A gold token's mean log-likelihood (nats), and perplexity: exp of what it is below zero."""
    both = np.stack([rows.values["gold_log_likelihood"], rows.values["gold_tokens"]], axis=1)
    both = both[np.isfinite(both).all(axis=1)]
    return {
        "gold_token_log_likelihood": _of_tokens(both, _token_mean, "gold_token", confidence),
        "gold_perplexity": _of_tokens(both, _token_perplexity, "perplexity", confidence),
    }


def _of_tokens(
    both: Floats, formula: Callable[[Floats], Floats], random: str, confidence: float
) -> Estimate:
    """`formula` takes sums over rows of `both` [rows, 2], log-likelihood and tokens."""
    if not len(both):
        return Estimate(value=math.nan, low=math.nan, high=math.nan, rows=0)
    value = float(formula(both.sum(axis=0)))
    drawn = resample(lambda weights: formula(weights @ both), len(both), _random(random))
    low, high = bca(drawn, value, confidence=confidence)
    return Estimate(value=value, low=low, high=high, rows=len(both))


def _token_mean(sums: Floats) -> Floats:
    return np.asarray(sums[..., 0] / sums[..., 1])


def _token_perplexity(sums: Floats) -> Floats:
    return np.asarray(np.exp(-_token_mean(sums)))


def _quantiles(rows: RowScores) -> dict[str, float]:
    """Of off_set_mass: how much probability went elsewhere than to the labels."""
    mass = rows.values.get("off_set_mass", np.empty(0))
    mass = mass[~np.isnan(mass)]
    if not len(mass):
        return {}
    found = dict(
        zip(
            [f"off_set_mass_p{level * 100:g}" for level in QUANTILES],
            np.quantile(mass, QUANTILES),
            strict=True,
        )
    )
    return {name: float(value) for name, value in found.items()} | {
        "off_set_mass_max": float(mass.max())
    }


def _random(name: str) -> np.random.Generator:
    """Random numbers that depend on the name alone."""
    return np.random.default_rng(list(name.encode()))


def _zeros_or(values: Sequence[float | bool], answered: npt.NDArray[np.bool_]) -> Floats:
    """The values of the rows that were answered, 0 for the others."""
    return np.where(answered, np.array(values, np.float64), 0.0)


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right) if right else 0.0


def _set_f1(answer: set[str], gold: set[str]) -> float:
    return 2 * len(answer & gold) / (len(answer) + len(gold)) if answer or gold else 1.0


def _column(table: pa.Table, name: str) -> Floats:
    values: Floats = table[name].to_numpy().astype(np.float64)
    return values


def _matrix(table: pa.Table, name: str, width: int) -> Floats:
    """[rows, width], NaN for a null."""
    nothing = [math.nan] * width
    return np.array([row or nothing for row in table[name].to_pylist()], np.float64).reshape(
        table.num_rows, width
    )
