"""What a run adds up: when too many rows have failed, and what the summary has to say."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm_batch.glm_actors.faults.spent import IN_ENGINE
from glm_batch.pipelines.metrics.counts import Counts
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.runs.watch import Tally, TooManyErrorsError
from tests.pipelines.output.test_commit import commit, make_plan


@pytest.fixture
def tally(tmp_path: Path) -> Tally:
    """A run of 50 rows in units of 2, one of which is committed."""
    output = Output.at(str(tmp_path / "out"))
    plan = output.begin(make_plan(num_rows=50))
    commit(output, 0, "a", "b")
    a_tally = Tally(None, most_errors=0.2)
    a_tally.resume(plan, output)
    return a_tally


def failed(rows: int) -> Counts:
    return Counts(rows=2, ok=2 - rows, errors={"bad_json": rows} if rows else {})


def test_fail_fast_waits_for_one_row_more_than_may_fail(tally: Tally) -> None:
    """Of all 50 rows a fifth may fail, whatever the share of those that came so far."""
    for _ in range(5):
        tally.add(failed(2), {})
    with pytest.raises(
        TooManyErrorsError,
        match=r"11 rows failed \(bad_json 11\).*20\.00% of 50: stopped with 7 of 25",
    ):
        tally.add(failed(1), {})
    with pytest.raises(TooManyErrorsError):
        tally.refuse_errors()


def test_without_a_bound_any_number_of_rows_may_fail(tmp_path: Path) -> None:
    tally = Tally(None)
    tally.expect(50, 25)
    for _ in range(24):
        tally.add(failed(2), {})
    tally.refuse_errors()


def test_a_complete_output_is_no_early_end(tally: Tally) -> None:
    for rows in [2] * 5 + [0] * 18 + [2]:  # the last one makes 12 of 50
        tally.add(failed(rows), {})
    assert tally.is_complete
    tally.refuse_errors()


def test_a_summary_tells_what_was_there_before(tally: Tally, tmp_path: Path) -> None:
    tally.add(failed(0), {IN_ENGINE: 31.0})
    summary = tally.summary(Output.at(str(tmp_path / "out")))
    assert (summary.counts.rows, summary.resumed_rows) == (4, 2)
