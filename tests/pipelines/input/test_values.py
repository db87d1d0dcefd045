"""JSON values: which are equal, whoever compares them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_batch.pipelines.evaluation.scoring import Rules, score
from glm_batch.pipelines.input.values import json_or_text, same_json
from glm_batch.pipelines.job import Job, TaskConfig
from glm_batch.pipelines.report.answers import Question, row_facts
from glm_batch.pipelines.tasks.task_runner import TaskRunner

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats(-2, 2) | st.text("ab", max_size=2),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.text("xy", min_size=1, max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)
TINY = Path(__file__).parents[3] / "examples" / "tiny_glm"


def with_floats(value: Any) -> Any:
    """Each number as a float, and -0.0 as 0.0."""
    if isinstance(value, dict):
        return {name: with_floats(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [with_floats(inner) for inner in value]
    return float(value) + 0.0 if type(value) in (int, float) else value


@given(JSON, JSON)
def test_values_are_equal_as_their_texts_are_once_numbers_are_written_alike(
    left: Any, right: Any
) -> None:
    texts = [json.dumps(with_floats(value), sort_keys=True) for value in (left, right)]
    assert same_json(left, right) == (texts[0] == texts[1])
    assert same_json(left, with_floats(left))


def test_numbers_beyond_a_float_are_not_rounded() -> None:
    assert not same_json({"id": 2**53 + 1}, {"id": float(2**53)})
    assert json_or_text("not json") == "not json"


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ('{"price": 12}', {"price": 12.0}, True),
        ('{"price": 12}', '{"price": 12.0}', True),
        ('{"prices": [{"a": 1.50}]}', {"prices": [{"a": 1.5}]}, True),
        ('{"paid": true}', {"paid": 1}, False),
        ('{"paid": [1]}', '{"paid": [true]}', False),
        ('{"price": null}', {}, False),
        ('"Bonn"', "Bonn", True),
    ],
)
def test_label_evaluate_and_report_judge_json_alike(answer: str, gold: Any, right: bool) -> None:
    """`label` once took true for 1, and `evaluate` and the report 12 for another number than 12.0."""
    task = TaskConfig(kind="extract", prompt="{x}", schema={})
    runner = TaskRunner(Job(model="", input=[], output="", task=task), str(TINY))
    columns: dict[str, Any] = {"row_key": "a", "status": "ok", "error_code": None, "json": answer}
    assert runner.is_right(columns, gold) is right
    table = pa.table({name: pa.array([value], pa.string()) for name, value in columns.items()})
    rows, _ = score(Rules(kind="extract"), table, [gold])
    assert rows.values["accuracy"].tolist() == [float(right)]
    for name in ("attempts", "prompt_tokens"):
        table = table.append_column(name, pa.array([1], pa.int32()))
    facts = row_facts(Question("extract"), 0, table, [gold])
    assert facts["accuracy"].to_pylist() == [float(right)]
