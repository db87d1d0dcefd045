"""The plan of a job: its fingerprint, its input files and how they are cut into units.

The plan decides everything that a rerun must find again, so it is written once and read back by
every later run: unit ids, duplicate keys and carried types do not depend on what a rerun would
compute.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from glm_batch.models import rooms
from glm_batch.models.checkpoint.config_reader import load_config
from glm_batch.models.checkpoint.directory import model_digest
from glm_batch.models.errors import ConfigError, RowError
from glm_batch.models.request_limits import CHAT_TOKENS
from glm_batch.pipelines.input.listing import InputFile, check_apart
from glm_batch.pipelines.input.source import RowRange, Source, Survey
from glm_batch.pipelines.input.values import (
    InputRow,
    Row,
    decode_rows,
    find_duplicates,
    parse_line,
    row_key,
    split_lines,
)
from glm_batch.pipelines.job import Job, task_identity
from glm_batch.pipelines.tasks.job_media import media_row_bytes, reads_media
from glm_batch.pipelines.tasks.prompts import input_columns

FORMAT = 1
REQUESTS = "pipelines.openai_batch.requests"
MAX_UNIT_ROWS = 1000
MIN_UNIT_ROWS = 16
# more rows than this many full units: larger units, so that what is kept of each stays small
MANY_UNITS = 50_000
MAX_UNIT_ROWS_OF_MANY = 20_000
MAX_UNIT_BYTES = 16 << 20  # of input files, for such units
WANTED_UNITS = 32  # fewer rows than this many full units: smaller units, for progress one can watch
SCORED_ROWS_PER_S = 50.0  # a careful guess at one CPU replica's speed, for commit.every_seconds
GENERATED_TOKENS_PER_S = 640.0
HEAVY_UNIT_BYTES = 32 << 20  # a unit travels as one block: several of them wait between two stages
SAMPLED_ROWS = 16
SAMPLED_REQUESTS = 1000

Identity = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """The rows [rows.start, rows.stop) of file number `file`, which are committed together."""

    index: int
    file: int
    rows: RowRange

    @property
    def id(self) -> str:
        return unit_id(self.index)

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFile:
    """A counted input file. `offsets` (JSONL) are the byte where each unit starts, and the end.

    `lines` (JSONL) are the numbers of the lines with which the units start, where empty lines make
    them other than the rows' numbers. `longest_line` in bytes is known when the file has just been
    scanned. `digests`, where pipelines.cron.changes has made them, tell each unit's rows from
    others.
    """

    file: InputFile
    num_rows: int
    offsets: tuple[int, ...] = ()
    lines: tuple[int, ...] = ()
    longest_line: int = field(default=0, compare=False)
    digests: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What stands in plan.json. Units follow from it, so it stays small for a billion rows.

    The last `num_deleted` files are no longer part of the input: what was committed of them is
    kept.
    """

    identity: Identity
    unit_rows: int
    files: tuple[PlannedFile, ...]
    duplicates: Mapping[InputRow, InputRow]
    schema: pa.Schema
    num_deleted: int = 0

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.identity)

    @cached_property
    def num_rows(self) -> int:
        return sum(file.num_rows for file in self.files)

    @cached_property
    def num_units(self) -> int:
        return self.units_of(self.files)

    def units_of(self, files: Sequence[PlannedFile]) -> int:
        """How many units these files make."""
        return sum(-(-file.num_rows // self.unit_rows) for file in files)

    @property
    def present(self) -> tuple[PlannedFile, ...]:
        """The files that are part of the input."""
        return self.files[: len(self.files) - self.num_deleted]

    @property
    def deleted(self) -> tuple[PlannedFile, ...]:
        """The files whose rows are kept though they are part of the input no more."""
        return self.files[len(self.files) - self.num_deleted :]

    @property
    def unit_sizes(self) -> UnitSizes:
        return UnitSizes(self.unit_rows, tuple(file.num_rows for file in self.files))

    def units(self) -> Iterator[Unit]:
        """All units in the order of the input."""
        index = 0
        for number, planned in enumerate(self.files):
            for k, start in enumerate(range(0, planned.num_rows, self.unit_rows)):
                start_byte, stop_byte = planned.offsets[k : k + 2] if planned.offsets else (0, 0)
                stop = min(start + self.unit_rows, planned.num_rows)
                line = planned.lines[k] if planned.lines else start + 1
                rows = RowRange(
                    start=start,
                    stop=stop,
                    start_byte=start_byte,
                    stop_byte=stop_byte,
                    start_line=line,
                )
                yield Unit(index=index, file=number, rows=rows)
                index += 1

    def duplicates_by_unit(self) -> dict[tuple[int, int], dict[int, str]]:
        """(file, first row of a unit) -> row in the unit -> key of the row that came first."""
        found: dict[tuple[int, int], dict[int, str]] = {}
        for (file, row), (first_file, first_row) in self.duplicates.items():
            start = row - row % self.unit_rows
            found.setdefault((file, start), {})[row - start] = row_key(
                self.files[first_file].file, first_row
            )
        return found

    def to_json(self) -> bytes:
        files = [
            asdict(planned.file)
            | {"rows": planned.num_rows}
            | {name: list(getattr(planned, name)) for name in ("offsets", "lines", "digests")}
            for planned in self.files
        ]
        content = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "job": self.identity,
            "unit_rows": self.unit_rows,
            "rows": self.num_rows,
            "units": self.num_units,
            "files": files,
            "deleted": self.num_deleted,
            "duplicates": [[*place, *first] for place, first in self.duplicates.items()],
            "input_schema": base64.b64encode(self.schema.serialize().to_pybytes()).decode(),
        }
        return json.dumps(content, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Plan:
        content = json.loads(data)
        files = tuple(
            PlannedFile(
                file=InputFile(**{name: entry[name] for name in ("name", "path", "size", "stamp")}),
                num_rows=entry["rows"],
                offsets=tuple(entry["offsets"]),
                lines=tuple(entry.get("lines", ())),
                digests=tuple(entry.get("digests", ())),
            )
            for entry in content["files"]
        )
        return cls(
            identity=content["job"],
            unit_rows=content["unit_rows"],
            files=files,
            duplicates={(file, row): (at, first) for file, row, at, first in content["duplicates"]},
            schema=pa.ipc.read_schema(pa.py_buffer(base64.b64decode(content["input_schema"]))),
            num_deleted=content.get("deleted", 0),
        )


@dataclass(frozen=True, slots=True)
class UnitSizes:
    """How many rows each unit has, in a few bytes for each file."""

    unit_rows: int
    file_rows: tuple[int, ...]

    def __getitem__(self, unit: int) -> int:
        for num_rows in self.file_rows:
            num_units = -(-num_rows // self.unit_rows)
            if unit < num_units:
                return min(self.unit_rows, num_rows - unit * self.unit_rows)
            unit -= num_units
        raise IndexError(unit)


def unit_id(index: int) -> str:
    return f"unit-{index:08d}"


def job_source(job: Job) -> Source:
    return Source(storage=job.storage, columns=input_columns(job))


def survey_input(job: Job, files: Sequence[InputFile] | None = None) -> Survey:
    """Lists the job's input files, unless they are given, and looks at each of them once.

    Raises ConfigError for anything wrong with a file as a whole, or with the columns that the job
    asks for.
    """
    source = job_source(job)
    files = source.list_files(job.input) if files is None else files
    check_apart(job.input, files, job.output)
    for file in files:
        if job.asks_by_row and file.format != "jsonl":
            raise ConfigError(
                f"input: {file.name} is no JSONL by its name, which a file of input_format "
                "openai_batch is; narrow the pattern"
            )
    return source.survey(files)


def make_plan(
    job: Job, survey: Survey, identity: Identity, known: Plan | None = None, *, grows: bool = False
) -> Plan:
    """Cuts the input into units; counts lines of JSONL and finds repeated keys.

    With a `known` plan, units are as large as there, and its files that are still the same are not
    counted again. With `grows`, units are as large as for many rows, whatever there is now. Raises
    ConfigError for a key column that holds no keys.
    """
    source, files, rows = job_source(job), survey.files, survey.num_rows
    _check_key_type(job, survey.schema)
    counted = {planned.file.mark: planned for planned in known.files} if known is not None else {}
    if known is not None:
        unit_rows = known.unit_rows
    else:
        num_bytes = sum(file.size for file in files)
        num_rows = max(_estimated_rows(source, survey), WANTED_UNITS * MAX_UNIT_ROWS * grows)
        unit_rows = choose_unit_rows(job, num_rows, num_bytes, _row_bytes(job, source, survey))
    planned = tuple(
        replace(counted[file.mark], file=file)
        if file.mark in counted
        else _planned_file(source, file, unit_rows, rows)
        for file in files
    )
    may_cut = known is None and job.asks_by_row and job.commit.unit_rows == "auto"
    while may_cut and (fewer := _fewer_rows(planned, unit_rows)):
        unit_rows = fewer
        planned = tuple(_planned_file(source, file, unit_rows, rows) for file in files)
    return Plan(
        identity=identity,
        unit_rows=unit_rows,
        files=planned,
        duplicates=_duplicates(source, files, job.key_column),
        schema=survey.schema,
    )


def shared_unit_rows(jobs: Sequence[Job], survey: Survey) -> int:
    """Rows of a unit for jobs over the same files whose units of equal rows travel together.

    All of them take the time of one unit, and media that they look at under several budgets are
    beside each other.
    """
    num_rows = _estimated_rows(job_source(jobs[0]), survey)
    num_bytes = sum(file.size for file in survey.files)
    budgets = {
        repr((job.task.image, job.task.video, job.task.messages, job.preprocess)): job
        for job in jobs
    }
    media_bytes = sum(_row_bytes(job, job_source(job), survey) for job in budgets.values())
    least = min(choose_unit_rows(job, num_rows, num_bytes) for job in jobs)
    alone = min(max(least // len(jobs), MIN_UNIT_ROWS), least)
    return max(min(alone, int(HEAVY_UNIT_BYTES / media_bytes)), 1) if media_bytes else alone


def extended_plan(job: Job, plan: Plan, survey: Survey, identity: Identity) -> Plan:
    """The plan with the added files after the known ones, whose units keep their numbers.

    Raises ConfigError when the new files would change the types of the output.
    """
    source, known = job_source(job), {planned.file.name for planned in plan.files}
    added = [file for file in survey.files if file.name not in known]
    files = [*(planned.file for planned in plan.files), *added]
    if files != survey.files:  # the types of JSONL are those of the first file
        survey = source.survey(files)
    for name in job.carry:
        if survey.schema.field(name).type != plan.schema.field(name).type:
            raise ConfigError(
                f"carry: with the new files, column {name!r} has type "
                f"{survey.schema.field(name).type}, and the output holds "
                f"{plan.schema.field(name).type}; convert the new files, or use another output"
            )
    _check_key_type(job, survey.schema)
    more = tuple(_planned_file(source, file, plan.unit_rows, survey.num_rows) for file in added)
    duplicates = _duplicates(source, files, job.key_column)
    return replace(plan, identity=identity, files=(*plan.files, *more), duplicates=duplicates)


def _planned_file(
    source: Source, file: InputFile, unit_rows: int, rows: Mapping[InputFile, int]
) -> PlannedFile:
    return (
        PlannedFile(file=file, num_rows=rows[file])
        if file in rows
        else _scan_lines(source, file, unit_rows)
    )


def choose_unit_rows(job: Job, num_rows: int, num_bytes: int = 0, row_bytes: float = 0.0) -> int:
    """commit.unit_rows, or where it is "auto" as many rows as take `every_seconds`, by a guess at
    the speed.

    Few rows are cut into smaller units, so that progress shows, and very many of `num_bytes` in all
    into larger ones. With `row_bytes` of media or requests in each row, HEAVY_UNIT_BYTES bound a
    unit's memory.
    """
    if job.commit.unit_rows != "auto":
        return job.commit.unit_rows
    speed = SCORED_ROWS_PER_S
    if job.task.kind in ("generate", "extract"):
        speed = min(speed, GENERATED_TOKENS_PER_S / (job.sampling.max_tokens * job.sampling.n))
    elif job.asks_by_row:
        speed = GENERATED_TOKENS_PER_S / rooms.load(REQUESTS).ASSUMED_TOKENS
    most = min(int(speed * job.commit.every_seconds), MAX_UNIT_ROWS, num_rows // WANTED_UNITS)
    most = max(most, MIN_UNIT_ROWS)
    if num_rows > MANY_UNITS * most:
        bytes_each = max(num_bytes / num_rows, 1.0)
        most = max(
            min(num_rows // MANY_UNITS, MAX_UNIT_ROWS_OF_MANY, int(MAX_UNIT_BYTES / bytes_each)),
            most,
        )
    return max(min(most, int(HEAVY_UNIT_BYTES / row_bytes)), 1) if row_bytes else most


def _fewer_rows(planned: Sequence[PlannedFile], unit_rows: int) -> int | None:
    """Rows of a unit where `unit_rows` make the heaviest one too heavy, else None.

    A line that is too heavy by itself is a unit at worst, with what stands around it.
    """
    heaviest = max(
        (stop - start for file in planned for start, stop in pairwise(file.offsets)), default=0
    )
    allowed = max(HEAVY_UNIT_BYTES, 2 * max(file.longest_line for file in planned))
    if heaviest <= allowed or unit_rows == 1:
        return None
    return max(min(unit_rows * allowed // heaviest, unit_rows - 1), 1)


def identify(job: Job, files: Sequence[InputFile], model_dir: str) -> Identity:
    """Everything that decides what the rows come out as: with a difference it is another job.

    Limits that can only turn a row into an error are not in it (`media`): what failed can be tried
    again with others.
    """
    engine = {name: getattr(job.engine, name) for name in ("kind", "dtype", "max_model_len")}
    preprocess = asdict(job.preprocess)
    preprocess.pop("workers")
    task = task_identity(job.task)
    if job.task.calibration is not None:
        # whatever the file's name is
        calibration = rooms.load("pipelines.calibration.calibration")
        task["calibration"] = calibration.read_calibration(job.task.calibration).applied
    content = {
        "model": model_digest(model_dir),
        "task": task,
        "sampling": asdict(job.sampling),
        "engine": engine,
        "preprocess": preprocess,
        "key": job.key,
        "carry": job.carry,
        "input": input_identity(files),
    }
    if job.asks_by_row:
        content["requests"] = {
            "thinking": job.requests.thinking,
            "max_tokens": job.requests.limits.max_tokens or CHAT_TOKENS,
        }
    normal: Identity = json.loads(json.dumps(content))  # as it will be read back: tuples are lists
    return normal


def input_identity(files: Sequence[InputFile]) -> Identity:
    """What stands of input files in a job's identity."""
    return {file.name: {"size": file.size, "modified": file.stamp} for file in files}


def fingerprint(identity: Identity) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def differences(planned: Identity, asked: Identity) -> list[str]:
    """One line for each value in which two jobs differ, for people."""
    before, after = dict(_leaves(planned)), dict(_leaves(asked))
    lines = []
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            lines.append(f"{name}: {_shown(before, name)} -> {_shown(after, name)}")
    return lines


def adds_files_only(planned: Identity, asked: Identity) -> bool:
    """Whether `asked` differs from `planned` in nothing but further input files."""
    kept = {name: asked["input"].get(name) for name in planned["input"]} if "input" in asked else {}
    return planned | {"input": None} == asked | {"input": None} and kept == planned["input"]


def _row_bytes(job: Job, source: Source, survey: Survey) -> float:
    """Bytes of media in a row by the first rows, 0 for text; of a request, all its bytes."""
    file = survey.files[0]
    if job.asks_by_row:
        return _request_bytes(job, source, file)
    if not reads_media(job, job.model):
        return 0.0
    rows: list[Row | RowError]
    if file.format == "parquet":
        num_rows = min(SAMPLED_ROWS, survey.num_rows[file])
        rows = decode_rows(source.read(file, RowRange(start=0, stop=num_rows)))
    else:
        _, block = next(source.line_blocks(file), (0, b""))
        rows = [parse_line(line) for line in split_lines(block)[:SAMPLED_ROWS]]
    return media_row_bytes(job, rows)


def _request_bytes(job: Job, source: Source, file: InputFile) -> float:
    _, block = next(source.line_blocks(file), (0, b""))
    lines = split_lines(block)[:SAMPLED_REQUESTS]
    rows = [parse_line(line) for line in lines]
    config = load_config(job.model)
    media = media_row_bytes(job, rows[:SAMPLED_ROWS]) if config.vision is not None else 0.0
    answer_bytes = rooms.load(REQUESTS).answer_bytes
    answers: int = sum(
        answer_bytes(row, config.hidden_size) for row in rows if not isinstance(row, RowError)
    )
    return media + (sum(map(len, lines)) + answers) / max(len(lines), 1)


def _duplicates(
    source: Source, files: Sequence[InputFile], key: str | None
) -> dict[InputRow, InputRow]:
    if key is None:
        return {}

    def read_keys() -> Iterator[tuple[int, int, list[str | None]]]:
        for number, file in enumerate(files):
            start = 0
            for keys in source.key_chunks(file, key):
                yield number, start, keys
                start += len(keys)

    return find_duplicates(read_keys, key)


def _check_key_type(job: Job, schema: pa.Schema) -> None:
    if job.key is None:
        return
    dtype = schema.field(job.key).type
    value = dtype.value_type if pa.types.is_dictionary(dtype) else dtype
    if not (
        pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_integer(value)
    ):
        raise ConfigError(
            f"key: column {job.key!r} has type {dtype}; a key is a column of text or integers"
        )


def _estimated_rows(source: Source, survey: Survey) -> int:
    """Rows of all files; those of JSONL by the length of the lines at a file's start."""
    total = sum(survey.num_rows.values())
    for file in survey.files:
        if file.format == "jsonl":
            _, block = next(source.line_blocks(file), (0, b""))
            total += round(file.size * len(split_lines(block)) / max(len(block), 1))
    return total


def _scan_lines(source: Source, file: InputFile, unit_rows: int) -> PlannedFile:
    """Finds where each unit of a JSONL file begins, holding one block of lines at a time."""
    offsets: list[int] = []
    lines: list[int] = []
    num_rows = num_lines = end = longest = 0
    for offset, block in source.line_blocks(file):
        starts, is_row = _line_starts(block)
        longest = max(longest, int(np.diff(starts, append=len(block)).max()))
        # The first row of the block that begins a unit.
        first = -num_rows % unit_rows
        begins = np.flatnonzero(is_row)[first::unit_rows]
        offsets += [offset + int(start) for start in starts[begins]]
        lines += [num_lines + int(line) + 1 for line in begins]
        num_rows += int(is_row.sum())
        num_lines += len(starts)
        end = offset + len(block)
    return PlannedFile(
        file=file,
        num_rows=num_rows,
        offsets=(*offsets, end) if num_rows else (),
        lines=tuple(lines) if num_lines > num_rows else (),
        longest_line=longest,
    )


def _line_starts(
    block: bytes,
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.bool_]]]:
    """Where the lines of a block begin, and which are rows: those that are empty or a lone "\\r"
    are not.
    """
    data = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    if not block.endswith(b"\n"):
        ends = np.append(ends, len(block))
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts
    lone_return = (lengths == 1) & (data[np.minimum(starts, len(data) - 1)] == ord("\r"))
    return starts, (lengths > 0) & ~lone_return


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _shown(leaves: Mapping[str, Any], name: str) -> str:
    text = json.dumps(leaves[name], ensure_ascii=False) if name in leaves else "nothing"
    return text if len(text) <= 120 else f"{text[:117]}..."
