"""One server for the whole session, started by the command line itself, and the shipped model in
this process.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from glm_batch.glm_actors.serving.openai.protocol import Body
from glm_batch.glm_actors.serving.openai.serve_settings import ServedModel
from glm_batch.glm_actors.serving.replicas.replica import Piece, Replica
from glm_batch.models.engine.api.interface import EngineOptions
from glm_batch.models.request_limits import RequestLimits

ROOT = Path(__file__).parents[3]
TINY = str(ROOT / "examples" / "tiny_glm")
TOKEN = "a-token-for-these-tests"
MODEL = "tiny-glm"
TWO_RANKS = "tiny-glm/two-ranks"
START_S = 240.0
CAPS = {"max_tokens": 1000, "max_queue": 16, "max_n": 4}
# One thread: the machine's cores belong to many.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "GLM_TEST_TOKEN": TOKEN, "COLUMNS": "80"}


@dataclass(frozen=True)
class Server:
    """A running `glm-batch serve`."""

    process: subprocess.Popen[str]
    url: str

    @property
    def client(self) -> openai.OpenAI:
        """The unmodified client, which shall not hide failures by trying again."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=TOKEN, max_retries=0, timeout=60.0)

    def metrics(self) -> dict[str, float]:
        """By name, the labels cut off; those of several outcomes are added up."""
        text = httpx.get(
            f"{self.url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60.0
        ).text
        found: dict[str, float] = {}
        for line in text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                key = name.partition("{")[0]
                found[key] = found.get(key, 0.0) + float(value)
        return found

    def wait_until_idle(self) -> dict[str, float]:
        """The metrics once nothing is in flight, as it must become soon."""
        deadline = time.monotonic() + 20.0
        while (found := self.metrics())["glm_requests_in_flight"] or found["glm_engine_running"]:
            assert time.monotonic() < deadline, found
            time.sleep(0.1)
        return found


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """For all tests of this process: none may end it."""
    with started(tmp_path_factory.mktemp("serve")) as running:
        yield running


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """For a test that ends it."""
    with started(tmp_path) as running:
        yield running


@contextmanager
def started(folder: Path) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = {
        "models": {
            MODEL: {"model": TINY, "engine": {"dtype": "float32"}},
            TWO_RANKS: {"model": TINY, "engine": {"dtype": "float32", "tensor_parallel_size": 2}},
        },
        "port": port,
        "token_env": "GLM_TEST_TOKEN",
        "limits": CAPS,
    }
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    log = folder / "log"
    command = [sys.executable, "-m", "glm_batch.jobs", "serve", str(folder / "serve.yaml")]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT, stdout=output, stderr=output, text=True
        )
    try:
        deadline = time.monotonic() + START_S
        while "serving" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield Server(process, f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="session")
def replica() -> Iterator[Replica]:
    """The shipped model in this process, without Ray and HTTP."""
    model = ServedModel(model=TINY, engine=EngineOptions(dtype="float32", kv_cache_tokens=1 << 14))
    built = Replica(
        model,
        RequestLimits(
            max_queue=6,
            max_tokens=4096,
            max_inputs=256,
            max_media=2,
            max_pixels=1_000_000,
            max_prompt_chars=5000,
            request_s=120.0,
            schema_s=1.0,
        ),
    )
    yield built
    built.close()


class LocalBackend:
    """The Backend of replicas in this process."""

    def __init__(self, replicas: Mapping[str, Replica]) -> None:
        self._replicas = replicas

    @property
    def models(self) -> list[str]:
        return list(self._replicas)

    async def answer(self, model: str, body: Body) -> dict[str, Any]:
        return await self._replicas[model].answer(body)

    def stream(self, model: str, body: Body) -> AsyncIterator[Piece]:
        return self._replicas[model].stream(body)

    async def stats(self) -> dict[str, list[dict[str, Any]]]:
        return {name: [await replica.stats()] for name, replica in self._replicas.items()}

    async def is_healthy(self) -> bool:
        return True
