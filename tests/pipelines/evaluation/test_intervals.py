"""Intervals have the coverage that they claim, and tests their level; formulas against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from glm_batch.pipelines.evaluation import agreement
from glm_batch.pipelines.evaluation.agreement import reliability
from glm_batch.pipelines.evaluation.intervals import (
    bca,
    holm,
    mcnemar,
    mean_estimate,
    num_resamples,
    paired_difference,
    resample,
)

TRIALS = 1200  # the coverage is known to within 0.6 % (one standard deviation)


def covered(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


def test_the_interval_of_an_accuracy_covers_it() -> None:
    rng = np.random.default_rng(1)
    hits = []
    for _ in range(TRIALS):
        found = mean_estimate((rng.uniform(size=300) < 0.8).astype(float), rng)
        hits.append(found.low <= 0.8 <= found.high)
    assert 0.93 <= covered(hits) <= 0.97


def test_the_interval_of_a_skewed_mean_covers_it() -> None:
    rng = np.random.default_rng(2)
    hits = []
    for _ in range(TRIALS // 3):
        found = mean_estimate(rng.gamma(2.0, size=150), rng)
        hits.append(found.low <= 2.0 <= found.high)
    assert 0.93 <= covered(hits) <= 0.97


def test_the_interval_of_macro_f1_covers_it() -> None:
    rng = np.random.default_rng(3)
    chances = np.array(
        [[0.30, 0.06, 0.02, 0.02], [0.05, 0.20, 0.04, 0.01], [0.02, 0.03, 0.24, 0.01]]
    )
    truth = float(agreement.macro_f1(np.rint(chances * 100).astype(np.int64)))
    hits = []
    for _ in range(TRIALS):
        counts = rng.multinomial(400, chances.ravel()).reshape(chances.shape)
        drawn = agreement.macro_f1(agreement.resampled_counts(counts, 1000, rng))
        low, high = bca(drawn, float(agreement.macro_f1(counts)))
        hits.append(low <= truth <= high)
    assert 0.93 <= covered(hits) <= 0.97


def test_the_interval_of_a_paired_difference_covers_it() -> None:
    rng = np.random.default_rng(4)
    hits, rejected = [], []
    for _ in range(TRIALS):
        hard = rng.uniform(size=300)
        first = (hard + rng.normal(0, 0.2, 300) < 0.75).astype(float)
        second = (hard + rng.normal(0, 0.2, 300) < 0.75).astype(float)
        found = paired_difference(first, second, rng)
        hits.append(found.low <= 0.0 <= found.high)
        rejected.append(found.p_value < 0.05)
    assert 0.93 <= covered(hits) <= 0.97
    assert covered(rejected) <= 0.05


def test_a_real_difference_is_seen() -> None:
    rng = np.random.default_rng(5)
    first = (rng.uniform(size=500) < 0.9).astype(float)
    second = np.where(rng.uniform(size=500) < 0.2, 0.0, first)
    found = paired_difference(first, second, rng)
    assert found.low > 0.1
    assert found.p_value < 1e-9
    assert (found.only_first, found.only_second) == (int((first > second).sum()), 0)


def test_differences_of_other_values_have_a_bootstrap_p_value() -> None:
    rng = np.random.default_rng(6)
    noise = rng.normal(size=400)
    assert paired_difference(noise + 0.5, noise + rng.normal(size=400) * 0.1, rng).p_value < 0.01
    assert paired_difference(noise, noise + rng.normal(size=400), rng).p_value > 0.05


def test_pairs_without_a_value_do_not_count() -> None:
    found = paired_difference(
        np.array([1.0, np.nan, 0.0]), np.array([0.0, 1.0, np.nan]), np.random.default_rng(0)
    )
    assert (found.rows, found.value) == (1, 1.0)
    assert math.isnan(
        paired_difference(np.array([np.nan]), np.array([0.0]), np.random.default_rng(0)).p_value
    )


def test_mcnemar_is_the_binomial_test() -> None:
    for first, second in [(0, 0), (1, 0), (3, 9), (10, 10), (40, 60), (700, 500)]:
        wanted = stats.binomtest(first, first + second, 0.5).pvalue if first + second else 1.0
        assert mcnemar(first, second) == pytest.approx(wanted)


def test_bca_is_scipys() -> None:
    rng = np.random.default_rng(7)
    values = rng.gamma(1.5, size=120)
    found = mean_estimate(values, rng)
    wanted = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="BCa", rng=8
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx(wanted, abs=0.02)


def test_equal_values_get_the_exact_bound() -> None:
    found = mean_estimate(np.ones(30), np.random.default_rng(0))
    assert (found.low, found.high) == pytest.approx(
        stats.binomtest(30, 30).proportion_ci(method="exact")
    )
    found = mean_estimate(np.zeros(30), np.random.default_rng(0))
    assert (found.low, found.high) == pytest.approx(
        stats.binomtest(0, 30).proportion_ci(method="exact")
    )


def test_nothing_has_no_estimate() -> None:
    assert math.isnan(mean_estimate(np.array([np.nan]), np.random.default_rng(0)).value)


def test_resampling_weights_are_draws_with_replacement() -> None:
    rows = np.arange(50.0)
    means = resample(
        lambda weights: weights @ rows / weights.sum(axis=1), 50, np.random.default_rng(0), 4000
    )
    assert means.mean() == pytest.approx(rows.mean(), abs=0.2)
    assert means.std() == pytest.approx(rows.std() / math.sqrt(50), rel=0.05)


def test_many_rows_are_drawn_less_often() -> None:
    assert num_resamples(100) == 2000
    assert num_resamples(10**6) == 200


def test_the_interval_of_a_calibration_error_is_near_it() -> None:
    rng = np.random.default_rng(9)
    confidence = rng.uniform(0.5, 1.0, 500)
    right = (rng.uniform(size=500) < confidence - 0.2).astype(float)
    assert 0.15 < reliability(confidence, right).ece < 0.25


def test_holm_adjusts_for_the_number_of_comparisons() -> None:
    assert holm([0.01, 0.04, float("nan"), 0.03]) == pytest.approx(
        [0.03, 0.06, float("nan"), 0.06], nan_ok=True
    )
