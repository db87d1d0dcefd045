"""Thirty nights of `cron`: after each, its manifest names the rows that a run from scratch over the
same input gives.

Rows of files that are gone stay behind those, as they were when the file was last seen, until they
are given up.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glm_batch.pipelines.cron.incremental import Night
from glm_batch.pipelines.cron.versions import Versions
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.lease import BusyError
from tests.pipelines.cron.cron_world import from_scratch, make_job, night, process_here

ROOT = Path(__file__).parents[3]
NIGHTS = 30
KILLS = {
    4: "after_plan:1", 9: "after_record:1", 13: "before_publish:1", 17: "before_manifest:1", 21: "before_remove:1",
    25: "after_part:1",
}  # fmt: skip
"""Nights that are killed at first, and where; then the night begins again."""
OVERLAPS, BOUNDED, DROPPING, UNCHANGED = {6, 18}, {7, 20}, {15, 26}, {11, 23}

Row = dict[str, Any]


class Input:
    """A folder of files as a night finds it, changed by chance from a seed."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.folder, self._chance = folder, chance
        self._next = 0
        self._late: list[str] = []
        folder.mkdir()

    def change(self, number: int) -> None:
        """New, changed, appended, touched and deleted files, and one that comes later than its name
        says.
        """
        files = sorted(self.folder.iterdir())
        self._write(f"{number:02d}-new", self._rows(self._chance.randint(1, 9)))
        self._late.append(f"{number:02d}-a-late")
        if not files:
            return
        if number % 3 == 0:
            self._edit(self._chance.choice(files))
        if number % 4 == 1:
            for path in [path for path in files if path.suffix == ".jsonl"][-1:]:
                path.write_text(path.read_text() + json.dumps(self._rows(1)[0]) + "\n")
        if number % 5 == 2:
            os.utime(self._chance.choice(files), ns=(number, number))
        if number % 5 == 4:
            self._chance.choice(files).unlink()
        if number % 6 == 5:
            self._write(self._late[self._chance.randrange(len(self._late))], self._rows(5))

    def _rows(self, num_rows: int) -> list[Row]:
        self._next += num_rows
        numbers = range(self._next - num_rows, self._next)
        # Some keys come twice: then the first row of the input counts, whichever file that is
        # tonight.
        keys = [
            f"k{self._chance.randrange(number + 1) if number % 7 == 3 else number}"
            for number in numbers
        ]
        return [
            {"id": key, "text": f"shape {key}", "size": len(key), "gold": "circle"} for key in keys
        ]

    def _write(self, name: str, rows: list[Row]) -> None:
        if self._chance.random() < 0.5:
            (self.folder / f"{name}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in rows)
            )
        else:
            pq.write_table(
                pa.Table.from_pylist(rows), self.folder / f"{name}.parquet", row_group_size=3
            )

    def _edit(self, path: Path) -> None:
        """Another text in one row."""
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
        else:
            rows = pq.read_table(path).to_pylist()
        self._chance.choice(rows)["text"] = f"edited {self._chance.random()}"
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)


def rows_of(output: Output) -> list[Row]:
    """Without `cached_tokens`, which depends on what ran before."""
    tables = [table.drop_columns(["cached_tokens"]) for table in output.iter_tables()]
    return [row for table in tables for row in table.to_pylist()]


def rows_by_file(output: Output) -> dict[str, list[Row]]:
    """Of an ordinary output, by its plan."""
    plan = output.standing_plan()
    rows = iter(rows_of(output))
    return {each.file.name: [next(rows) for _ in range(each.num_rows)] for each in plan.files}


def killed(checkpoint: Path, folder: Path, aim: str) -> bool:
    """A night in a process of its own that dies at `aim`; False where it did not get there."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "GLM_BATCH_CRASH_AT": aim}
    driver = [
        sys.executable,
        str(Path(__file__).with_name("cron_world.py")),
        str(checkpoint),
        str(folder),
    ]
    done = subprocess.run(
        driver, env=environment, check=False, timeout=200, capture_output=True, text=True
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


def overlapping(job: Any) -> Night:
    """Two runs at once: one does the work, or one after the other; nothing is done twice."""
    nights: list[Night | BusyError] = []

    def start() -> None:
        try:
            nights.append(night(job))
        except BusyError as error:
            nights.append(error)

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ran = [each for each in nights if isinstance(each, Night)]
    assert len(nights) == 2
    assert [each.state for each in ran if each.state != "unchanged"] == ["finished"]
    return next(each for each in ran if each.state == "finished")


def test_thirty_nights(
    echo_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glm_batch.pipelines.cron.incremental.process", process_here)
    chance = random.Random(7)
    job, found = make_job(echo_checkpoint, tmp_path), Input(tmp_path / "in", chance)
    output, versions = Output.at(job.output), Versions.at(job.output, job.storage)
    last: dict[str, list[Row]] = {}  # each file's rows when it was last seen
    gone: list[str] = []
    nights_killed, adopted, processed = list[int](), 0, 0
    for number in range(NIGHTS):
        if number not in UNCHANGED:
            found.change(number)
        before = (tmp_path / "out" / "manifest.json").read_bytes() if number else None
        if number in KILLS and killed(echo_checkpoint, tmp_path, KILLS[number]):
            nights_killed.append(number)
            if KILLS[number] != "before_remove:1":
                assert (tmp_path / "out" / "manifest.json").read_bytes() == before
        if number in BOUNDED:
            bounded = night(job, max_units=1)
            if bounded.state == "bounded":
                assert (tmp_path / "out" / "manifest.json").read_bytes() == before
                assert bounded.processed_units == 1
        done = (
            overlapping(job) if number in OVERLAPS else night(job, drop_deleted=number in DROPPING)
        )
        adopted, processed = adopted + done.adopted_units, processed + done.processed_units
        if number in UNCHANGED:
            assert (done.state, done.processed_units, done.adopted_units) == ("unchanged", 0, 0)
        scratch = rows_by_file(from_scratch(job, tmp_path / f"scratch-{number}"))
        gone = (
            []
            if number in DROPPING
            else [name for name in [*last, *gone] if name not in scratch and name in last]
        )
        kept = {name: last[name] for name in dict.fromkeys(gone)}
        last = scratch | kept
        content = json.loads((tmp_path / "out" / "manifest.json").read_text())
        rows = rows_of(output)
        assert rows[: len(rows) - done.deleted_rows] == [
            row for rows in scratch.values() for row in rows
        ], number
        orphans = {each["file"]: each["rows"] for each in content.get("deleted", [])}
        assert orphans == {name: len(rows) for name, rows in kept.items()}, number
        where = len(rows) - done.deleted_rows
        for name, num_rows in orphans.items():
            assert rows[where : where + num_rows] == kept[name], (number, name)
            where += num_rows
        assert content["counts"]["rows"] == len(rows)
        assert len(versions.names()) <= 2
    assert nights_killed == list(KILLS)
    assert adopted > 4 * processed
