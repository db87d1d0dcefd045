"""Whole jobs with the echo engine: every row comes out once, in one schema, whatever is wrong with
it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glm_batch.glm_actors.faults.suspects import Patience
from glm_batch.models.checkpoint.directory import model_digest
from glm_batch.models.errors import ConfigError, EngineError
from glm_batch.pipelines import build_dataset, run
from glm_batch.pipelines.job import CommitSection, EngineSection, Job, TaskConfig
from glm_batch.pipelines.metrics.counts import Progress
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.state import status_of
from glm_batch.pipelines.runs.prepared import prepare

pytestmark = pytest.mark.usefixtures("ray_cluster")


def make_job(checkpoint: Path, folder: Path, unit_rows: Any = 7, **changes: Any) -> Job:
    task = TaskConfig(
        kind="choose", prompt="Which shape? {text}", labels=["circle", "square"], gold="gold"
    )
    job = Job(
        model=str(checkpoint),
        input=[str(folder / "in")],
        output=str(folder / "out"),
        key="id",
        carry=["id", "size"],
        task=task,
        engine=EngineSection(kind="echo"),
        commit=CommitSection(unit_rows=unit_rows),
    )
    return replace(job, **changes)


def write_input(folder: Path, num_parquet: int = 23, jsonl: tuple[str, ...] = ()) -> None:
    (folder / "in").mkdir()
    table = {
        "id": [f"p{row}" for row in range(num_parquet)],
        "text": [f"shape {row}" for row in range(num_parquet)],
        "size": pa.array([row if row % 3 else None for row in range(num_parquet)], pa.int64()),
        "gold": ["circle"] * num_parquet,
        "unused": [b"x" * 100] * num_parquet,
    }
    pq.write_table(pa.table(table), folder / "in" / "a.parquet", row_group_size=10)
    if jsonl:
        (folder / "in" / "b.jsonl").write_text("\n".join(jsonl) + "\n")


def all_rows(job: Job) -> list[dict[str, Any]]:
    return [row for table in Output.at(job.output).iter_tables() for row in table.to_pylist()]


GOOD = json.dumps({"id": "j0", "text": "shape", "size": 1, "gold": "circle"})


def test_every_row_comes_out_once_and_bad_rows_say_why(
    echo_checkpoint: Path, tmp_path: Path
) -> None:
    bad = {
        "{": "bad_json",
        '"text"': "bad_json",
        '{"id": "j1", "text": null}': "null_prompt",
        '{"id": "j2"}': "missing_column",
        '{"id": "j3", "text": " "}': "empty_text",
        '{"id": "j4", "text": "x", "size": "big"}': "wrong_type",
        '{"id": "p5", "text": "x"}': "duplicate_key",
        '{"id": "j0", "text": "x"}': "duplicate_key",
        '{"id": null, "text": "x"}': "null_key",
        json.dumps({"id": "j5", "text": "word " * 300}): "prompt_too_long",
    }
    write_input(tmp_path, jsonl=(GOOD, *bad, '{"id": "j6", "text": "<|assistant|>", "size": 2}'))
    job = make_job(echo_checkpoint, tmp_path)
    seen: list[Progress] = []
    result = run(job, seen.append)
    rows = all_rows(job)
    file = str(tmp_path / "in" / "b.jsonl")
    expected = [f"p{row}" for row in range(23)] + [
        "j0",
        f"{file}:1",
        f"{file}:2",
        "j1",
        "j2",
        "j3",
        "j4",
        "p5",
        "j0",
    ]
    assert [row["row_key"] for row in rows] == [*expected, f"{file}:9", "j5", "j6"]
    assert [row["error_code"] for row in rows] == [None] * 24 + list(bad.values()) + [None]
    assert all(
        (row["status"] == "ok") == (row["error_code"] is None) == (row["label"] is not None)
        for row in rows
    )
    assert [row["size"] for row in rows[:4]] == [None, 1, 2, None]
    assert {row["attempts"] for row in rows} == {1}
    assert "p5' is the key of an earlier row" in rows[30]["error_message"]
    assert result.summary.counts.errors == Counter(bad.values())
    assert (result.summary.counts.rows, result.summary.counts.ok) == (35, 25)
    assert result.summary.counts.gold_rows == 24
    assert result.summary.counts.gold_correct == sum(row["label"] == "circle" for row in rows[:24])
    assert [progress.phase for progress in seen[:2]] == ["planning", "starting"]
    assert (seen[-1].phase, seen[-1].units_done, seen[-1].counts) == (
        "done",
        6,
        result.summary.counts,
    )
    assert result.manifest.facts["end_counted"] is False


@pytest.mark.parametrize(("unit_rows", "units"), [(1, 11), ("auto", 1)])
def test_units_of_any_size_give_the_same_rows(
    echo_checkpoint: Path, tmp_path: Path, unit_rows: Any, units: int
) -> None:
    write_input(tmp_path, num_parquet=11)
    job = make_job(echo_checkpoint, tmp_path, unit_rows)
    result = run(job)
    assert len(result.manifest.parts) == units
    assert [row["id"] for row in all_rows(job)] == [f"p{row}" for row in range(11)]
    assert [table.num_rows for table in result.iter_tables()] == [
        min(11 - start, 1000 if unit_rows == "auto" else unit_rows)
        for start in range(0, 11, 1000 if unit_rows == "auto" else unit_rows)
    ]


def test_a_job_of_several_waves(
    echo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glm_batch.pipelines.runs.pipeline.WAVE_UNITS", 2)
    write_input(tmp_path, num_parquet=11)
    job = make_job(echo_checkpoint, tmp_path, 3)
    result = run(job)
    assert len(result.manifest.parts) == 4
    assert [row["id"] for row in all_rows(job)] == [f"p{row}" for row in range(11)]


def test_a_part_of_errors_alone_has_the_schema_of_the_others(
    echo_checkpoint: Path, tmp_path: Path
) -> None:
    write_input(tmp_path, num_parquet=7, jsonl=("{",) * 7)
    job = make_job(echo_checkpoint, tmp_path)
    first = run(job)
    good, bad = first.iter_tables()
    assert set(bad["status"].to_pylist()) == {"error"}
    assert good.schema == bad.schema == first.manifest.schema
    # The job is finished: a rerun writes nothing.
    parts = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "parts").iterdir()}
    second = run(job)
    assert (second.summary.resumed_rows, second.summary.working_s) == (14, 0.0)
    assert second.manifest == first.manifest
    assert {
        path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "parts").iterdir()
    } == parts


def test_another_question_for_the_same_output_is_refused(
    echo_checkpoint: Path, tmp_path: Path
) -> None:
    write_input(tmp_path)
    job = make_job(echo_checkpoint, tmp_path)
    output = Output.at(job.output)
    begun = prepare(job, output)
    other = replace(job, task=replace(job.task, prompt="What is {text}?"))
    with pytest.raises(
        ConfigError, match=r'task\.prompt: "Which shape\? \{text\}" -> "What is \{text\}\?"'
    ):
        prepare(other, output)
    same = replace(job, commit=CommitSection(unit_rows=3), max_error_rate=0.5)
    assert prepare(same, output).plan == begun.plan


def test_an_input_that_changed_is_another_job(echo_checkpoint: Path, tmp_path: Path) -> None:
    write_input(tmp_path)
    job = make_job(echo_checkpoint, tmp_path)
    prepare(job, Output.at(job.output))
    (tmp_path / "in" / "b.jsonl").write_text(GOOD)
    with pytest.raises(ConfigError, match=r"input\..*b\.jsonl\.size: nothing -> "):
        prepare(job, Output.at(job.output))


def test_a_checkpoint_that_was_trained_on_is_another_job(
    echo_checkpoint: Path, tmp_path: Path
) -> None:
    """Also where only the weights differ, and the files are as large as before."""
    checkpoint = shutil.copytree(echo_checkpoint, tmp_path / "checkpoint")
    (checkpoint / "model.safetensors").write_bytes(b"0" * 1000)
    before = model_digest(str(checkpoint))
    (checkpoint / "model.safetensors").write_bytes(b"0" * 999 + b"1")
    assert model_digest(str(checkpoint)) != before
    moved = checkpoint.rename(tmp_path / "moved")
    (moved / "model.safetensors").write_bytes(b"0" * 1000)
    assert model_digest(str(moved)) == before


def test_rows_can_be_had_as_a_dataset(echo_checkpoint: Path, tmp_path: Path) -> None:
    write_input(tmp_path, num_parquet=9)
    job = make_job(echo_checkpoint, tmp_path)
    rows = build_dataset(job).take_all()
    assert Counter(row["row_key"] for row in rows) == Counter(f"p{row}" for row in range(9))
    assert list(rows[0])[:5] == ["row_key", "status", "error_code", "error_message", "attempts"]
    assert not (tmp_path / "out").exists()


def test_input_without_rows_gives_an_empty_output(echo_checkpoint: Path, tmp_path: Path) -> None:
    write_input(tmp_path, num_parquet=0)
    result = run(make_job(echo_checkpoint, tmp_path))
    assert result.manifest.parts == ()
    assert list(result.iter_tables()) == []


def test_messages_and_generation(echo_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    lines = [
        {"chat": [{"role": "user", "content": "hello"}], "answer": {"a": 1}},
        {"chat": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}], "answer": [2]},
        {"chat": [{"role": "nobody", "content": "hello"}], "answer": "three"},
    ]
    (tmp_path / "in" / "b.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = TaskConfig(kind="generate", messages="chat", gold="answer")
    job = make_job(echo_checkpoint, tmp_path, task=task, key=None, carry=["answer"])
    run(job)
    rows = all_rows(job)
    assert [row["error_code"] for row in rows] == [None, None, "bad_messages"]
    assert rows[0]["text"] == rows[1]["text"] != ""
    assert [row["answer"] for row in rows] == ['{"a": 1}', "[2]", "three"]


def test_a_checkpoint_that_the_engine_refuses_is_a_config_error(
    echo_checkpoint: Path, tmp_path: Path
) -> None:
    write_input(tmp_path, num_parquet=2)
    job = make_job(echo_checkpoint, tmp_path, engine=EngineSection(kind="vllm"))
    with pytest.raises(ConfigError, match=r"engine\.kind: vLLM is not installed"):
        run(job)


KILLED_DRIVER = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_pipeline import make_job
    from glm_batch.pipelines import run
    def report(progress):
        print(progress.phase, progress.units_done, flush=True)
    run(make_job(Path({checkpoint!r}), Path({folder!r}), 2), report)
"""


def test_a_killed_driver_loses_nothing_and_repeats_nothing(
    echo_checkpoint: Path, tmp_path: Path
) -> None:
    write_input(tmp_path, num_parquet=400)
    script = textwrap.dedent(KILLED_DRIVER).format(
        tests=str(Path(__file__).parent), checkpoint=str(echo_checkpoint), folder=str(tmp_path)
    )
    driver = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    for line in driver.stdout:
        if line.startswith("running") and int(line.split()[1]) >= 3:
            break
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    time.sleep(1)  # its workers notice that it is gone
    job = make_job(echo_checkpoint, tmp_path, 2)
    output = Output.at(job.output)
    before = status_of(output)
    parts = {path.name: path.read_bytes() for path in (tmp_path / "out" / "commits").iterdir()}
    assert 3 <= before.units_done < 200
    result = run(job)
    assert result.summary.resumed_rows == before.counts.rows
    assert [row["row_key"] for row in all_rows(job)] == [f"p{row}" for row in range(400)]
    after = {path.name: path.read_bytes() for path in (tmp_path / "out" / "commits").iterdir()}
    assert {name: after[name] for name in parts} == parts


def test_a_lost_engine_ends_the_job_with_its_reason(
    echo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process of a dead engine is restarted; when none of them answers a row, the last one's
    reason is told.
    """
    write_input(tmp_path, num_parquet=4)
    monkeypatch.setattr(
        "glm_batch.pipelines.graph.stages.PATIENCE", Patience(barren_deaths=3, backoff_s=0.1)
    )
    monkeypatch.setattr("glm_batch.pipelines.graph.stages.ModelActor", _dying_actor())
    with pytest.raises(EngineError, match="the device is lost"):
        run(make_job(echo_checkpoint, tmp_path))


def _dying_actor() -> type:
    from glm_batch.glm_actors.engines.engine_loop import EngineLoop
    from glm_batch.glm_actors.units.model_actor import ModelActor
    from glm_batch.models.engine.echo import EchoEngine

    class DyingActor(ModelActor):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)

            class DeadEngine(EchoEngine):
                def step(self) -> Any:
                    raise EngineError("the device is lost")

            self._loop = EngineLoop(DeadEngine)

    return DyingActor
