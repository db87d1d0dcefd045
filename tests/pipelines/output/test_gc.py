"""gc removes what can never count again, and nothing else; verify finds every kind of damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.metrics.counts import Counts
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.lease import own
from glm_batch.pipelines.output.manifest import write_manifest
from glm_batch.pipelines.output.parts import part_of
from glm_batch.pipelines.output.state import collect, verify
from glm_batch.pipelines.storage.storage import StorageError
from tests.pipelines.output.test_commit import SCHEMA, commit, make_plan, rows


@pytest.fixture
def output(tmp_path: Path) -> Output:
    """Two of three units are committed; the first one twice, the second time by a retry."""
    output = Output.at(str(tmp_path / "out"))
    output.begin(make_plan())
    commit(output, 0, "a", "b")
    commit(output, 1, "c", "d")
    output.commit(0, rows("a", "B"), Counts(rows=2, ok=2), generation=2)
    return output


def put(output: Output, name: str, data: bytes = b"1234567") -> str:
    output.store.write(name, data)
    return name


def names(output: Output, folder: str = "parts") -> set[str]:
    return {entry.name for page in output.store.pages(folder) for entry in page}


def test_orphans_go_and_the_rest_stays(output: Output) -> None:
    orphans = {
        put(output, "parts/unit-00000000-g1-dead0000.parquet"),
        put(output, "parts/unit-00000000-g2-dead0000.parquet"),
        put(output, "parts/unit-00000001-g1-dead0000.parquet"),
        put(output, "tmp/4711"),
    }
    waiting = {
        # a worker of a dead retry may still commit it
        put(output, "parts/unit-00000001-g2-beef0000.parquet"),
        put(output, "parts/unit-00000002-g1-beef0000.parquet"),
    }
    foreign = put(output, "parts/notes.txt")
    replaced = {record.part for record in [output.known_record(0, 1)]}
    collected = collect(output)
    assert {entry.name for entry in collected.removed} == orphans | replaced
    assert collected.num_bytes == 4 * 7 + output.known_record(0, 1).num_bytes
    assert collected.waiting == 2
    assert waiting | {foreign} < names(output)
    assert [problem for _, problem in verify(output)] == [None, None]
    assert collect(output).removed == ()


def test_readers_of_a_manifest_keep_their_parts(tmp_path: Path) -> None:
    """A retry that died before it wrote the manifest anew: both generations stay."""
    output = Output.at(str(tmp_path / "out"))
    plan = output.begin(make_plan(num_rows=2))
    commit(output, 0, "a", "b")
    write_manifest(output, plan, SCHEMA, {})
    output.commit(0, rows("a", "B"), Counts(rows=2, ok=2), generation=2)
    assert collect(output).removed == ()
    assert [table["row_key"].to_pylist() for table in output.iter_tables()] == [["a", "b"]]
    write_manifest(output, plan, SCHEMA, {})
    assert len(collect(output).removed) == 1
    assert [table["row_key"].to_pylist() for table in output.iter_tables()] == [["a", "B"]]


def test_only_the_owner_collects(output: Output) -> None:
    with own(output.store), pytest.raises(ConfigError, match="is being written by another driver"):
        collect(output)
    with pytest.raises(ConfigError, match="holds no output"):
        collect(Output.at(output.place + "/elsewhere"))


def test_a_changed_a_short_and_a_lost_part_are_found(output: Output) -> None:
    first, second = output.known_record(0, 2), output.known_record(1, 1)
    data = output.store.read(first.part)
    for damage in (data[:-1], data[:50] + bytes([data[50] ^ 1]) + data[51:]):
        put(output, first.part, damage)
        assert [problem is None for _, problem in verify(output)] == [False, True]
    put(output, first.part, data)
    output.store.delete(second.part)
    (_, sound), (_, lost) = verify(output)
    assert sound is None
    assert lost is not None
    assert "unit-00000001-g1" in lost
    assert "run the job again" in lost


def test_a_part_with_another_number_of_rows_is_found(output: Output) -> None:
    record = output.known_record(1, 1)
    content = json.loads(record.to_json()) | {"rows": 3}
    put(output, "commits/unit-00000001-g1.json", json.dumps(content).encode())
    assert [problem for _, problem in verify(output)][
        1
    ] == f"{record.part} holds 2 rows, its record says 3"


def test_a_manifest_that_says_something_else_is_found(tmp_path: Path) -> None:
    output = Output.at(str(tmp_path / "out"))
    plan = output.begin(make_plan(num_rows=2))
    commit(output, 0, "a", "b")
    write_manifest(output, plan, SCHEMA, {})
    manifest = output.store.read("manifest.json")
    put(
        output,
        "manifest.json",
        manifest.replace(output.known_record(0, 1).checksum.encode(), b"0" * 64),
    )
    ((_, problem),) = verify(output)
    assert "manifest.json says something else" in str(problem)


def test_a_record_that_was_removed_is_committed_again(output: Output) -> None:
    """What the message about a damaged part tells people to do."""
    output.store.delete("commits/unit-00000001-g1.json")
    assert output.generations() == {0: 2}
    again = commit(output, 1, "c", "d")
    assert output.read_part(part_of(again))["row_key"].to_pylist() == ["c", "d"]


def test_a_full_disk_leaves_an_output_that_goes_on(
    output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        full.setattr("glm_batch.pipelines.storage.storage.os.fsync", _no_space)
        with pytest.raises(StorageError, match=r"No space left.*what is committed stays"):
            commit(output, 2, "e")
    plan = output.standing_plan()
    commit(output, 2, "e")
    assert write_manifest(output, plan, SCHEMA, {}).counts.rows == 5


def _no_space(descriptor: int) -> None:
    raise OSError(28, "No space left on device")
