"""Commands on a cron output: which version they mean, and that what readers of the one in force
open stays there.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from typer.testing import CliRunner, Result

from glm_batch.jobs.__main__ import app
from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.cron.versions import Versions, find
from glm_batch.pipelines.job import Job, StorageSection
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.lease import BusyError
from glm_batch.pipelines.output.manifest import write_manifest
from glm_batch.pipelines.output.parts import part_of
from glm_batch.pipelines.output.state import collect
from glm_batch.pipelines.storage.s3 import S3
from glm_batch.pipelines.storage.storage import S3Store, StorageError
from tests.pipelines.cron.cron_world import make_job, night, process_here
from tests.s3_faults import new_bucket


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glm_batch.pipelines.cron.incremental.process", process_here)


@pytest.fixture
def job(echo_checkpoint: Path, tmp_path: Path) -> Job:
    """Ten rows in three units; one row of the first cannot be processed."""
    (tmp_path / "in").mkdir()
    rows = [
        {"id": f"k{n}", "text": None if n == 1 else f"shape {n}", "size": n, "gold": "circle"}
        for n in range(10)
    ]
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_job(echo_checkpoint, tmp_path)


def add(job: Job, name: str, num_rows: int = 3) -> Path:
    path = Path(job.input[0]) / name
    rows = [
        {"id": f"{name}{n}", "text": f"shape {n}", "size": n, "gold": "circle"}
        for n in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(job: Job) -> list[dict[str, Any]]:
    """What a reader of OUTPUT/manifest.json sees, checksums compared."""
    return [
        row
        for table in Output.at(job.output, job.storage).iter_tables()
        for row in table.to_pylist()
    ]


def command(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def recommitted(output: Output) -> None:
    """What a retry does to a version: another generation of the unit with the failed row, and the
    manifest anew.
    """
    plan = output.standing_plan()
    (before,) = [record for record in output.records(plan) if record.counts.errors]
    table = output.read_part(part_of(before))
    rows = [row | {"status": "ok", "error_code": None} for row in table.to_pylist()]
    counts = replace(before.counts, ok=before.counts.rows, errors={})
    output.commit(
        before.unit, pa.Table.from_pylist(rows, table.schema), counts, before.generation + 1
    )
    manifest = output.manifest()
    write_manifest(output, plan, manifest.schema, manifest.facts)


def test_a_path_means_the_version_in_force_or_the_one_that_it_names(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = StorageSection()
    with pytest.raises(ConfigError, match="holds no output"):
        find(job.output, storage).output.standing_plan()
    begun = night(job, max_units=1)
    (first,) = Versions.at(job.output, storage).names()
    assert (begun.version, find(job.output, storage).name) == (None, first)
    night(job)
    second = (add(job, "b.jsonl"), night(job).version)[1]
    assert second is not None
    assert find(job.output + "/", storage).name == second
    assert find(f"{job.output}/versions/{first}/", storage).name == first
    monkeypatch.chdir(job.output)
    assert find(f"versions/{first}", storage).versions is not None
    assert find(".", storage).name == second


def test_commands_take_the_version_in_force_and_say_so(job: Job) -> None:
    version = night(job).version
    for words in (
        ("status", job.output),
        ("status", job.output, "--verify"),
        ("report", job.output),
        ("gc", job.output),
    ):
        done = command(*words)
        assert done.exit_code == 0, done.output
        assert f"version {version} is in force" in done.stderr
    assert (Path(job.output) / "versions" / str(version) / "report.html").exists()
    assert night(job).state == "unchanged"  # a report in a version is no stranger


def test_retry_and_then_gc_leave_the_manifest_in_force_whole(job: Job) -> None:
    version = str(night(job).version)
    found = find(job.output, job.storage)
    assert sum(row["status"] == "error" for row in rows_of(job)) == 1
    recommitted(found.output)
    # as after a retry that died before its end
    assert command("gc", f"{job.output}/versions/{version}").exit_code == 0
    assert all(row["status"] == "ok" for row in rows_of(job))
    assert command("gc", job.output).exit_code == 0
    assert all(row["status"] == "ok" for row in rows_of(job))
    assert len(list((Path(job.output) / "versions" / version / "parts").iterdir())) == 3
    assert night(job).counts.errors == {}


def test_a_run_publishes_what_a_retry_that_died_did_not(job: Job) -> None:
    night(job)
    recommitted(find(job.output, job.storage).output)
    # the parts of before are still there
    assert sum(row["status"] == "error" for row in rows_of(job)) == 1
    done = night(job)
    assert (done.state, done.counts.errors) == ("unchanged", {})
    assert all(row["status"] == "ok" for row in rows_of(job))


def test_parts_that_readers_may_open_are_kept(job: Job) -> None:
    night(job)
    found = find(job.output, job.storage)
    recommitted(found.output)
    collect(found.output, found.parts_in_force())
    assert len(rows_of(job)) == 10


def test_a_run_at_work_keeps_other_commands_out(job: Job) -> None:
    night(job)
    with Versions.at(job.output, job.storage).owned():
        for words in (("gc", job.output), ("retry", job.output)):
            done = command(*words)
            assert done.exit_code == 2
            assert "is being written by another driver" in done.stderr
        with pytest.raises(BusyError):
            night(job)
        assert command("status", job.output).exit_code == 0


def test_what_a_dead_run_left_in_the_outputs_own_folder_goes(job: Job) -> None:
    night(job)
    left = Path(job.output) / "tmp" / "0123abcd"
    left.write_text("half a manif")
    night(job)
    assert not left.exists()


@pytest.fixture
def remote(job: Job, s3_server: str) -> Job:
    """The same job with its input and its output in a bucket."""
    bucket, storage = f"s3://{new_bucket(s3_server)}", StorageSection(endpoint_url=s3_server)
    S3(storage).write(f"{bucket}/in/a.jsonl", (Path(job.input[0]) / "a.jsonl").read_bytes())
    return replace(job, input=[f"{bucket}/in/"], output=f"{bucket}/some/out", storage=storage)


def put(job: Job, name: str, num_rows: int = 3) -> None:
    rows = [
        {"id": f"{name}{n}", "text": f"shape {n}", "size": n, "gold": "circle"}
        for n in range(num_rows)
    ]
    S3(job.storage).write(
        f"{job.input[0]}{name}", "".join(json.dumps(row) + "\n" for row in rows).encode()
    )


def test_nights_in_a_bucket(remote: Job) -> None:
    """Parts are copied inside the store, old versions leave nothing behind, and commands find the
    one in force.
    """
    versions = [night(remote).version]
    for number in range(3):
        put(remote, f"b{number}.jsonl")
        done = night(remote)
        assert (done.state, done.processed_rows, done.adopted_units) == ("finished", 3, 3 + number)
        versions.append(done.version)
    S3(remote.storage).delete(f"{remote.input[0]}b0.jsonl")
    done = night(remote)
    assert (done.processed_rows, done.deleted_rows, done.adopted_units) == (0, 3, 6)
    versions.append(done.version)
    assert (
        Versions.at(remote.output, remote.storage).names()
        == versions[-2:]
        == [*versions[-2:-1], done.version]
    )
    objects = [
        each.url
        for page, _ in S3(remote.storage).pages(f"{remote.output}/", deep=True)
        for each in page
    ]
    assert {
        url.removeprefix(f"{remote.output}/").split("/")[1]
        for url in objects
        if "/versions/" in url
    } == set(versions[-2:])
    assert [row["row_key"] for row in rows_of(remote)] == [f"k{n}" for n in range(10)] + [
        f"b{file}.jsonl{n}" for file in (1, 2, 0) for n in range(3)
    ]
    assert night(remote).state == "unchanged"
    assert find(remote.output, remote.storage).name == done.version
    endpoint = ("--endpoint-url", str(remote.storage.endpoint_url))
    recommitted(find(remote.output, remote.storage).output)
    assert command("gc", remote.output, *endpoint).exit_code == 0
    assert command("gc", remote.output, *endpoint).stdout.count("removed parts/") == 1
    assert all(row["status"] == "ok" for row in rows_of(remote))


@pytest.mark.parametrize("what", ["copy", "manifest of the version", "manifest in force"])
def test_an_upload_that_fails_leaves_the_last_manifest_in_force(
    remote: Job, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    night(remote)
    store = S3Store(remote.output, remote.storage)
    before = store.read("manifest.json"), rows_of(remote)
    put(remote, "b.jsonl")
    write, copy = S3Store.write, S3Store.copy

    def failing_write(self: S3Store, name: str, data: bytes) -> None:
        if name == "manifest.json" and (self.url == remote.output) == (what == "manifest in force"):
            raise OSError(f"PUT {self.url}/{name}: the store is gone")
        write(self, name, data)

    def failing_copy(self: S3Store, source: str, name: str) -> None:
        raise OSError(f"COPY {self.url}/{name}: the store is gone")

    with monkeypatch.context() as patch:
        patch.setattr(S3Store, "copy", failing_copy if what == "copy" else copy)
        patch.setattr(S3Store, "write", failing_write if what != "copy" else write)
        with pytest.raises(StorageError, match=r"cannot be written .*the store is gone"):
            night(remote)
    assert (store.read("manifest.json"), rows_of(remote)) == before
    done = night(remote)
    assert (done.state, len(rows_of(remote))) == ("finished", 13)
    assert done.processed_rows == (3 if what == "copy" else 0)
