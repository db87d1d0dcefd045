"""Fitted temperatures and biases, against a known truth, scipy's optimum, and on rows that were not
fitted on.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from glm_batch.models.errors import ConfigError
from glm_batch.models.processing.scores import Scaling, softmax
from glm_batch.pipelines.calibration.calibration import PULL, fit, fitted, quality

LABELS = ("a", "b", "c", "d")


def sample(
    rows: int, seed: int, sharpness: float = 3.0, bias: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """(log-probabilities, gold): gold answers are drawn from probabilities that the model then
    makes too sharp.

    `bias` is added to the first label's logarithm.
    """
    rng = np.random.default_rng(seed)
    logits = rng.normal(0.0, 1.3, (rows, len(LABELS)))
    gold = (softmax(logits).cumsum(axis=1) < rng.random((rows, 1))).sum(axis=1)
    told = logits * sharpness + np.array([bias, 0.0, 0.0, 0.0])
    return told - np.log(np.exp(told).sum(axis=1, keepdims=True)), gold


def test_calibration_lowers_the_error_on_rows_that_it_has_not_seen() -> None:
    scaling = fit(*sample(2000, 1), with_bias=False)
    assert scaling.temperature == pytest.approx(3.0, rel=0.1)
    assert scaling.bias == ()
    logprobs, gold = sample(4000, 2)
    before, after = quality(logprobs, gold), quality(scaling.logits(logprobs), gold)
    assert before[0] > 0.2
    assert after[0] < 0.03
    assert after[1] < before[1]
    assert (scaling.logits(logprobs).argmax(axis=1) == logprobs.argmax(axis=1)).all()


def test_a_bias_mends_what_a_temperature_cannot() -> None:
    scaling = fit(*sample(4000, 3, bias=4.0), with_bias=True)
    wanted = np.array([-4.0, 0, 0, 0]) / 3 + 1 / 3
    np.testing.assert_allclose(scaling.bias, wanted, atol=0.15)
    assert sum(scaling.bias) == pytest.approx(0.0, abs=1e-9)
    logprobs, gold = sample(4000, 4, bias=4.0)
    with_temperature = quality(
        fit(*sample(4000, 3, bias=4.0), with_bias=False).logits(logprobs), gold
    )
    with_bias = quality(scaling.logits(logprobs), gold)
    assert with_bias[1] < with_temperature[1] - 0.02
    right = [
        (logits.argmax(axis=1) == gold).mean() for logits in (logprobs, scaling.logits(logprobs))
    ]
    assert right[1] > right[0] + 0.02


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_fit_is_the_minimum_that_scipy_finds(with_bias: bool) -> None:
    logprobs, gold = sample(300, 5, sharpness=0.4, bias=1.0)

    def objective(point: np.ndarray) -> float:
        bias = point[1:] if with_bias else np.zeros(4)
        pull = 0.5 * PULL / len(gold) * ((point[0] - 1) ** 2 + (bias**2).sum())
        return quality(point[0] * logprobs + bias, gold)[1] + pull

    found = minimize(
        objective, np.ones(1) if not with_bias else np.array([1.0, 0, 0, 0, 0]), tol=1e-10
    ).x
    scaling = fit(logprobs, gold, with_bias=with_bias)
    assert 1 / scaling.temperature == pytest.approx(found[0], rel=1e-4)
    if with_bias:
        np.testing.assert_allclose(scaling.bias, found[1:] - found[1:].mean(), atol=1e-4)


def test_what_is_told_is_measured_on_rows_held_out() -> None:
    """Biases fitted to noise lower the likelihood's loss on the rows they were fitted to, and not
    on others.
    """
    logprobs, gold = sample(40, 6, sharpness=1.0)
    found = fitted(logprobs, gold, LABELS, with_bias=True)
    on_itself = quality(found.scaling.logits(logprobs), gold)[1]
    assert on_itself < found.before[1] < found.after[1]


def test_all_right_is_no_certainty_and_impossible_labels_stay_so() -> None:
    logprobs = np.array([[np.log(0.8), np.log(0.2), -np.inf]] * 50)
    gold = np.zeros(50, np.int64)
    scaling = fit(logprobs, gold, with_bias=False)
    assert 0.1 < scaling.temperature < 1.0
    assert softmax(scaling.logits(logprobs))[0, 2] == 0.0


def test_refusals() -> None:
    logprobs, gold = sample(200, 7)
    with pytest.raises(ConfigError, match="needs at least 20"):
        fitted(logprobs[:19], gold[:19], LABELS, with_bias=False)
    with pytest.raises(ConfigError, match="'c' is the gold answer of 0 rows"):
        fitted(logprobs[gold != 2], gold[gold != 2], LABELS, with_bias=True)
    with pytest.raises(ConfigError, match="or the contrary"):
        fit(-logprobs, gold, with_bias=False)
    with pytest.raises(ConfigError, match="one label"):
        fitted(np.zeros((30, 1)), np.zeros(30, np.int64), ("a",), with_bias=False)


def test_a_fit_of_what_is_calibrated_changes_little() -> None:
    scaling = fit(*sample(4000, 8, sharpness=1.0), with_bias=True)
    assert scaling.temperature == pytest.approx(1.0, abs=0.08)
    assert max(map(abs, scaling.bias)) < 0.15
    assert isinstance(scaling, Scaling)
