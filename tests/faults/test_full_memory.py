"""An object store that cannot hold what a job has in flight: blocks go through the disk, and every
row arrives.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from glm_batch.pipelines.output.commit import Output
from tests.faults.checks import check_parts
from tests.faults.driver import Pace
from tests.faults.places import ROOT, Farm, driver_command

STORE = 80 << 20
NUM_ROWS, UNIT_ROWS = 60, 6
TEXT = 5 << 20  # of each row: a unit has 30 MiB, some six of them are in flight


@pytest.fixture
def cramped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Farm]:
    monkeypatch.setenv("RAY_BACKEND_LOG_LEVEL", "info")
    with Farm(num_nodes=1, object_store=STORE) as farm:
        yield farm


def test_a_full_object_store_loses_no_row(
    echo_checkpoint: Path, cramped: Farm, tmp_path: Path
) -> None:
    texts = [f"{row:02d}" * (TEXT // 2) for row in range(NUM_ROWS)]
    pq.write_table(
        pa.table({"id": list(range(NUM_ROWS)), "long": texts}),
        tmp_path / "in.parquet",
        row_group_size=6,
    )
    job = {
        "model": str(echo_checkpoint),
        "input": [str(tmp_path / "in.parquet")],
        "output": str(tmp_path / "out"),
        "key": "id",
        "carry": ["long"],
        "task": {"kind": "choose", "prompt": "Row {id}?", "labels": ["circle", "square"]},
        "engine": {"kind": "echo"},
        "commit": {"unit_rows": UNIT_ROWS},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    pace = Pace(folder=str(tmp_path), commit_s=0.5)  # so that blocks pile up before the commit
    command = driver_command(pace.to_json(), "label", str(tmp_path / "job.yaml"))
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=cramped.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert cramped.spilled_mib() > 0
    output = Output.at(str(tmp_path / "out"))
    check_parts(output)
    rows = pa.concat_tables(output.iter_tables())
    assert rows["row_key"].to_pylist() == [str(row) for row in range(NUM_ROWS)]
    assert rows["status"].to_pylist() == ["ok"] * NUM_ROWS
    assert rows["long"].to_pylist() == texts
