"""A retry replaces failed rows by what an undisturbed run gives, and touches nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from glm_batch.jobs.files.sections import load_kept_job
from glm_batch.models.errors import ConfigError
from glm_batch.pipelines import run
from glm_batch.pipelines.job import Job, job_file
from glm_batch.pipelines.metrics.counts import Counts
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.manifest import write_manifest
from glm_batch.pipelines.output.parts import part_of
from glm_batch.pipelines.output.state import status_of, verify
from glm_batch.pipelines.runs.retry_run import failed_positions, merged, retry_failed
from tests.pipelines.runs.test_pipeline import GOOD, all_rows, make_job, write_input

KEPT = ("row_key", "status", "error_code", "error_message", "attempts", "id", "size")


def part(*rows: tuple[str, str | None, int]) -> pa.Table:
    return pa.table(
        {
            "row_key": [key for key, _, _ in rows],
            "status": ["error" if code else "ok" for _, code, _ in rows],
            "error_code": pa.array([code for _, code, _ in rows], pa.string()),
            "attempts": pa.array([attempts for _, _, attempts in rows], pa.int32()),
        }
    )


@pytest.mark.parametrize(
    ("codes", "positions"), [([], [1, 2, 4]), (["x"], [1, 4]), (["x", "y"], [1, 2, 4]), (["z"], [])]
)
def test_failed_rows_are_found_by_code(codes: list[str], positions: list[int]) -> None:
    table = part(("a", None, 1), ("b", "x", 1), ("c", "y", 1), ("d", None, 1), ("e", "x", 1))
    assert failed_positions(table, codes).tolist() == positions


def test_rows_come_back_to_their_places_and_attempts_add_up() -> None:
    table = part(("a", None, 1), ("b", "x", 2), ("c", "y", 1), ("d", "x", 1))
    again = part(("b", None, 1), ("d", "z", 3))
    assert merged(table, again, ["x"]) == part(
        ("a", None, 1), ("b", None, 3), ("c", "y", 1), ("d", "z", 4)
    )
    with pytest.raises(RuntimeError, match="1 rows came back for 2"):
        merged(table, again.slice(1), ["x"])


@pytest.fixture
def done(echo_checkpoint: Path, tmp_path: Path, ray_cluster: None) -> Job:
    """A finished job of 33 rows, one of which can never succeed."""
    write_input(tmp_path, num_parquet=30, jsonl=(GOOD, "{", GOOD.replace("j0", "j1")))
    job = make_job(echo_checkpoint, tmp_path)
    run(job)
    return job


def with_failures(job: Job, output: str, every: int) -> Job:
    """An output of the same job in which each `every`-th row failed with "engine_lost"."""
    source, target = Output.at(job.output), Output.at(output)
    broken = replace(job, output=output)
    plan = target.begin(source.standing_plan())
    target.take_over(plan, job_file(broken))
    for record in source.records(plan):
        rows = source.read_part(part_of(record)).to_pylist()
        lost = [row for row in rows[::every] if row["status"] == "ok"]
        right = sum(row["label"] == "circle" for row in lost)
        for row in lost:
            values = dict.fromkeys(name for name in row if name not in KEPT) | {"prompt_tokens": 3}
            row |= values | {
                "status": "error",
                "error_code": "engine_lost",
                "error_message": "it died",
            }
        table = pa.Table.from_pylist(rows, source.read_part(part_of(record)).schema)
        tokens = {
            name: sum(row[name] or 0 for row in rows)
            for name in ("prompt_tokens", "cached_tokens", "output_tokens")
        }
        counts = record.counts
        errors = dict(counts.errors) | ({"engine_lost": len(lost)} if lost else {})
        counts = replace(
            counts,
            ok=counts.ok - len(lost),
            errors=errors,
            gold_correct=counts.gold_correct - right,
            **tokens,
        )
        target.commit(record.unit, table, counts)
    write_manifest(target, plan, source.manifest().schema, source.manifest().facts)
    return broken


def comparable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"attempts": 0, "cached_tokens": 0} for row in rows]


def test_failed_rows_become_what_an_undisturbed_run_gives(done: Job, tmp_path: Path) -> None:
    broken = with_failures(done, str(tmp_path / "broken"), every=3)
    output = Output.at(broken.output)
    before = output.generations()
    failed = [row["error_code"] == "engine_lost" for row in all_rows(broken)]
    summary = retry_failed(broken, output, ["engine_lost"])
    rows = all_rows(broken)
    assert comparable(rows) == comparable(all_rows(done))
    assert [row["attempts"] == 2 for row in rows] == failed
    expected = status_of(Output.at(done.output)).counts
    assert replace(summary.counts, cached_tokens=0) == replace(expected, cached_tokens=0)
    assert status_of(output).counts == output.manifest().counts == summary.counts
    assert set(before.values()) == {1}
    assert set(output.generations().values()) == {2}
    assert all(problem is None for _, problem in verify(output))

    # Only the row that is bad for good is left; a retry of its code touches its unit alone.
    assert summary.counts.errors == {"bad_json": 1}
    retry_failed(broken, output, [])
    assert sorted(output.generations().values()) == [2] * 5 + [3]
    assert [row["attempts"] for row in all_rows(broken) if row["error_code"]] == [2]
    nothing = retry_failed(broken, output, ["engine_lost"])
    assert "no row failed with engine_lost" in nothing.notes[0]


def test_a_retry_that_died_is_completed_by_a_rerun_of_either_command(
    done: Job, tmp_path: Path
) -> None:
    """Some units have their next generation, the manifest does not know."""
    broken = with_failures(done, str(tmp_path / "broken"), every=3)
    output, source = Output.at(broken.output), Output.at(done.output)
    good = source.known_record(1, 1)
    output.commit(1, source.read_part(part_of(good)), good.counts, generation=2)
    assert not status_of(output).finished
    assert run(broken).manifest.counts.errors["engine_lost"] == 11
    assert status_of(output).finished
    retry_failed(broken, output, [])
    assert comparable(all_rows(broken)) == comparable(all_rows(done))


def test_a_job_that_has_changed_is_refused(done: Job) -> None:
    output = Output.at(done.output)
    with pytest.raises(ConfigError, match=r"sampling\.seed: 0 -> 7"):
        retry_failed(replace(done, sampling=replace(done.sampling, seed=7)), output, [])
    path = Path(done.input[0]) / "b.jsonl"
    path.write_text(path.read_text() + " ")
    with pytest.raises(ConfigError, match=r"(?s)this is another job now.*b\.jsonl\.size"):
        retry_failed(done, output, [])
    assert set(output.generations().values()) == {1}


def test_the_kept_job_is_the_job(done: Job) -> None:
    kept = Output.at(done.output).kept_job()
    assert load_kept_job(kept, "job.json")[0] == done
    assert json.loads(kept)["task"]["gold"] == "gold"


def test_a_retry_may_change_limits_and_nothing_else(done: Job) -> None:
    output = Output.at(done.output)
    kept = output.kept_job()
    patient, _ = load_kept_job(
        kept, "job.json", ["media.decode_timeout_s=1200.0", "media.hosts=[example.org]"]
    )
    assert (patient.media.decode_timeout_s, patient.media.hosts) == (1200.0, ["example.org"])
    retry_failed(patient, output, ["no such code"])
    other, _ = load_kept_job(kept, "job.json", ["task.prompt={text}!"])
    with pytest.raises(ConfigError, match=r"this is another job now.*\n  task\.prompt: "):
        retry_failed(other, output, [])
    with pytest.raises(
        ConfigError, match=r"--set media\.decode_timeout: unknown key.*decode_timeout_s"
    ):
        load_kept_job(kept, "job.json", ["media.decode_timeout=9"])


def test_counts_subtract() -> None:
    one, two = Counts(rows=5, ok=3, errors={"x": 2}), Counts(rows=2, errors={"x": 2})
    assert one - two == Counts(rows=3, ok=3)
