"""The commit protocol: the first writer wins, nothing half-written counts, and no job writes over
another.
"""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.input.listing import InputFile
from glm_batch.pipelines.metrics.counts import Counts
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.manifest import write_manifest
from glm_batch.pipelines.output.parts import CommitRecord
from glm_batch.pipelines.output.state import status_of
from glm_batch.pipelines.planning.plan import Plan, PlannedFile
from glm_batch.pipelines.storage.storage import LocalStore, StorageError

SCHEMA = pa.schema({"row_key": pa.string()})


def make_plan(num_rows: int = 5, unit_rows: int = 2, **identity: Any) -> Plan:
    file = InputFile(name="a.parquet", path="/data/a.parquet", size=1, stamp="1")
    return Plan(
        identity={"task": {"prompt": "Which?"}} | identity,
        unit_rows=unit_rows,
        files=(PlannedFile(file=file, num_rows=num_rows),),
        duplicates={},
        schema=SCHEMA,
    )


def rows(*keys: str) -> pa.Table:
    return pa.table({"row_key": list(keys)})


def root(output: Output) -> Path:
    return Path(output.place)


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return Output.at(str(tmp_path / "out"))


def commit(output: Output, unit: int, *keys: str) -> CommitRecord:
    return output.commit(unit, rows(*keys), Counts(rows=len(keys), ok=len(keys)))


def test_a_unit_becomes_one_part_with_its_checksum(output: Output) -> None:
    output.begin(make_plan())
    record = commit(output, 1, "a", "b")
    data = (root(output) / record.part).read_bytes()
    assert record.part.startswith("parts/unit-00000001-g1-")
    assert (record.rows, record.num_bytes, record.checksum) == (
        2,
        len(data),
        hashlib.sha256(data).hexdigest(),
    )
    assert output.record(1) == record
    assert list((root(output) / "tmp").iterdir()) == []


def test_the_first_commit_of_a_unit_counts(output: Output) -> None:
    output.begin(make_plan())
    first = commit(output, 0, "a", "b")
    assert commit(output, 0, "c", "d") == first
    assert len(list((root(output) / "parts").iterdir())) == 1


def test_of_many_racing_writers_one_wins_and_all_hear_of_it(
    output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    output.begin(make_plan())
    barrier = threading.Barrier(8)
    create = LocalStore.create

    def create_together(self: LocalStore, name: str, data: bytes) -> bool:
        barrier.wait()
        return create(self, name, data)

    monkeypatch.setattr(LocalStore, "create", create_together)
    found: list[CommitRecord] = []
    threads = [
        threading.Thread(target=lambda key: found.append(commit(output, 0, key)), args=(str(n),))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert {record.part for record in found} == {output.record(0).part}  # type: ignore[union-attr]
    assert [f"parts/{path.name}" for path in (root(output) / "parts").iterdir()] == [found[0].part]


def test_the_manifest_names_every_part_in_input_order(output: Output) -> None:
    plan = output.begin(make_plan())
    for unit, keys in ((2, "e"), (0, "ab"), (1, "cd")):
        commit(output, unit, *keys)
    assert not status_of(output).finished
    manifest = write_manifest(output, plan, SCHEMA, {"end_counted": False})
    assert [key for table in output.iter_tables() for key in table["row_key"].to_pylist()] == list(
        "abcde"
    )
    assert manifest.counts == Counts(rows=5, ok=5)
    assert (manifest.fingerprint, manifest.facts) == (plan.fingerprint, {"end_counted": False})
    assert write_manifest(output, plan, SCHEMA, {}) == manifest


def test_readers_see_the_parts_of_the_manifest_alone(output: Output) -> None:
    plan = output.begin(make_plan(num_rows=2))
    commit(output, 0, "a", "b")
    pq.write_table(rows("stray"), root(output) / "parts" / "unit-00000000-dead.parquet")
    write_manifest(output, plan, SCHEMA, {})
    assert sum(table.num_rows for table in output.iter_tables()) == 2


def test_the_manifest_waits_for_all_units(output: Output) -> None:
    plan = output.begin(make_plan())
    commit(output, 0, "a", "b")
    with pytest.raises(RuntimeError, match="1 of 3 units with 2 of 5 rows"):
        write_manifest(output, plan, SCHEMA, {})
    with pytest.raises(ConfigError, match="not finished"):
        output.manifest()


def test_a_committed_part_that_is_gone_is_noticed(output: Output) -> None:
    plan = output.begin(make_plan(num_rows=2))
    (root(output) / commit(output, 0, "a", "b").part).unlink()
    with pytest.raises(ConfigError, match="is gone or is not what was written"):
        write_manifest(output, plan, SCHEMA, {})


def test_a_rerun_takes_up_the_plan_that_stands(output: Output) -> None:
    plan = output.begin(make_plan(unit_rows=2))
    assert output.adopt(plan.identity) == plan
    assert output.begin(make_plan(unit_rows=3)).unit_rows == 2


def test_another_job_is_refused_with_the_difference(output: Output) -> None:
    output.begin(make_plan(sampling={"seed": 0}))
    with pytest.raises(
        ConfigError, match=r"(?s)begun by another job.*sampling\.seed: 0 -> 7"
    ) as caught:
        output.adopt(make_plan(sampling={"seed": 7}).identity)
    assert "task.prompt" not in str(caught.value)


@pytest.mark.parametrize("name", ["notes.txt", "parts/other.parquet"])
def test_a_directory_of_other_things_is_refused(output: Output, name: str) -> None:
    (root(output) / name).parent.mkdir(parents=True)
    (root(output) / name).touch()
    with pytest.raises(ConfigError, match="holds something else"):
        output.adopt({})


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        Output.at(str(tmp_path / "file")).adopt({})


def test_a_part_that_could_not_be_written_leaves_nothing(
    output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    output.begin(make_plan())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("glm_batch.pipelines.storage.storage.os.fsync", full)
    with pytest.raises(StorageError, match=r"No space.*run the same command again"):
        commit(output, 0, "a")
    assert not any(any((root(output) / folder).iterdir()) for folder in ("parts", "commits", "tmp"))


def test_status_adds_up_what_is_committed(output: Output) -> None:
    output.begin(make_plan())
    commit(output, 2, "e")
    status = status_of(output)
    assert (status.num_rows, status.num_units, status.units_done, status.finished) == (
        5,
        3,
        1,
        False,
    )
    assert status.counts == Counts(rows=1, ok=1)
    with pytest.raises(ConfigError, match="holds no output"):
        status_of(Output.at(str(root(output) / "parts")))


def test_records_are_json_that_people_can_read(output: Output) -> None:
    output.begin(make_plan())
    commit(output, 0, "a")
    record = json.loads((root(output) / "commits" / "unit-00000000-g1.json").read_text())
    assert record["id"] == "unit-00000000"
    assert record["counts"]["ok"] == 1


def test_a_later_generation_of_a_record_counts(output: Output) -> None:
    plan = output.begin(make_plan(num_rows=2))
    commit(output, 0, "a", "b")
    first = write_manifest(output, plan, SCHEMA, {})
    second = output.commit(0, rows("a", "c"), Counts(rows=2, ok=2), generation=2)
    assert output.commit(0, rows("a", "d"), Counts(rows=2, ok=2), generation=2) == second
    assert list(output.records(plan)) == [second]
    # Readers go on with the first until the manifest is written anew.
    assert [table["row_key"].to_pylist() for table in output.iter_tables()] == [["a", "b"]]
    assert write_manifest(output, plan, SCHEMA, {}) != first
    assert [table["row_key"].to_pylist() for table in output.iter_tables()] == [["a", "c"]]


def test_a_part_that_was_changed_is_noticed_by_its_reader(output: Output) -> None:
    plan = output.begin(make_plan(num_rows=2))
    record = commit(output, 0, "a", "b")
    write_manifest(output, plan, SCHEMA, {})
    path = root(output) / record.part
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"unit-00000000-g1.*is not what was written"):
        list(output.iter_tables())


def test_counts_add_up() -> None:
    one = Counts(rows=3, ok=1, errors={"bad_json": 2}, prompt_tokens=4, gold_rows=1, gold_correct=1)
    two = Counts(rows=1, errors={"bad_json": 1}, gold_rows=3)
    total = one + two
    assert total == Counts(
        rows=4, ok=1, errors={"bad_json": 3}, prompt_tokens=4, gold_rows=4, gold_correct=1
    )
    assert (total.error_rows, total.error_rate, total.accuracy) == (3, 0.75, 0.25)
    assert Counts.from_json(json.loads(json.dumps(total.to_json()))) == total
