"""Tables of rows to metrics: what each task kind is scored by, and that failed rows are wrong."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from glm_batch.pipelines.evaluation.scoring import Rules, Score, score


def table(rows: list[dict[str, Any]], **types: pa.DataType) -> pa.Table:
    own = {"row_key": pa.string(), "status": pa.string(), "error_code": pa.string()} | types
    full = [
        {"row_key": str(n), "status": "ok", "error_code": None} | row for n, row in enumerate(rows)
    ]
    return pa.Table.from_pylist(full, schema=pa.schema(own))


FAILED = {"status": "error", "error_code": "null_media"}
CHOOSE = {
    "label": pa.string(), "label_probs": pa.list_(pa.float64()), "off_set_mass": pa.float64(),
    "label_logprobs": pa.list_(pa.float64()),
}  # fmt: skip


def chosen(logprobs: list[float], labels: list[str]) -> dict[str, Any]:
    weights = np.exp(logprobs)
    return {
        "label": labels[int(np.argmax(logprobs))],
        "label_probs": list(weights / weights.sum()),
        "off_set_mass": 1 - weights.sum(),
        "label_logprobs": logprobs,
    }


def values(found: Score) -> dict[str, float]:
    return {name: estimate.value for name, estimate in found.metrics.items()}


def test_choices_are_scored_by_class_probability_and_likelihood() -> None:
    labels = ["no", "certainly"]
    rows = [
        chosen([-1.0, -3.0], labels),
        chosen([-2.0, -1.0], labels),
        chosen([-0.5, -1.5], labels),
        FAILED,
        FAILED,
    ]
    rules = Rules(kind="choose", labels=tuple(labels), label_tokens=(1, 3))
    scored, found = score(
        rules, table(rows, **CHOOSE), ["no", "certainly", "certainly", "no", None]
    )
    assert (found.rows, found.without_gold, found.errors) == (4, 1, {"null_media": 1})
    got = values(found)
    assert got["accuracy"] == pytest.approx(2 / 4)
    assert got["accuracy_norm"] == pytest.approx(
        2 / 4
    )  # "certainly" has nine characters: it wins rows 1 to 3
    assert got["gold_log_likelihood"] == pytest.approx((-1.0 - 1.0 - 1.5) / 3)
    assert got["gold_token_log_likelihood"] == pytest.approx(-3.5 / 7)
    assert got["gold_perplexity"] == pytest.approx(math.exp(3.5 / 7))
    assert found.metrics["gold_log_likelihood"].rows == 3
    assert found.confusion is not None
    assert found.confusion.counts.tolist() == [[1, 0, 1], [1, 1, 0]]
    assert found.quantiles["off_set_mass_max"] == pytest.approx(1 - math.exp(-1) - math.exp(-3))
    assert scored.to_table()["answered"].to_pylist() == [True, True, True, False]
    assert scored.to_table()["brier"].null_count == 1


def test_a_row_that_failed_is_wrong() -> None:
    labels = ["no", "yes"]
    rows = [chosen([-0.1, -3.0], labels)] * 3 + [FAILED]
    _, found = score(Rules(kind="choose", labels=("no", "yes")), table(rows, **CHOOSE), ["no"] * 4)
    assert values(found)["accuracy"] == values(found)["balanced_accuracy"] == 0.75
    assert found.metrics["ece"].rows == 3


def test_texts_are_compared_in_three_ways() -> None:
    rows = [{"text": "The cat."}, {"text": "it is 12.0"}, {"text": "dog"}, FAILED]
    _, found = score(
        Rules(kind="generate"), table(rows, text=pa.string()), ["cat", "12", "dog", "cow"]
    )
    got = values(found)
    assert (got["accuracy"], got["exact"], got["normalised"], got["numeric"]) == (
        0.25,
        0.25,
        0.5,
        0.25,
    )


def test_gold_texts_are_scored_by_row_and_by_token() -> None:
    rows = [
        {"text": "a", "gold_logprob": -3.0, "gold_num_tokens": 2},
        {"text": "b", "gold_logprob": -1.0, "gold_num_tokens": 4},
        {"text": "", "gold_logprob": None, "gold_num_tokens": None},
        FAILED,
    ]
    types = {"text": pa.string(), "gold_logprob": pa.float64(), "gold_num_tokens": pa.int32()}
    scored, found = score(Rules(kind="generate"), table(rows, **types), ["a", "c", "", "d"])
    got = values(found)
    assert got["gold_log_likelihood"] == pytest.approx(-4.0 / 2)
    assert got["gold_token_log_likelihood"] == pytest.approx(-4.0 / 6)
    assert got["gold_perplexity"] == pytest.approx(math.exp(4.0 / 6))
    estimate = found.metrics["gold_perplexity"]
    assert estimate.rows == 2
    assert (
        math.exp(1 / 4) - 1e-9
        <= estimate.low
        < estimate.value
        < estimate.high
        <= math.exp(3 / 2) + 1e-9
    )
    assert scored.to_table()["gold_log_likelihood"].to_pylist() == [-3.0, -1.0, None, None]
    nothing = values(score(Rules(kind="generate"), table([rows[2]], **types), [""])[1])
    assert math.isnan(nothing["gold_perplexity"])


def test_a_pattern_takes_the_answer_out_of_a_text() -> None:
    rows = [{"text": "so the answer is B."}, {"text": "who knows"}]
    rules = Rules(kind="generate", extract=r"answer is (\w)", match="normalised")
    scored, found = score(rules, table(rows, text=pa.string()), ["b", "c"])
    assert values(found)["accuracy"] == values(found)["extracted"] == 0.5
    assert scored.answers == ["B", None]


def test_samples_vote_and_pass() -> None:
    rows = [{"text": ["a", "b", "B", "c"]}, {"text": ["a", "a", "a", "a"]}, FAILED]
    rules = Rules(kind="generate", match="normalised")
    _, found = score(rules, table(rows, text=pa.list_(pa.string())), ["b", "x", "b"])
    got = values(found)
    assert got["majority"] == pytest.approx(1 / 3)
    assert got["accuracy"] == got["pass@1"] == pytest.approx(0.5 / 3)
    assert got["pass@2"] == pytest.approx((1 - 1 / 6) / 3)
    assert got["pass@4"] == pytest.approx(1 / 3)


def test_objects_are_compared_field_by_field() -> None:
    rows = [{"json": '{"id": "A1", "n": 2}'}, {"json": '{"id": "A2", "n": 3}'}, FAILED]
    golds = ['{"n": 2, "id": "A1"}', {"id": "A2", "n": 4}, '{"id": "A3"}']
    _, found = score(Rules(kind="extract"), table(rows, json=pa.string()), golds)
    got = values(found)
    assert got["accuracy"] == pytest.approx(1 / 3)
    assert got["field_accuracy"] == pytest.approx((1 + 0.5) / 3)
    assert (got["field.id"], got["field.n"]) == (pytest.approx(2 / 3), 0.5)
    assert found.metrics["field.n"].rows == 2


def test_classes_and_sets_of_labels() -> None:
    rules = Rules(kind="classify", labels=("a", "b"))
    rows = [{"label": "a", "scores": [0.9, 0.1]}, {"label": "b", "scores": [0.2, 0.8]}]
    _, found = score(
        rules, table(rows, label=pa.string(), scores=pa.list_(pa.float64())), ["a", "a"]
    )
    assert values(found)["accuracy"] == 0.5
    assert values(found)["brier"] == pytest.approx((0.02 + 1.28) / 2)
    sets = [{"label": ["a", "b"], "scores": [0.9, 0.8]}, {"label": [], "scores": [0.1, 0.1]}]
    _, found = score(
        rules,
        table(sets, label=pa.list_(pa.string()), scores=pa.list_(pa.float64())),
        [["b", "a"], ["a"]],
    )
    assert values(found) == {"accuracy": 0.5, "sample_f1": 0.5}


def test_scores_are_the_same_every_time() -> None:
    labels = ["no", "yes"]
    rng = np.random.default_rng(0)
    rows = [chosen(list(np.log(rng.dirichlet([1, 1]))), labels) for _ in range(60)]
    golds = list(rng.choice(labels, 60))
    rules = Rules(kind="choose", labels=("no", "yes"), label_tokens=(1, 1))
    assert str(score(rules, table(rows, **CHOOSE), golds)[1]) == str(
        score(rules, table(rows, **CHOOSE), golds)[1]
    )


def test_no_rows_have_no_metrics() -> None:
    _, found = score(Rules(kind="choose", labels=("a",)), table([FAILED], **CHOOSE), [None])
    assert found.rows == 0
    assert math.isnan(found.metrics["accuracy"].value)
