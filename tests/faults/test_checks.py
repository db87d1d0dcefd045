"""The kill suite itself: its schedule follows from the seed, and its checks see what they must see."""

from __future__ import annotations

from itertools import islice

import pyarrow as pa
import pytest

from tests.faults.campaign import schedule
from tests.faults.checks import TOLERANCE, check_same

TARGETS = ["driver", "model", "node"]


def test_the_schedule_follows_from_the_seed() -> None:
    first, again, other = (list(islice(schedule(seed, "all", TARGETS), 9)) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert sorted(aim.target for aim in first) == sorted(TARGETS * 3)


def records(
    text: str = "a", probability: float | None = 0.5, probabilities: tuple[float, ...] = (0.5, 0.5)
) -> pa.Table:
    columns = {
        "text": ["b", text],
        "probability": [0.1, probability],
        "label_probs": [None, list(probabilities)],
    }
    return pa.table({"row_key": ["1", "2"]} | columns)


def test_last_bits_may_differ() -> None:
    near = 0.5 + TOLERANCE / 2
    check_same(records(probability=near, probabilities=(near, 0.5)), records())


@pytest.mark.parametrize(
    "other",
    [
        {"text": "c"},
        {"probability": 0.5 + 2 * TOLERANCE},
        {"probability": None},
        {"probabilities": (0.5, 0.5 + 2 * TOLERANCE)},
        {"probabilities": (0.5,)},
    ],
)
def test_nothing_else_may_differ(other: dict[str, object]) -> None:
    with pytest.raises(AssertionError):
        check_same(records(**other), records())  # type: ignore[arg-type]
