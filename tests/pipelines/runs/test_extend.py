"""Files may be added to the input of an output; anything else is refused with the difference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines import run
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.state import status_of
from glm_batch.pipelines.planning.plan import Plan
from glm_batch.pipelines.runs.prepared import prepare
from tests.pipelines.runs.test_pipeline import GOOD, all_rows, make_job, write_input


@pytest.fixture
def job(echo_checkpoint: Path, tmp_path: Path) -> Job:
    """A job with a plan and no committed unit; its only file is named a.parquet."""
    write_input(tmp_path, num_parquet=10)
    a_job = make_job(echo_checkpoint, tmp_path)
    prepare(a_job, Output.at(a_job.output))
    return a_job


def add(job: Job, name: str, *lines: str) -> None:
    (Path(job.input[0]) / name).write_text("\n".join(lines) + "\n")


def extended(job: Job) -> Plan:
    """As `run(job, extend=True)` does before it starts any work."""
    output = Output.at(job.output)
    plan = prepare(job, output, extend=True).plan
    output.take_over(plan, b"{}")
    return plan


def test_added_files_need_to_be_asked_for(job: Job) -> None:
    add(job, "b.jsonl", GOOD)
    with pytest.raises(
        ConfigError,
        match=r"(?s)begun by another job.*--extend takes up files that were added.*b\.jsonl",
    ):
        prepare(job, Output.at(job.output))


def test_units_of_known_files_keep_their_numbers(job: Job) -> None:
    """Also when the new file's name sorts before them."""
    before = list(Output.at(job.output).standing_plan().units())
    add(job, "Z.jsonl", GOOD, GOOD.replace("j0", "p3"))
    plan = extended(job)
    assert list(plan.units())[: len(before)] == before
    assert [Path(planned.file.name).name for planned in plan.files] == ["a.parquet", "Z.jsonl"]
    # the known row keeps its key, whatever the names' order
    assert plan.duplicates == {(1, 1): (0, 3)}
    standing = Output.at(job.output).standing_plan()
    assert standing == plan
    assert prepare(job, Output.at(job.output)).plan == plan  # from now on, without being asked


def test_an_output_can_be_extended_again(job: Job) -> None:
    for number in range(3):
        add(job, f"more-{number}.jsonl", GOOD.replace("j0", f"m{number}"))
        extended(job)
    assert Output.at(job.output).standing_plan().num_rows == 13
    assert sorted(path.name for path in Path(job.output).glob("plan*")) == [
        "plan-2.json", "plan-3.json", "plan-4.json", "plan.json",
    ]  # fmt: skip


def touch_known(job: Job) -> None:
    add(job, "a.parquet", "not what it was")


def remove_known(job: Job) -> None:
    (Path(job.input[0]) / "a.parquet").unlink()


@pytest.mark.parametrize("change", [touch_known, remove_known])
def test_known_files_that_changed_or_went_are_refused(job: Job, change: Any) -> None:
    add(job, "b.jsonl", GOOD)
    change(job)
    with pytest.raises(ConfigError, match=r"(?s)begun by another job.*a\.parquet.*size"):
        prepare(job, Output.at(job.output), extend=True)


def test_another_question_is_refused_though_files_were_added(job: Job) -> None:
    add(job, "b.jsonl", GOOD)
    other = replace(job, task=replace(job.task, prompt="Other? {text}"))
    with pytest.raises(ConfigError, match=r"task\.prompt"):
        prepare(other, Output.at(job.output), extend=True)


def test_files_that_would_change_the_outputs_types_are_refused(job: Job) -> None:
    table = {"id": ["x"], "text": ["t"], "size": [0.5], "gold": ["circle"]}
    pq.write_table(pa.table(table), Path(job.input[0]) / "b.parquet")
    with pytest.raises(
        ConfigError, match="column 'size' has type double, and the output holds int64"
    ):
        prepare(job, Output.at(job.output), extend=True)


@pytest.mark.usefixtures("ray_cluster")
def test_a_finished_output_takes_up_new_rows_and_keeps_the_others(job: Job) -> None:
    run(job)
    output = Output.at(job.output)
    before, first = all_rows(job), output.manifest()
    add(
        job,
        "Z.jsonl",
        *(
            json.dumps({"id": f"n{n}", "text": "new", "size": n, "gold": "circle"})
            for n in range(9)
        ),
    )
    result = run(job, extend=True)
    assert result.summary.resumed_rows == 10
    assert result.manifest.parts[: len(first.parts)] == first.parts
    rows = all_rows(job)
    assert rows[:10] == before
    assert [row["row_key"] for row in rows[10:]] == [f"n{n}" for n in range(9)]
    assert status_of(output).finished
