"""What a run adds up: when too many rows have failed, and what the summary has to say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from glm_batch.glm_actors.faults.spent import IN_ENGINE
from glm_batch.pipelines.job import Job, TaskConfig
from glm_batch.pipelines.metrics.counts import Counts
from glm_batch.pipelines.output.commit import CommitRecord, Output
from glm_batch.pipelines.runs.progress import Work
from glm_batch.pipelines.runs.stop import TooManyErrorsError
from tests.pipelines.output.test_commit import commit, make_plan

JOB = Job(
    model="m",
    input=["i"],
    output="o",
    task=TaskConfig(kind="choose"),
    fail_fast=True,
    max_error_rate=0.2,
)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    """A run of 50 rows in units of 2, one of which is committed."""
    output = Output.at(str(tmp_path / "out"))
    plan = output.begin(make_plan(num_rows=50))
    commit(output, 0, "a", "b")
    a_work = Work(None)
    a_work.resume(plan, output)
    return a_work


def failed(rows: int) -> Counts:
    return Counts(rows=2, ok=2 - rows, errors={"bad_json": rows} if rows else {})


def record(counts: Counts) -> CommitRecord:
    return CommitRecord(unit=1, part="", rows=counts.rows, num_bytes=0, checksum="", counts=counts)


def test_fail_fast_waits_for_one_row_more_than_may_fail(work: Work) -> None:
    """Of all 50 rows a fifth may fail, whatever the share of those that came so far."""
    for _ in range(5):
        work.add_checked(JOB, record(failed(2)))
    with pytest.raises(
        TooManyErrorsError,
        match=r"11 rows failed \(bad_json 11\).*20\.00% of 50: stopped with 7 of 25",
    ):
        work.add_checked(JOB, record(failed(1)))
    with pytest.raises(TooManyErrorsError):
        work.refuse_errors(JOB)
    work.refuse_errors(replace(JOB, fail_fast=False))


def test_a_complete_output_is_no_early_end(work: Work) -> None:
    for _ in range(24):
        work.add(failed(1), {})
    assert work.is_complete
    work.refuse_errors(JOB)


def test_a_summary_tells_what_was_there_before(work: Work, tmp_path: Path) -> None:
    work.add(failed(0), {IN_ENGINE: 31.0})
    summary = work.summary(Output.at(str(tmp_path / "out")))
    assert (summary.counts.rows, summary.resumed_rows) == (4, 2)
