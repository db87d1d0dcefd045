"""status --verify and gc as commands, on outputs that no engine was needed for."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from glm_batch.jobs.__main__ import app
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.manifest import write_manifest
from tests.pipelines.output.test_commit import SCHEMA, commit, make_plan


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A finished output with an orphan of 7 bytes."""
    made = Output.at(str(tmp_path / "out"))
    plan = made.begin(make_plan())
    for unit, keys in enumerate(("ab", "cd", "e")):
        commit(made, unit, *keys)
    write_manifest(made, plan, SCHEMA, {})
    made.store.write("parts/unit-00000001-g1-dead0000.parquet", b"1234567")
    return tmp_path / "out"


def test_verify_tells_a_sound_output_from_a_damaged_one(output: Path) -> None:
    sound = CliRunner().invoke(app, ["status", str(output), "--verify"])
    assert sound.exit_code == 0
    assert "verified 3 parts" in sound.stdout
    assert "all as committed" in sound.stdout
    (part,) = output.glob("parts/unit-00000000-*")
    part.write_bytes(part.read_bytes()[:-1])
    damaged = CliRunner().invoke(app, ["status", str(output), "--verify"])
    assert damaged.exit_code == 1
    assert "1 damaged" in damaged.stdout
    assert part.name in damaged.stderr
    assert CliRunner().invoke(app, ["status", str(output)]).exit_code == 0  # reads no part


def test_gc_prints_what_it_removed(output: Path) -> None:
    done = CliRunner().invoke(app, ["gc", str(output)])
    assert done.exit_code == 0
    assert "removed parts/unit-00000001-g1-dead0000.parquet (7 bytes)" in done.stdout
    assert "removed 1 files, 7 bytes" in done.stdout
    assert "removed 0 files" in CliRunner().invoke(app, ["gc", str(output)]).stdout


def test_retry_without_a_kept_job_says_what_to_do(output: Path) -> None:
    done = CliRunner().invoke(app, ["retry", str(output)])
    assert done.exit_code == 2
    assert "job.json is missing or broken: run the job with label again" in done.stderr


@pytest.mark.parametrize("command", ["status", "gc", "retry"])
def test_commands_on_nothing_are_bad_configuration(command: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [command, str(tmp_path)])
    assert done.exit_code == 2
    assert "holds no output of glm-batch" in done.stderr
