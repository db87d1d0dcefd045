"""Comparisons of one answer with one gold answer."""

from __future__ import annotations

import itertools
import json
import re
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_batch.pipelines.evaluation.agreement import (
    exact_match,
    extracted,
    field_matches,
    last_number,
    majority,
    normalised,
    numeric_match,
    pass_at,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text("ab", max_size=2),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.text("xy", min_size=1, max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)


def squad_normalised(text: str) -> str:
    """SQuAD's evaluation script, said again for ASCII."""
    text = "".join(char for char in text.lower() if char not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


@given(st.text(string.ascii_letters + string.digits + string.punctuation + " \n", max_size=40))
def test_normalised_text_is_squads_on_ascii(text: str) -> None:
    assert normalised(text) == squad_normalised(text)


def test_normalised_text_beyond_ascii() -> None:
    assert normalised("Die „Straße“ — ＡＢＣ") == normalised("die strasse abc")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("it is 12", 12.0), ("1,234.5 dollars", 1234.5), ("-3e2", -300.0), ("from 3 to 4.", 4.0), (".5", 0.5),
        ("none", None), ("", None), ("1,23", 23.0), ("+7", 7.0), ("e5", 5.0),
    ],
)  # fmt: skip
def test_the_last_number_counts(text: str, number: float | None) -> None:
    assert last_number(text) == number


@given(st.floats(-1e9, 1e9).filter(lambda value: abs(value) > 1e-3), st.text("abc .", max_size=8))
def test_a_number_is_found_however_it_is_written(value: float, around: str) -> None:
    for written in (f"{value!r}", f"{value:,.6f}", f"{value:.12e}"):
        assert numeric_match(f"{around} {written} {around.replace('.', ' ')}", repr(value), 1e-2)


def test_numbers_within_tolerance_match() -> None:
    assert numeric_match("100.00001", "100")
    assert not numeric_match("100.1", "100")
    assert not numeric_match("a hundred", "100")
    assert exact_match(" yes\n", "yes")
    assert not exact_match("Yes", "yes")


def test_extraction_takes_the_last_match() -> None:
    pattern = re.compile(r"answer: (\w+)")
    assert extracted(pattern, "answer: a ... answer: b") == "b"
    assert extracted(pattern, "no such thing") is None
    assert extracted(re.compile(r"\d+"), "1 and 22") == "22"


@given(JSON)
def test_an_equal_object_has_all_fields_right(value: Any) -> None:
    assert all(field_matches(json.loads(json.dumps(value)), value).values())


def test_fields_are_compared_one_by_one() -> None:
    gold = {"a": {"b": 1, "c": [1, 2]}, "d": True}
    assert field_matches({"a": {"b": 1.0, "c": [2, 1]}, "d": 1, "more": 0}, gold) == {
        "a.b": True,
        "a.c": False,
        "d": False,
    }
    assert field_matches(None, gold) == {"a.b": False, "a.c": False, "d": False}


def test_majority_takes_the_earliest_of_a_tie() -> None:
    assert majority(["b", "a", None, "a", "b"]) == "b"
    assert majority([None]) is None


@given(
    st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n)))
)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(case: tuple[int, int, int]) -> None:
    n, c, k = case
    subsets = list(itertools.combinations(range(n), k))
    assert pass_at(k, n, c) == pytest.approx(
        sum(min(subset) < c for subset in subsets) / len(subsets)
    )


def test_pass_at_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="pass@3 of 2"):
        pass_at(3, 2, 1)
