"""The stores that an output may lie in: a directory, S3, and S3 where one request in three fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from glm_batch.pipelines.job import StorageSection
from glm_batch.pipelines.storage.storage import LocalStore, S3Store, Store
from tests.s3_faults import new_bucket, proxy


@pytest.fixture(params=["local", "s3", "faulty s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "local":
        local = LocalStore(tmp_path)
        local.prepare(["tmp", "parts"])
        yield local
        return
    endpoint: str = request.getfixturevalue("s3_server")
    url = f"s3://{new_bucket(endpoint)}/out"
    if request.param == "s3":
        yield S3Store(url, StorageSection(endpoint_url=endpoint))
        return
    with proxy(endpoint, seed=1, one_in=3, stall_s=0.05) as faulty:
        yield S3Store(url, StorageSection(endpoint_url=faulty.url))
