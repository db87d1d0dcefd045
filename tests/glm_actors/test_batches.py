"""Requests and completions survive the way through Arrow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from glm_actors.batches import request_table, to_completions, to_requests, with_completions
from models.engine.request import (
    Choose,
    Classify,
    Completion,
    Constraint,
    Embed,
    Generate,
    Inspect,
    Output,
    Request,
    SamplingParams,
    Tag,
    TopLogprob,
    Work,
)
from models.errors import RowError

WORKS: list[Work] = [
    Choose(choices=((1, 2), (3,)), count_end=True),
    Generate(sampling=SamplingParams(temperature=0.5, stop=("a", "b"), stop_token_ids=(1,), n=2, seed=2**62)),
    Generate(constraint=Constraint(kind="regex", text="a+")),
    Classify(),
    Tag(),
    Embed(pooling="mean", normalize=True),
    Inspect(what="hidden_states"),
]


def make_request(number: int, work: Work = Classify()) -> Request:  # noqa: B008  frozen
    return Request(id=f"k{number}", input_ids=list(range(number)), work=work)


def test_requests_of_every_kind_come_back_equal() -> None:
    requests = [make_request(number, work) for number, work in enumerate(WORKS * 2)]
    table = request_table([request.id for request in requests], requests)
    assert to_requests(table) == requests
    assert table["input_ids"].type == pa.list_(pa.int32())


def test_failed_rows_are_passed_over_and_keep_their_place() -> None:
    error = RowError("bad_json", "no")
    table = request_table(["a", "k1", "b", "k3"], [error, make_request(1), error, make_request(3)])
    assert [request.id for request in to_requests(table)] == ["k1", "k3"]
    answers = [Completion(id=f"k{n}", finish_reason="scored", prompt_tokens=n) for n in (1, 3)]
    found = to_completions(with_completions(table.append_column("#unit", [[0, 0, 0, 0]]), answers))
    assert [type(row) for row in found] == [RowError, Completion, RowError, Completion]
    assert [found[1], found[3]] == answers
    assert str(found[0]) == "[bad_json] no"


def test_an_error_may_quote_what_has_no_utf8() -> None:
    table = request_table(["a"], [RowError("bad_json", "at \ud800")])
    assert table["error_message"].to_pylist() == ["at \\ud800"]


def test_a_table_of_errors_alone_has_the_same_types() -> None:
    error = RowError("bad_json", "no")
    bad, good = request_table(["a"], [error]), request_table(["k1"], [make_request(1)])
    assert bad.schema == good.schema
    answered = with_completions(good, [Completion(id="k1", finish_reason="scored")])
    assert with_completions(bad, []).schema == answered.schema


@pytest.mark.parametrize(
    "fields",
    [
        {"choice_logprobs": (-0.5, -1.25)},
        {"array": np.arange(6, dtype=np.float32).reshape(2, 3)},
        {"array": np.arange(4, dtype=np.float32)},
        {"array": np.zeros((0, 3), np.float32)},
        {
            "outputs": (
                Output(
                    token_ids=(1, 2),
                    text="é\ufffd",
                    finish_reason="stop",
                    stop_reason=151336,
                    logprobs=(-0.1, -0.2),
                    top_logprobs=((TopLogprob(token_id=1, logprob=-0.1),), ()),
                ),
                Output(token_ids=(), text="", finish_reason="length", stop_reason="\n"),
            )
        },
    ],
)
def test_completions_come_back_equal(fields: dict[str, Any]) -> None:
    completion = Completion(
        id="k1", finish_reason="stop", prompt_tokens=1, cached_tokens=1, num_preemptions=2, **fields
    )
    table = with_completions(request_table(["k1"], [make_request(1)]), [completion])
    (found,) = to_completions(table)
    assert isinstance(found, Completion)
    for name in Completion.__dataclass_fields__:
        left, right = getattr(found, name), getattr(completion, name)
        if isinstance(right, np.ndarray):
            assert left.shape == right.shape
            np.testing.assert_array_equal(left, right)
        else:
            assert left == right


def test_an_error_of_the_engine_becomes_the_rows_error() -> None:
    failed = Completion(id="k1", finish_reason="error", prompt_tokens=9, error=RowError("prompt_too_long", "9 tokens"))
    (found,) = to_completions(with_completions(request_table(["k1"], [make_request(1)]), [failed]))
    assert isinstance(found, Completion)
    assert (str(found.error), found.prompt_tokens) == ("[prompt_too_long] 9 tokens", 9)
