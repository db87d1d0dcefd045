"""Whole jobs from S3 to S3 through a faulty network: the rows of an undisturbed run on local disks,
once each.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines import run
from glm_batch.pipelines.job import Job, StorageSection
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.state import status_of
from glm_batch.pipelines.storage.s3 import S3
from tests.pipelines.runs.test_pipeline import GOOD, make_job, write_input
from tests.s3_faults import new_bucket, proxy

pytestmark = pytest.mark.usefixtures("ray_cluster")


def rows_of(output: Output) -> list[dict[str, Any]]:
    return [row for table in output.iter_tables() for row in table.to_pylist()]


def upload(local: Job, folder: Path, endpoint: str) -> Job:
    """The same job with its input in a new bucket, and its output there too."""
    bucket, storage = f"s3://{new_bucket(endpoint)}", StorageSection(endpoint_url=endpoint)
    for path in sorted((folder / "in").iterdir()):
        S3(storage).write(f"{bucket}/in/{path.name}", path.read_bytes())
    return replace(local, input=[f"{bucket}/in/*"], output=f"{bucket}/some/out", storage=storage)


def test_a_job_under_faults_gives_the_rows_of_an_undisturbed_one(
    echo_checkpoint: Path, tmp_path: Path, s3_server: str
) -> None:
    write_input(tmp_path, num_parquet=150, jsonl=(GOOD, "{", GOOD.replace("j0", "p3")))
    local = make_job(echo_checkpoint, tmp_path)
    run(local)
    with proxy(s3_server, seed=7, stall_s=2.0) as faulty:
        remote = upload(local, tmp_path, s3_server)
        remote = replace(remote, storage=StorageSection(endpoint_url=faulty.url))
        run(remote)
        assert sum(faulty.faults.values()) > faulty.requests / 30 > 3
    output = Output.at(remote.output, StorageSection(endpoint_url=s3_server))
    folder, bucket = str(tmp_path / "in"), remote.input[0].removesuffix("/*")
    expected = json.loads(json.dumps(rows_of(Output.at(local.output))).replace(folder, bucket))
    assert [{**row, "cached_tokens": 0} for row in rows_of(output)] == [
        {**row, "cached_tokens": 0} for row in expected
    ]
    assert status_of(output).finished
    rerun = replace(remote, storage=StorageSection(endpoint_url=s3_server))
    assert run(rerun).summary.resumed_rows == 153


def test_another_job_for_the_same_prefix_is_refused(
    echo_checkpoint: Path, tmp_path: Path, s3_server: str
) -> None:
    write_input(tmp_path, num_parquet=5)
    remote = upload(make_job(echo_checkpoint, tmp_path), tmp_path, s3_server)
    run(remote)
    with pytest.raises(ConfigError, match=r"(?s)begun by another job.*carry"):
        run(replace(remote, carry=[]))
    above = remote.output.removesuffix("/out")
    with pytest.raises(ConfigError, match=r"holds something else \(out\)"):
        run(replace(remote, output=above))
