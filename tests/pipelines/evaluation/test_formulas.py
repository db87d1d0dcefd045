"""Metrics of classes and probabilities against scikit-learn."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    brier_score_loss,
    confusion_matrix,
    f1_score,
)

from glm_batch.pipelines.evaluation import agreement
from glm_batch.pipelines.evaluation.agreement import brier, reliability

LABELS = ["a", "b", "c"]
PAIRS = st.lists(
    st.tuples(st.sampled_from(LABELS), st.sampled_from([*LABELS, None])), min_size=1, max_size=40
)


@settings(deadline=None)  # scikit-learn's first call alone takes as long as a default one has
@given(PAIRS)
def test_class_metrics_are_scikit_learns(pairs: list[tuple[str, str | None]]) -> None:
    gold, answers = [g for g, _ in pairs], [a for _, a in pairs]
    found = agreement.class_metrics(gold, answers, LABELS)
    table = agreement.confusion(gold, answers, LABELS)
    given_ = ["(none)" if a is None else a for a in answers]
    seen = sorted((set(gold) | set(given_)) - {"(none)"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a label that is answered but never gold
        assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(gold, given_))
    assert found["macro_f1"] == pytest.approx(
        f1_score(gold, given_, labels=seen, average="macro", zero_division=0)
    )
    assert found["micro_f1"] == pytest.approx(
        f1_score(gold, given_, labels=seen, average="micro", zero_division=0)
    )
    np.testing.assert_array_equal(
        table.counts, confusion_matrix(gold, given_, labels=[*LABELS, "(none)"])[:3]
    )
    assert np.trace(table.counts) / len(gold) == pytest.approx(accuracy_score(gold, given_))


@given(PAIRS)
def test_the_resampled_formulas_are_the_same(pairs: list[tuple[str, str | None]]) -> None:
    gold, answers = [g for g, _ in pairs], [a for _, a in pairs]
    points = agreement.class_metrics(gold, answers, LABELS)
    counts = agreement.confusion(gold, answers, LABELS).counts
    for name, formula in agreement.RESAMPLED.items():
        assert formula(np.stack([counts, 2 * counts])) == pytest.approx([points[name]] * 2)


def test_labels_beyond_the_set_are_wrong() -> None:
    table = agreement.confusion(["a", "z", "b"], ["a", "a", "y"], ["a", "b"])
    assert table.labels == ("a", "b", "z")
    assert table.counts.tolist() == [[1, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]]


def test_resampled_counts_keep_the_number_of_rows() -> None:
    counts = np.array([[3, 0, 1], [0, 6, 0]])
    drawn = agreement.resampled_counts(counts, 500, np.random.default_rng(0))
    assert (drawn.sum(axis=(1, 2)) == 10).all()
    np.testing.assert_allclose(drawn.mean(axis=0), counts, atol=0.3)


@given(st.integers(0, 2**32 - 1))
def test_brier_score_is_scikit_learns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.ones(4), size=20)
    gold = rng.integers(0, 4, size=20)
    wanted = brier_score_loss(gold, probabilities, labels=range(4), scale_by_half=False)
    assert brier(probabilities, gold).mean() == pytest.approx(wanted)


def test_a_gold_label_beyond_the_set_has_the_largest_brier_score() -> None:
    assert brier(np.array([[1.0, 0.0]]), np.array([-1])).tolist() == [2.0]


@given(st.integers(0, 2**32 - 1), st.integers(1, 200))
def test_calibration_error_is_the_sum_over_bins(seed: int, num_rows: int) -> None:
    rng = np.random.default_rng(seed)
    confidence = rng.choice([0.0, 1 / 15, 0.5, 1.0, rng.uniform()], num_rows)
    right = rng.integers(0, 2, num_rows).astype(float)
    wanted = 0.0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15) | (
            (confidence == 0) & (number == 0)
        )
        if inside.any():
            wanted += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    found = reliability(confidence, right)
    assert found.ece == pytest.approx(wanted)
    assert found.rows.sum() == num_rows


def test_calibrated_answers_have_little_calibration_error() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.2, 1.0, 40_000)
    right = (rng.uniform(size=40_000) < confidence).astype(float)
    assert reliability(confidence, right).ece < 0.02
    assert reliability(np.sqrt(confidence), right).ece > 0.1
