"""Every row of the input is in exactly one unit, whatever the files and the cut; broken files are
named.
"""

from __future__ import annotations

import base64
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_batch.models.engine.api.request import SamplingParams
from glm_batch.models.errors import ConfigError, RowError
from glm_batch.pipelines.graph.steps import Order, Read
from glm_batch.pipelines.input.source import DamagedError, RowRange, Source
from glm_batch.pipelines.input.values import LINE, NUMBER, decode_rows, key_text, row_key
from glm_batch.pipelines.job import CommitSection, Job, StorageSection, TaskConfig
from glm_batch.pipelines.planning.plan import Plan, choose_unit_rows, make_plan, survey_input
from glm_batch.pipelines.storage.s3 import S3
from glm_batch.pipelines.tasks.prompts import cell_text
from tests.s3_faults import new_bucket


def make_job(
    *inputs: Path | str, unit_rows: Any = "auto", key: str | None = None, **changes: Any
) -> Job:
    return Job(
        model="m",
        input=[str(path) for path in inputs],
        output="o",
        key=key,
        task=TaskConfig(kind="choose", prompt="Which? {text}", labels=["a", "b"]),
        commit=CommitSection(unit_rows=unit_rows),
        **changes,
    )


def make_source(*columns: str) -> Source:
    return Source(storage=StorageSection(), columns=columns)


def planned(job: Job, *columns: str) -> tuple[Source, Plan]:
    source = make_source(*(columns or ("text",)))
    return source, make_plan(job, survey_input(job), {})


def texts(source: Source, plan: Plan) -> list[list[Any]]:
    """The texts of each unit, read one by one."""
    found = []
    for unit in plan.units():
        rows = decode_rows(source.read(plan.files[unit.file].file, unit.rows))
        assert len(rows) == unit.num_rows
        found.append([row.code if isinstance(row, RowError) else row["text"] for row in rows])
    return found


def write_parquet(path: Path, values: list[Any], **options: Any) -> Path:
    pq.write_table(pa.table({"text": pa.array(values, pa.string())}), path, **options)
    return path


def write_jsonl(path: Path, values: list[str], end: str = "\n") -> Path:
    path.write_text(
        "\n".join(json.dumps({"text": value, "more": [1]}) for value in values) + end,
        encoding="utf-8",
    )
    return path


def check_line_numbers(table: pa.Table, path: str) -> None:
    """Each row of JSONL says which line of its file it is, empty lines counted."""
    if NUMBER in table.column_names:
        lines = Path(path).read_bytes().split(b"\n")
        assert [lines[number - 1] for number in table[NUMBER].to_pylist()] == table[
            LINE
        ].to_pylist()


# ---- cutting


@settings(deadline=None, max_examples=60)
@given(
    files=st.lists(
        st.tuples(st.integers(0, 40), st.booleans(), st.integers(1, 15)), min_size=1, max_size=4
    ),
    unit_rows=st.integers(1, 17),
    blank=st.lists(st.sampled_from(["", "\r"]), max_size=3),
)
def test_units_cover_all_rows_exactly_once(
    tmp_path_factory: pytest.TempPathFactory,
    files: list[tuple[int, bool, int]],
    unit_rows: int,
    blank: list[str],
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    paths, expected = [], []
    for number, (num_rows, is_parquet, group) in enumerate(files):
        values = [f"{number}-{row} \u00e4\u2028" for row in range(num_rows)]
        expected += values
        if is_parquet:
            paths.append(write_parquet(folder / f"{number}.parquet", values, row_group_size=group))
        else:
            lines = [json.dumps({"text": value}, ensure_ascii=False) for value in values]
            for line in blank:
                lines.insert(group % (len(lines) + 1), line)
            paths.append(folder / f"{number}.jsonl")
            paths[-1].write_text("\n".join(lines), encoding="utf-8", newline="")
    source, plan = planned(make_job(*paths, unit_rows=unit_rows))
    units = texts(source, plan)
    assert [text for unit in units for text in unit] == expected
    assert all(0 < len(unit) <= unit_rows for unit in units)
    assert plan.num_units == len(units)
    assert [unit.index for unit in plan.units()] == list(range(len(units)))
    assert [plan.unit_sizes[unit.index] for unit in plan.units()] == [len(unit) for unit in units]
    for unit in plan.units():
        check_line_numbers(
            source.read(plan.files[unit.file].file, unit.rows), plan.files[unit.file].file.path
        )


def test_units_can_be_read_in_any_order(tmp_path: Path) -> None:
    """A worker goes on where it stopped when it can, and must not rely on it."""
    values = [str(row) for row in range(50)]
    source, plan = planned(
        make_job(write_parquet(tmp_path / "a.parquet", values, row_group_size=12), unit_rows=7)
    )
    units = list(plan.units())
    for unit in [*units[::2], *reversed(units), units[3], units[3]]:
        table = source.read(plan.files[0].file, unit.rows)
        assert table["text"].to_pylist() == values[unit.rows.start : unit.rows.stop]


def test_a_scan_in_small_pieces_finds_the_same_offsets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(
        write_jsonl(tmp_path / "a.jsonl", ["x" * (n % 31) for n in range(100)], end=""), unit_rows=9
    )
    _, whole = planned(job)
    monkeypatch.setattr("glm_batch.pipelines.input.source.SCAN_BYTES", 13)
    _, pieces = planned(job)
    assert pieces.files == whole.files


def test_a_plan_is_the_same_after_it_was_written_and_read(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["x", "y", "x"])
    write_parquet(tmp_path / "b.parquet", ["y", "z"])
    _, plan = planned(make_job(tmp_path, unit_rows=2, key="text"))
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert list(again.units()) == list(plan.units())


@pytest.mark.parametrize(
    ("num_rows", "changes", "expected"),
    [
        (2_000, {}, 62),
        (10, {}, 16),
        (1_000_000, {}, 1000),
        (1_000_000, {"commit": CommitSection(every_seconds=2)}, 100),
        (50_000_000, {}, 1000),
        (400_000_000, {}, 8000),
        (4_000_000_000, {}, 16_777),  # 1,000 bytes a row: the bytes of a unit are bounded
        (
            4_000_000,
            {"task": TaskConfig(kind="generate"), "sampling": SamplingParams(max_tokens=640)},
            80,
        ),
    ],
)
def test_auto_units(num_rows: int, changes: dict[str, Any], expected: int) -> None:
    job = Job(
        **{"model": "m", "input": ["i"], "output": "o", "task": TaskConfig(kind="choose")} | changes
    )
    assert choose_unit_rows(job, num_rows, 1000 * num_rows) == expected


# ---- listing


def test_listing_expands_directories_and_globs_once(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.parquet", "a.parquet", "sub/c.parquet"):
        write_parquet(tmp_path / name, ["x"])
    write_jsonl(tmp_path / "d.jsonl", ["x"])
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "notes.txt").touch()
    source = make_source("text")
    listed = [os.path.relpath(file.path, tmp_path) for file in source.list_files([str(tmp_path)])]
    assert listed == ["a.parquet", "b.parquet", "d.jsonl", "sub/c.parquet"]
    both = source.list_files([str(tmp_path / "b.parquet"), str(tmp_path / "*.parquet")])
    assert [os.path.basename(file.path) for file in both] == ["b.parquet", "a.parquet"]


def test_a_folder_is_read_as_pyarrow_reads_it(tmp_path: Path) -> None:
    """Without temporary and hidden folders, and each file once though a link leads back."""
    for name in ("a", "_temporary/b", ".hidden/c", "year=2025/d", "_e"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_parquet(tmp_path / f"{name}.parquet", ["x"])
    (tmp_path / "linked").symlink_to(tmp_path / "year=2025", target_is_directory=True)
    dataset = pyarrow.dataset.dataset(tmp_path, format="parquet")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    files = make_source("text").list_files([str(tmp_path)])
    names = [os.path.relpath(file.path, tmp_path) for file in files]
    assert names == ["a.parquet", "linked/d.parquet", "year=2025/d.parquet"]
    assert sorted(file.path for file in files) == sorted(dataset.files)


@pytest.mark.parametrize(
    "name", ["b.csv", "B.PARQUET", "b.jsonl.gz", "sub/b.json", "_delta_log/0.json", ".hoodie/x"]
)
def test_a_folder_that_would_be_read_in_part_is_refused(tmp_path: Path, name: str) -> None:
    write_parquet(tmp_path / "a.parquet", ["x"])
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    table = {"_delta_log": "a table of Delta Lake", ".hoodie": "a table of Hudi"}
    message = table.get(name.partition("/")[0], f"{name} in the folder")
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_source("text").list_files([str(tmp_path)])


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("data [v1]", ["data [v1]/d1.parquet", "data [v1]/d[1].parquet"]),
        ("data [v1]/d[1].parquet", ["data [v1]/d[1].parquet"]),
        ("{a,b}.parquet", ["a.parquet", "b.parquet"]),
        ("{a,data?[[]v1]/d1}.parquet", ["a.parquet", "data [v1]/d1.parquet"]),
        ("{x}.parquet", ["{x}.parquet"]),
    ],
)
def test_a_path_that_is_there_is_that_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, names: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data [v1]").mkdir()
    for name in ("a", "b", "{x}", "data [v1]/d[1]", "data [v1]/d1"):
        write_parquet(tmp_path / f"{name}.parquet", ["x"])
    assert [file.name for file in make_source("text").list_files([pattern])] == names


@pytest.mark.parametrize(
    ("pattern", "output"),
    [
        (".", "out"),
        ("in", "in"),
        ("in", "in/deep/out"),
        ("**/*.parquet", "out"),
        ("*/*/*.parquet", "out"),
        ("in/a.parquet", "in"),
    ],
)
def test_an_input_that_meets_its_output_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, output: str
) -> None:
    """A job of every night would have more rows each time."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    write_parquet(tmp_path / "in" / "a.parquet", ["x"])
    write_parquet(tmp_path / "a.parquet", ["x"])
    (tmp_path / "in" / "b").mkdir()
    write_parquet(tmp_path / "in" / "b" / "a.parquet", ["x"])
    with pytest.raises(ConfigError, match="the output '"):
        survey_input(replace(make_job(pattern), output=output))
    survey_input(replace(make_job(pattern), output=str(tmp_path.parent / "elsewhere")))
    survey_input(replace(make_job("in/*.parquet"), output="in/out"))


def test_names_stay_as_the_job_spells_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a.parquet", ["x"])
    monkeypatch.chdir(tmp_path)
    (file,) = make_source("text").list_files(["*.parquet"])
    assert (file.name, file.path) == ("a.parquet", str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("pattern", ["nothing/*.parquet", "absent.parquet", "notes.txt"])
def test_what_is_no_input_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match=pattern.replace("*", r"\*")):
        make_source("text").list_files([pattern])


# ---- broken files


@pytest.mark.parametrize("keep", [0, 3, 100, -4])
def test_a_truncated_parquet_file_is_named(tmp_path: Path, keep: int) -> None:
    path = write_parquet(tmp_path / "cut.parquet", [str(n) for n in range(100)])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        ConfigError, match=r"cut\.parquet cannot be read as Parquet; is it truncated"
    ):
        planned(make_job(path))


def test_a_missing_column_is_told_with_the_nearest_known_one(tmp_path: Path) -> None:
    source = make_source("txt")
    for path in (
        write_parquet(tmp_path / "a.parquet", ["x"]),
        write_jsonl(tmp_path / "b.jsonl", ["x"]),
    ):
        with pytest.raises(
            ConfigError, match=rf"{path.name} has no column 'txt'; did you mean 'text'"
        ):
            source.survey(source.list_files([str(path)]))


def test_a_seek_opens_a_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a store each opening costs a request or two."""
    file = write_parquet(tmp_path / "a.parquet", [str(n) for n in range(100)])
    source = make_source("text")
    (listed,) = source.list_files([str(file)])
    opened: list[str] = []
    open_file = Source.open

    def counting(self: Source, file: Any) -> Any:
        opened.append(file.name)
        return open_file(self, file)

    monkeypatch.setattr(Source, "open", counting)
    for start in (40, 60, 20):  # the second range goes on where the first one ended
        table = source.read(listed, RowRange(start=start, stop=start + 20))
        assert table["text"].to_pylist() == [str(n) for n in range(start, start + 20)]
    assert len(opened) == 2


def test_extension_types_are_refused_before_arrow_revives_them(tmp_path: Path) -> None:
    """Ray registers types whose revival unpickles bytes of the file: the footer is searched, not
    parsed.
    """
    field = pa.field(
        "image",
        pa.binary(),
        metadata={
            "ARROW:extension:name": "ray.data.arrow_pickled_object",
            "ARROW:extension:metadata": "",
        },
    )
    table = pa.table({"text": ["x"], "image": [b"y"]}).cast(
        pa.schema([("text", pa.string()), field])
    )
    pq.write_table(table, tmp_path / "a.parquet")
    footer = pq.read_metadata(tmp_path / "a.parquet").metadata[b"ARROW:schema"]
    assert b"ARROW:extension:name" in base64.b64decode(footer)
    with pytest.raises(
        ConfigError,
        match=r"a\.parquet has a column of an Arrow extension type.*arrow_pickled_object",
    ):
        planned(make_job(tmp_path / "a.parquet"))


def test_types_that_do_not_go_together_name_both_files(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["x"])
    pq.write_table(pa.table({"text": [[1]]}), tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match=r"b\.parquet do not go with those of .*a\.parquet"):
        planned(make_job(tmp_path))


def test_a_file_that_changed_after_the_plan_is_noticed(tmp_path: Path) -> None:
    for path in (
        write_parquet(tmp_path / "a.parquet", list("abc")),
        write_jsonl(tmp_path / "b.jsonl", list("abc")),
    ):
        source, plan = planned(make_job(path, unit_rows=2))
        write_parquet(path, ["a"]) if path.suffix == ".parquet" else write_jsonl(
            path, ["abcdefghijk"]
        )
        with pytest.raises(ConfigError, match="has changed since the job was planned"):
            texts(source, plan)


# ---- rows


def test_bad_lines_are_typed_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "first"}\n{"text": \n[1]\n\xff\n{"text": "last"}\r\n'
        + b"[" * 100_000
        + b"\n9" * 1
    )
    source, plan = planned(make_job(path))
    assert texts(source, plan) == [
        ["first", "bad_json", "bad_json", "not_utf8", "last", "bad_json", "bad_json"]
    ]


def test_parquet_text_that_is_no_utf8_comes_as_bytes(tmp_path: Path) -> None:
    broken = pa.array([b"good", b"\xff", None], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    source, plan = planned(make_job(tmp_path / "a.parquet"))
    assert texts(source, plan) == [["good", b"\xff", None]]


def test_a_date_that_python_cannot_hold_harms_its_own_row(tmp_path: Path) -> None:
    dates = pa.array([0, 2**40, None], pa.timestamp("s"))
    pq.write_table(pa.table({"text": dates}), tmp_path / "a.parquet", version="2.6")
    source, plan = planned(make_job(tmp_path / "a.parquet"))
    ((first, late, nothing),) = texts(source, plan)
    assert (str(first), nothing) == ("1970-01-01 00:00:00", None)
    with pytest.raises(RowError, match="wrong_type"):
        cell_text({"text": late}, "text")


@pytest.mark.parametrize(
    ("value", "code"),
    [(None, "null_key"), ([1], "wrong_type"), (1.5, "wrong_type"), ("\ud800", "wrong_type")],
)
def test_keys_that_are_none(value: Any, code: str) -> None:
    with pytest.raises(RowError) as caught:
        key_text({"id": value}, "id")
    assert caught.value.code == code


def test_integer_keys_are_their_digits() -> None:
    assert key_text({"id": 7}, "id") == "7"


# ---- s3


@pytest.fixture
def bucket(s3_server: str, tmp_path: Path) -> tuple[str, StorageSection]:
    """A bucket with two inputs of 20 rows each, and things beside them that are none."""
    values = [str(n) for n in range(20)]
    objects = {
        "in/a.parquet": write_parquet(
            tmp_path / "a.parquet", values, row_group_size=6
        ).read_bytes(),
        "in/sub/b.jsonl": write_jsonl(tmp_path / "b.jsonl", values).read_bytes(),
        "in/_SUCCESS": b"",
        "in/notes.txt": b"none",
        "inner/c.parquet": b"",
    }
    storage = StorageSection(endpoint_url=s3_server)
    name = f"s3://{new_bucket(s3_server)}"
    for key, data in objects.items():
        S3(storage).write(f"{name}/{key}", data)
    return name, storage


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("in", ["in/a.parquet", "in/sub/b.jsonl"]),
        ("in/", ["in/a.parquet", "in/sub/b.jsonl"]),
        ("in/*.parquet", ["in/a.parquet"]),
        ("in/**/*.jsonl", ["in/sub/b.jsonl"]),
        ("i?/su[b]/*", ["in/sub/b.jsonl"]),
        ("in/sub/b.jsonl", ["in/sub/b.jsonl"]),
    ],
)
def test_objects_are_listed_and_read_like_files(
    bucket: tuple[str, StorageSection], pattern: str, names: list[str]
) -> None:
    root, storage = bucket
    job = make_job(f"{root}/{pattern}", unit_rows=8, storage=storage)
    source = Source(storage=storage, columns=("text",))
    plan = make_plan(job, survey_input(job), {})
    assert [planned.file.name for planned in plan.files] == [f"{root}/{name}" for name in names]
    assert [text for unit in texts(source, plan) for text in unit] == [
        str(n) for n in range(20)
    ] * len(names)


@pytest.mark.parametrize("pattern", ["absent/*.parquet", "absent", "in/a.parq", "in/notes.txt"])
def test_objects_that_are_no_input_are_refused_by_name(
    bucket: tuple[str, StorageSection], pattern: str
) -> None:
    root, storage = bucket
    with pytest.raises(ConfigError, match=re.escape(pattern)):
        Source(storage=storage, columns=("text",)).list_files([f"{root}/{pattern}"])


@pytest.mark.parametrize("name", ["in/a.parquet", "in/sub/b.jsonl"])
def test_an_object_that_was_replaced_after_the_plan_is_noticed(
    bucket: tuple[str, StorageSection], name: str
) -> None:
    """Also by one of the same length: its tag tells."""
    root, storage = bucket
    job = make_job(f"{root}/{name}", unit_rows=8, storage=storage)
    source = Source(storage=storage, columns=("text",))
    plan = make_plan(job, survey_input(job), {})
    data = S3(storage).read(f"{root}/{name}")
    S3(storage).write(f"{root}/{name}", data.replace(b"7", b"8"))
    with pytest.raises(ConfigError, match="has changed since the job was planned"):
        texts(source, plan)


def test_a_listing_of_many_pages_is_whole(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, bucket = StorageSection(endpoint_url=s3_server), new_bucket(s3_server)
    monkeypatch.setattr("glm_batch.pipelines.storage.s3.PAGE_KEYS", 3)
    for number in range(11):
        S3(storage).write(f"s3://{bucket}/in/{number:02d}.jsonl", b"{}")
    files = Source(storage=storage, columns=()).list_files([f"s3://{bucket}/in"])
    assert [file.name[-8:] for file in files] == [f"{number:02d}.jsonl" for number in range(11)]


def test_objects_are_taken_as_files_are(s3_server: str) -> None:
    """Brackets in names, folders that are left out, and an output within its input."""
    storage, bucket = StorageSection(endpoint_url=s3_server), new_bucket(s3_server)
    root = f"s3://{bucket}/in"
    for name in ("d[1]", "d1", "_temporary/x", ".hidden/x"):
        S3(storage).write(f"{root}/{name}.jsonl", b'{"text": "x"}')
    source = Source(storage=storage, columns=())
    assert [file.name for file in source.list_files([f"{root}/d[1].jsonl"])] == [
        f"{root}/d[1].jsonl"
    ]
    assert [file.name[len(root) :] for file in source.list_files([root])] == [
        "/d1.jsonl",
        "/d[1].jsonl",
    ]
    job = make_job(root, storage=storage)
    for output in (f"{root}/out", root):
        with pytest.raises(ConfigError, match="the output '"):
            survey_input(replace(job, output=output))
    survey_input(replace(job, output=f"s3://{bucket}/in2"))


def test_a_damaged_row_group_costs_its_rows(tmp_path: Path) -> None:
    table = pa.table(
        {"id": [f"r{row}" for row in range(90)], "text": [f"text {row}" for row in range(90)]}
    )
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=30, use_dictionary=False)
    start = pq.read_metadata(path).row_group(1).column(1).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 8] = b"\xff" * 8
    path.write_bytes(data)
    source = make_source("id", "text")
    (file,) = source.list_files([str(path)])
    order = Order(unit=0, file=file, rows=RowRange(start=10, stop=80), earlier={15: "a:1"})
    with pytest.raises(DamagedError, match=r"a\.parquet is damaged at rows 10 to 79"):
        source.read(file, order.rows)
    read = Read(source)(order.to_table(), 0, 70)
    lost = [row for row, text in enumerate(read["#lost"].to_pylist(), start=10) if text]
    assert lost == list(range(30, 60))
    assert read["#row"].to_pylist() == [row_key(file, row) for row in range(10, 80)]
    assert read["in.text"].to_pylist() == [
        None if row in lost else f"text {row}" for row in range(10, 80)
    ]
    assert read["#first"].to_pylist().index("a:1") == 15
    pieces = [Read(source)(order.to_table(), at, min(at + 7, 70)) for at in range(0, 70, 7)]
    assert pa.concat_tables(pieces).to_pylist()[:20] == read.to_pylist()[:20]
