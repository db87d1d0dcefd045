"""What an earlier version began and was killed at is taken up and finished: see data/README.md."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path
from typing import Any

import pytest

from glm_batch.glm_actors.units.batches import to_completions
from glm_batch.jobs.commands.label import label
from glm_batch.jobs.cron.cron import cron
from glm_batch.jobs.files.sections import load_job
from glm_batch.pipelines import run
from glm_batch.pipelines.cron.versions import Versions
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.journal import Journal
from glm_batch.pipelines.output.state import status_of, verify

MADE_IN = b"/begun"
COMPARED = ("row_key", "status", "error_code", "label", "label_probs", "id", "size")

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder as it was left, in its new place."""
    with tarfile.open(Path(__file__).parent / "data" / "begun.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    for name in ("*.yaml", "**/plan*.json", "**/job.json"):
        for path in tmp_path.glob(name):
            path.write_bytes(path.read_bytes().replace(MADE_IN, bytes(tmp_path)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("glm_batch.pipelines.output.lease.POLL_S", 0.02)
    monkeypatch.setattr("glm_batch.pipelines.output.lease.DEAD_AFTER_S", 0.3)
    return tmp_path


def rows(output: Output) -> list[dict[str, Any]]:
    tables = [table.select(COMPARED) for table in output.iter_tables()]
    return [row for table in tables for row in table.to_pylist()]


def digests(folder: Path) -> dict[Path, str]:
    """What is committed."""
    paths = [*folder.glob("**/commits/*"), *folder.glob("**/parts/*"), *folder.glob("**/plan.json")]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_a_killed_output_is_finished(begun: Path) -> None:
    before = digests(begun / "killed")
    put_aside = list((begun / "killed" / "journal").iterdir())
    assert len(put_aside) == 4
    assert label("label.yaml", []) == 0
    assert digests(begun / "killed").items() >= before.items()
    assert list((begun / "killed" / "journal").iterdir()) == []
    output = Output.at("killed")
    assert all(problem is None for _, problem in verify(output))
    job, _ = load_job("label.yaml", ["output=anew"])
    assert rows(output) == rows(run(job).output)
    assert output.manifest().counts.errors == {"bad_json": 1, "duplicate_key": 1}


def test_what_was_put_aside_is_still_understood(begun: Path) -> None:
    """The engine is asked for nothing that stands in the journal."""
    journal = Journal(output=Output.at("killed"), every_seconds=1.0)
    found = [
        each.id
        for unit in (2, 3, 5)
        for table in journal.read(unit)
        for each in to_completions(table)
    ]
    assert found == ["r12", "r13", "r14", "r15", "r18", "r19", "r26", "r27"]


def test_a_night_that_was_killed_is_finished(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(begun / "nightly")
    assert cron("cron.yaml", []) == 0
    first, second = Versions.at("nightly", load_job("cron.yaml", [])[0].storage).names()
    assert digests(begun / "nightly").items() >= before.items()
    job, _ = load_job("cron.yaml", ["output=anew"])
    fresh = rows(run(job).output)
    kept = rows(Output.at(f"nightly/versions/{first}"))[-5:]
    assert rows(Output.at("nightly")) == fresh + kept
    assert status_of(Output.at(f"nightly/versions/{second}")).finished
    assert '"state": "finished"' in capsys.readouterr().out
