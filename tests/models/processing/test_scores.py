"""The formulas of labels and classes, at numbers that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from glm_batch.models.errors import RowError
from glm_batch.models.processing.scores import Scaling, class_scores, label_scores


def test_labels_share_what_the_model_gives_them() -> None:
    found = label_scores([math.log(0.2), math.log(0.6), -math.inf])
    assert found.best == 1
    np.testing.assert_allclose(found.probabilities, [0.25, 0.75, 0.0])
    assert found.off_set_mass == pytest.approx(0.2)


@pytest.mark.parametrize(
    "logprobs", [[-1.0, math.nan], [0.5, -1.0], [math.inf], [-math.inf, -math.inf]]
)
def test_what_is_no_probability_is_refused(logprobs: list[float]) -> None:
    with pytest.raises(RowError, match="label log-probabilities"):
        label_scores(logprobs)


def test_classes() -> None:
    logits, names = np.array([0.0, math.log(3.0)]), ("a", "b")
    assert class_scores(logits, names, "regression") == (logits.tolist(), 0.0)
    scores, label = class_scores(logits, names, "single_label_classification")
    assert (scores, label) == (pytest.approx([0.25, 0.75]), "b")
    scores, label = class_scores(logits, names, "multi_label_classification")
    assert (scores, label) == (pytest.approx([0.5, 0.75]), ["b"])  # 0.5 itself is not above


def test_a_temperature_flattens_and_leaves_the_answer() -> None:
    logprobs = [math.log(0.2), math.log(0.6), -math.inf]
    found = label_scores(logprobs, Scaling(temperature=2.0))
    root = [0.2**0.5, 0.6**0.5]
    np.testing.assert_allclose(found.probabilities, [root[0] / sum(root), root[1] / sum(root), 0.0])
    assert (found.best, found.off_set_mass) == (1, pytest.approx(0.2))


def test_a_bias_moves_the_answer() -> None:
    found = label_scores([math.log(0.25), math.log(0.75)], Scaling(bias=(math.log(9.0), 0.0)))
    assert found.best == 0
    np.testing.assert_allclose(found.probabilities, [0.75, 0.25])
    scores, label = class_scores(
        np.array([0.0, math.log(3.0)]),
        ("a", "b"),
        "single_label_classification",
        Scaling(bias=(math.log(9.0), 0.0)),
    )
    assert (scores, label) == (pytest.approx([0.75, 0.25]), "a")


def test_ties_go_to_what_the_model_prefers_and_then_to_the_first() -> None:
    nearly = math.nextafter(-1.9, -2.0)
    assert nearly / 1.7 == -1.9 / 1.7  # equal after the division
    assert label_scores([nearly, -1.9, -1.9], Scaling(temperature=1.7)).best == 1
    assert label_scores([-1.0, -1.0], Scaling(temperature=3.0)).best == 0
