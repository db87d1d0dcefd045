"""Outputs as table files: every row once and in order, in each format, with the input's columns."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from glm_batch.jobs.__main__ import app
from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.cron.versions import Versions
from glm_batch.pipelines.export.table_files import FORMATS, Target, write_tables
from glm_batch.pipelines.job import Job, StorageSection, TaskConfig
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.manifest import write_manifest
from glm_batch.pipelines.output.parts import part_of
from glm_batch.pipelines.planning.plan import make_plan, survey_input
from glm_batch.pipelines.storage.storage import open_store
from glm_batch.pipelines.tasks.kinds import ROW_COLUMNS
from tests.pipelines.report.world import (
    LABELS,
    TOKENS,
    TYPES,
    a_job,
    choose_job,
    chosen,
    commit_rows,
    counts_of,
    row,
)
from tests.s3_faults import new_bucket

ROWS = 47
FILES = {"parquet": pq.read_table, "arrow": lambda path: pa.ipc.open_file(path).read_all()}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return choose_job(tmp_path)


@pytest.fixture
def output(job: Job) -> Output:
    answers = [
        {"error_code": "null_prompt"} if n % 9 == 3 else chosen([n / ROWS, 1 - n / ROWS, 0])
        for n in range(ROWS)
    ]
    rows = pa.table({"id": list(range(ROWS)), "text": [f"t {n}" for n in range(ROWS)],
                     "gold": ["red"] * ROWS, "row_key": ["own"] * ROWS, "raw": [b"\xff\0"] * ROWS})  # fmt: skip
    return commit_rows(job, rows, answers)


def rows_of(output: Output) -> pa.Table:
    return pa.concat_tables(output.iter_tables())


@pytest.mark.parametrize("form", FILES)
def test_a_file_holds_the_rows_as_they_are(form: str, output: Output, tmp_path: Path) -> None:
    target = Target(path=str(tmp_path / f"to.{form}"), form=form)
    made = write_tables(output, None, target)
    assert (made.rows, made.files) == (ROWS, 1)
    assert FILES[form](target.path).combine_chunks().equals(rows_of(output).combine_chunks())
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "in.parquet",
        "model",
        "out",
        f"to.{form}",
    ]


def test_texts_hold_the_rows_too(output: Output, tmp_path: Path) -> None:
    expected = rows_of(output).to_pylist()
    for form in ("jsonl", "csv"):
        write_tables(output, None, Target(path=str(tmp_path / f"to.{form}"), form=form))
    lines = (tmp_path / "to.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == expected
    found = pyarrow.csv.read_csv(tmp_path / "to.csv").to_pylist()
    assert [each["row_key"] for each in found] == list(range(ROWS))
    probs = [json.loads(each["label_probs"]) if each["label_probs"] else None for each in found]
    assert probs == [each["label_probs"] for each in expected]


@pytest.mark.parametrize("file_rows", [1, 10, 17, 46, 47, 1000])
def test_a_directory_holds_files_of_so_many_rows(
    file_rows: int, output: Output, tmp_path: Path
) -> None:
    target = Target(path=str(tmp_path / "to"), form="parquet", file_rows=file_rows)
    made = write_tables(output, None, target)
    files = sorted((tmp_path / "to").iterdir())
    sizes = [pq.read_metadata(file).num_rows for file in files]
    assert made.files == len(files) == -(-ROWS // file_rows)
    assert sizes[:-1] == [file_rows] * (len(files) - 1)
    assert sum(sizes) == ROWS
    found = pa.concat_tables([pq.read_table(file) for file in files])
    assert found.combine_chunks().equals(rows_of(output).combine_chunks())


@pytest.mark.parametrize("form", FORMATS)
def test_an_output_without_rows_is_a_file_without_rows(form: str, tmp_path: Path) -> None:
    job = choose_job(tmp_path)
    rows = pa.table({"id": pa.array([], pa.int64()), "text": pa.array([], pa.string()),
                     "gold": pa.array([], pa.string())})  # fmt: skip
    output = commit_rows(job, rows, [])
    made = write_tables(output, job, Target(path=str(tmp_path / f"to.{form}"), form=form))
    assert (made.rows, made.files) == (0, 1)


def test_the_columns_of_the_input_come_with_the_rows(
    output: Output, job: Job, tmp_path: Path
) -> None:
    write_tables(output, job, Target(path=str(tmp_path / "to.parquet"), form="parquet"))
    found, given = pq.read_table(tmp_path / "to.parquet"), pq.read_table(job.input[0])
    for name in ("id", "text", "gold", "raw"):
        assert found[name].combine_chunks().equals(given[name].combine_chunks())
    assert found["input.row_key"].to_pylist() == ["own"] * ROWS
    assert found["row_key"].to_pylist() == [str(n) for n in range(ROWS)]


def test_files_of_other_types_keep_their_values(tmp_path: Path) -> None:
    """Numbers that one type holds get it; others stand as JSON text, and so does what is mixed."""
    lines = [
        {"id": "a", "text": "x", "n": 1, "wide": 2**60, "mixed": "12", "deep": {"k": 1}},
        {"id": "b", "text": "y", "n": 2.5, "wide": 0.5, "mixed": 12, "deep": {"k": 1, "l": [2]}},
    ]
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + "no json\n"
    )
    first = {"id": ["p", "q"], "text": ["1", "2"], "kind": pa.array(["k", "k"]).dictionary_encode(),
             "n": pa.array([3, None], pa.int16()),
             "only": pa.array([1, 2], pa.uint8())}  # fmt: skip
    pq.write_table(pa.table(first), tmp_path / "a.parquet")
    job = a_job(tmp_path, TaskConfig(kind="choose", prompt="{text}", labels=LABELS))
    object.__setattr__(job, "input", [str(tmp_path / "a.parquet"), str(tmp_path / "b.jsonl")])
    keys = [*"pqab", "line 3"]
    output = commit_planned(job, keys)
    write_tables(output, job, Target(path=str(tmp_path / "to.parquet"), form="parquet"))
    found = pq.read_table(tmp_path / "to.parquet")
    assert found["row_key"].to_pylist() == keys
    assert found["n"].to_pylist() == [3.0, None, 1.0, 2.5, None]
    assert found["only"].to_pylist() == [1, 2, None, None, None]
    assert found["kind"].to_pylist() == ["k", "k", None, None, None]
    assert found["text"].to_pylist() == ["1", "2", "x", "y", None]
    told = {
        name: [v and json.loads(v) for v in found[name].to_pylist()]
        for name in ("wide", "mixed", "deep")
    }
    assert told == {name: [None, None, *(line[name] for line in lines), None] for name in told}
    assert found["mixed"].to_pylist()[2:4] == ['"12"', "12"]
    assert found.schema.field("wide").type == pa.string()


def commit_planned(job: Job, keys: list[str]) -> Output:
    """Commits an answer for each row of files that are there."""
    output, known = Output.at(job.output), {"task": {"kind": job.task.kind}, "input": {}}
    plan = output.begin(make_plan(job, survey_input(job), known))
    types = TYPES[job.task.kind] | dict.fromkeys(TOKENS, pa.int32())
    schema, left = pa.schema(ROW_COLUMNS | types), iter(keys)
    for unit in plan.units():
        rows = [{"row_key": next(left), **row(**chosen([1, 0, 0]))} for _ in range(unit.num_rows)]
        table = pa.Table.from_pylist(rows, schema)
        output.commit(unit.index, table, counts_of(table))
    write_manifest(output, plan, schema, {})
    return output


def test_a_retried_row_is_there_once(output: Output, job: Job, tmp_path: Path) -> None:
    plan = output.standing_plan()
    record = output.record(2)
    assert record is not None
    part = output.read_part(part_of(record))
    again = pa.Table.from_pylist(
        [{**each, "attempts": 2} for each in part.to_pylist()], part.schema
    )
    output.commit(2, again, counts_of(again), generation=2)
    old = write_tables(output, None, Target(path=str(tmp_path / "old.parquet"), form="parquet"))
    write_manifest(output, plan, part.schema, {})
    new = write_tables(output, job, Target(path=str(tmp_path / "new.parquet"), form="parquet"))
    assert (old.rows, new.rows) == (ROWS, ROWS)  # before and after the retry is published
    for name, attempts in (("old", 1), ("new", 2)):
        found = pq.read_table(tmp_path / f"{name}.parquet")
        assert found["row_key"].to_pylist() == [str(n) for n in range(ROWS)]
        assert found["attempts"].to_pylist()[20:30] == [attempts] * 10


def test_the_version_in_force_of_a_cron_output(tmp_path: Path) -> None:
    name, job = "2026-11-20T02-00-00Z", choose_job(tmp_path)
    versions = Versions.at(job.output, StorageSection())
    versions.prepare()
    object.__setattr__(job, "output", f"{job.output}/versions/{name}")
    rows = pa.table({"id": [1, 2], "text": ["a", "b"], "gold": ["red"] * 2})
    commit_rows(job, rows, [chosen([1, 0, 0])] * 2)
    versions.publish(name)
    done = CliRunner().invoke(
        app, ["export", versions.path, "--to", str(tmp_path / "to.csv"), "--with-input"]
    )
    assert done.exit_code == 0, done.output
    assert "2 rows, 1 file\n" in done.stdout
    assert pyarrow.csv.read_csv(tmp_path / "to.csv")["text"].to_pylist() == ["a", "b"]


def test_what_cannot_be_exported_is_refused(output: Output, job: Job, tmp_path: Path) -> None:
    def refused(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["export", *arguments])
        assert done.exit_code == 2, done.output
        return done.stderr

    place = job.output
    assert "none; known: parquet, arrow" in refused(place, "--to", "x", "--format", "xls")
    assert "names no format" in refused(place, "--to", str(tmp_path / "x.xls"))
    assert "lies in the output" in refused(place, "--to", f"{place}/x.csv")
    assert "is not empty" in refused(place, "--to", str(tmp_path))
    assert "no output of glm-batch" in refused(
        str(tmp_path / "none"), "--to", str(tmp_path / "x.csv")
    )
    with open(job.input[0], "ab") as stream:
        stream.write(b"\0")
    assert "has changed" in refused(place, "--to", str(tmp_path / "x.csv"), "--with-input")
    assert not (tmp_path / "x.csv").exists()
    (Path(place) / "manifest.json").unlink()
    assert "not finished" in refused(place, "--to", str(tmp_path / "x.csv"))


def test_a_file_that_cannot_be_ended_leaves_nothing(output: Output, tmp_path: Path) -> None:
    part = sorted((Path(output.place) / "parts").iterdir())[-1]
    part.write_bytes(b"broken")
    (tmp_path / "to.csv").write_text("what stood there")
    with pytest.raises(ConfigError, match="is gone or is not what was written"):
        write_tables(output, None, Target(path=str(tmp_path / "to.csv"), form="csv"))
    assert (tmp_path / "to.csv").read_text() == "what stood there"
    assert not list(tmp_path.glob(".to.csv*"))


def test_an_output_and_a_target_in_s3(s3_server: str, tmp_path: Path) -> None:
    bucket, job = f"s3://{new_bucket(s3_server)}", choose_job(tmp_path)
    object.__setattr__(job, "output", f"{bucket}/out")
    object.__setattr__(job, "storage", StorageSection(endpoint_url=s3_server))
    rows = pa.table({"id": [1, 2, 3], "text": ["a", "b", "c"], "gold": ["red"] * 3})
    commit_rows(job, rows, [chosen([1, 0, 0])] * 3)
    options = ["--endpoint-url", s3_server, "--file-rows", "2", "--with-input"]
    done = CliRunner().invoke(app, ["export", job.output, "--to", f"{bucket}/to", *options])
    assert done.exit_code == 0, done.output
    store = open_store(f"{bucket}/to", job.storage)
    names = [entry.name for page in store.pages() for entry in page]
    assert names == ["part-00000.parquet", "part-00001.parquet"]
    found = [pq.read_table(pa.BufferReader(store.read(name)))["text"].to_pylist() for name in names]
    assert found == [["a", "b"], ["c"]]
