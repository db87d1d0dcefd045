"""Whether an answer agrees with a gold answer: as text, number, JSON; what samples agree on."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

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
