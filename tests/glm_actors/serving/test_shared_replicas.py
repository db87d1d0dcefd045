"""A batch job through a live application: the job's own records, whatever becomes of the
application meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from glm_batch.glm_actors.serving.openai.serve_settings import ServedModel, ServeSettings
from glm_batch.glm_actors.serving.replicas.deployment import (
    APP_NAME,
    ModelDeployment,
    deployment_name,
)
from glm_batch.glm_actors.serving.replicas.replica import Replica
from glm_batch.glm_actors.shared.shared_model import BatchWork
from glm_batch.jobs.__main__ import EXIT_BAD_CONFIG, app
from glm_batch.jobs.files.sections import load_job
from glm_batch.jobs.serving.serve import start
from glm_batch.models.engine.api.interface import EngineOptions
from glm_batch.models.engine.api.request import BATCH, Generate, Request, SamplingParams
from glm_batch.models.errors import ConfigError, EngineError
from glm_batch.models.request_limits import RequestLimits
from glm_batch.pipelines import run
from glm_batch.pipelines.job import Job, TaskConfig
from glm_batch.pipelines.metrics.counts import Progress
from glm_batch.pipelines.runs.retry_run import retry_failed
from tests.glm_actors.serving.conftest import ROOT, TINY
from tests.ray_processes import ray_processes

EXAMPLES = ROOT / "examples"

SHARED = "shared"  # not the name of a model of the session's server, which is about, too
NUM_ROWS = 800
LONG = 60  # tokens that only a poisoned prompt has
CAPS = RequestLimits()
BODY = {
    "model": SHARED,
    "messages": [{"role": "user", "content": "Where is my parcel?"}],
    "max_tokens": 8,
    "temperature": 0,
}


@pytest.fixture(scope="module")
def url(ray_cluster: None) -> Iterator[str]:
    """Where the application answers over HTTP."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    deploy(port=port)
    yield f"http://127.0.0.1:{port}/v1"
    from ray import serve

    serve.shutdown()


@pytest.fixture(scope="module")
def tickets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tickets") / "tickets.parquet"
    found = [pq.read_table(file) for file in sorted((EXAMPLES / "support").glob("*.parquet"))]
    pq.write_table(pa.concat_tables(found).slice(0, NUM_ROWS), path)
    return path


@pytest.fixture(scope="module")
def alone(
    ray_cluster: None, tickets: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What the job comes to with an engine of its own."""
    return records(run(make_job(tickets, tmp_path_factory.mktemp("alone"))))


def deploy(port: int = 8000, limits: RequestLimits = CAPS, **engine: Any) -> None:
    """Starts the application, or replaces its model's replicas if the engine's settings are others
    than before.
    """
    chosen = EngineOptions(**({"dtype": "float32"} | engine))
    start(
        ServeSettings(
            models={SHARED: ServedModel(model=TINY, engine=chosen)}, port=port, limits=limits
        ),
        None,
    )


def make_job(tickets: Path, folder: Path, **engine: Any) -> Job:
    job, _ = load_job(str(EXAMPLES / "reply.yaml"), [f"model={TINY}", "engine.dtype=float32"])
    settings = replace(job.engine, **engine)
    commit = replace(job.commit, unit_rows=25, every_seconds=1.0)
    return replace(
        job, input=[str(tickets)], output=str(folder / "out"), engine=settings, commit=commit
    )


def records(result: Any) -> list[dict[str, Any]]:
    """All but what depends on the rows that were there before."""
    rows = [row for table in result.iter_tables() for row in table.to_pylist()]
    return [
        {name: value for name, value in row.items() if name not in ("cached_tokens", "attempts")}
        for row in rows
    ]


class Once:
    """As a job's on_progress: does something in another thread once a number of units are
    committed.
    """

    def __init__(self, *acts: tuple[int, Callable[[], None]]) -> None:
        self._acts = list(acts)
        self._pool = ThreadPoolExecutor()
        self._under_way: list[Future[None]] = []

    def __call__(self, progress: Progress) -> None:
        while self._acts and progress.phase != "done" and progress.units_done >= self._acts[0][0]:
            self._under_way.append(self._pool.submit(self._acts.pop(0)[1]))

    def join(self) -> None:
        """Raises what one of them raised."""
        assert not self._acts, "the job was over before that"
        for act in self._under_way:
            act.result()
        self._pool.shutdown()


def kill_replica() -> None:
    (process,) = ray_processes(f"ray::ServeReplica:{APP_NAME}:{deployment_name(SHARED)}")
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


def test_a_job_through_the_application_is_the_job_alone(
    url: str, tickets: Path, alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    stop = threading.Event()
    answers: list[httpx.Response] = []

    def ask() -> None:
        while not stop.is_set():
            answers.append(httpx.post(f"{url}/chat/completions", json=BODY, timeout=60.0))

    client = threading.Thread(target=ask)
    client.start()
    try:
        result = run(make_job(tickets, tmp_path), app=APP_NAME)
    finally:
        stop.set()
        client.join()
    assert records(result) == alone
    assert len(answers) > 3
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) == 1


def test_a_killed_replica_and_a_redeployment_cost_no_row(
    url: str, tickets: Path, alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    troubles = Once((4, kill_replica), (12, lambda: deploy(kv_cache_tokens=1 << 15)))
    result = run(make_job(tickets, tmp_path), troubles, app=APP_NAME)
    troubles.join()
    assert records(result) == alone
    assert result.summary.counts.rows == NUM_ROWS


def test_another_model_under_the_same_name_ends_the_job_and_the_right_one_finishes_it(
    url: str, tickets: Path, alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    job = make_job(tickets, tmp_path)
    other = Once((4, lambda: deploy(dtype="bfloat16")))
    with pytest.raises(
        ConfigError, match=r"no longer serves.*engine\.dtype: float32 in the job, bfloat16 there"
    ):
        run(job, other, app=APP_NAME)
    other.join()
    with pytest.raises(
        ConfigError, match=r"does not serve.*engine\.dtype: float32 in the job, bfloat16 there"
    ):
        run(job, app=APP_NAME)
    deploy()
    result = run(job, app=APP_NAME)
    assert result.summary.resumed_rows > 0
    assert records(result) == alone


def test_the_command_refuses_an_application_that_does_not_run(
    url: str, tickets: Path, tmp_path: Path
) -> None:
    job_file = tmp_path / "job.yaml"
    task = {"kind": "generate", "prompt": "{text}"}
    out = str(tmp_path / "out")
    job_file.write_text(
        yaml.safe_dump({"model": TINY, "input": [str(tickets)], "output": out, "task": task})
    )
    result = CliRunner().invoke(app, ["label", str(job_file), "--app", "nobody"])
    assert result.exit_code == EXIT_BAD_CONFIG
    assert "--app nobody: no such application runs on this Ray cluster" in result.output
    assert f"running: {APP_NAME}" in result.output


def test_requests_are_answered_while_the_application_is_redeployed(url: str) -> None:
    """Every stream comes to its end, at the old ingress or the new one, and nobody is turned away
    in between.
    """
    port = httpx.URL(url).port
    assert port is not None
    deploy(port=port)
    stop = threading.Event()
    ends: list[str] = []
    long = BODY | {"stream": True, "max_tokens": 200, "logprobs": True}

    def ask() -> None:
        while not stop.is_set():
            response = httpx.post(f"{url}/chat/completions", json=long, timeout=60.0)
            ends.append(f"{response.status_code} {response.text[-14:].strip()}")

    clients = [threading.Thread(target=ask) for _ in range(3)]
    for client in clients:
        client.start()
    try:
        deploy(port=port, limits=replace(CAPS, max_n=2))
        before = len(ends)
        found = httpx.post(f"{url}/chat/completions", json=BODY | {"n": 3}, timeout=60.0)
        assert "3 is more than 2" in found.json()["error"]["message"]
        deadline = time.monotonic() + 30.0
        while len(ends) < before + 6:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        stop.set()
        for client in clients:
            client.join()
    assert before > 3
    assert set(ends) == {"200 data: [DONE]"}


def poisoned(starts: Path) -> type:
    """A ModelDeployment whose process a row with POISON in it ends; it notes each of its processes
    in a file.
    """

    class Poisoned(ModelDeployment):
        def __init__(self, *arguments: Any) -> None:
            with starts.open("a") as file:
                file.write(f"{os.getpid()}\n")
            super().__init__(*arguments)

        async def work(self, work: BatchWork, lifeline: Any) -> Any:
            if any(len(request.input_ids) > LONG for request in work.requests):
                os.kill(os.getpid(), signal.SIGKILL)
            return await super().work(work, lifeline)

    return Poisoned


def test_a_row_that_kills_replicas_fails_alone_after_four_deaths(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = tmp_path / "starts"
    with monkeypatch.context() as patched:
        patched.setattr(
            "glm_batch.glm_actors.serving.replicas.deployment.ModelDeployment", poisoned(starts)
        )
        deploy(kind="echo")
    texts = ["poison " * LONG if row == 70 else f"shape {row}" for row in range(150)]
    pq.write_table(
        pa.table({"id": [f"r{row}" for row in range(150)], "text": texts}),
        tmp_path / "rows.parquet",
    )
    job = replace(
        make_job(tmp_path / "rows.parquet", tmp_path, kind="echo"),
        task=TaskConfig(kind="choose", prompt="{text}", labels=["circle", "square"]),
        key="id",
        carry=["id"],
    )
    result = run(job, app=APP_NAME)
    rows = records(result)
    assert [row["id"] for row in rows] == [f"r{row}" for row in range(150)]
    assert [row["id"] for row in rows if row["status"] != "ok"] == ["r70"]
    assert rows[70]["error_code"] == "worker_died"
    assert "died 2 times while it had nothing else" in rows[70]["error_message"]
    assert len(set(starts.read_text().splitlines())) == 5
    # What is bad about the row is not so any more where an application answers it.
    deploy(kind="echo", max_step_tokens=512)
    summary = retry_failed(job, result.output, ["worker_died"], app=APP_NAME)
    assert (summary.counts.ok, summary.counts.errors) == (150, {})


def test_without_a_cluster_there_is_no_application(
    tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(address: str, **_: Any) -> None:
        raise ConnectionError(f"nothing at {address}")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", refuse)
    with pytest.raises(
        ConfigError, match="no Ray cluster answers on this machine: nothing at auto"
    ):
        run(make_job(tickets, tmp_path), app=APP_NAME)


def test_work_of_a_caller_that_is_gone_leaves_the_engine(replica: Replica) -> None:
    endless = Generate(sampling=SamplingParams(max_tokens=400, ignore_eos=True))
    requests = [
        Request(id=f"x{i}", input_ids=[1, 2, 3 + i], work=endless, priority=BATCH) for i in range(4)
    ]
    work = BatchWork(caller="c", identity=replica.identity, requests=requests)

    async def abandon() -> None:
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asked = asyncio.ensure_future(replica.work(work, gone))
        while not (await replica.stats())["running"]:
            await asyncio.sleep(0.01)
        gone.set_result(None)
        with pytest.raises(EngineError, match="gone"):
            await asked
        deadline = time.monotonic() + 10.0
        while (found := await replica.stats())["running"] or found["waiting"]:
            assert time.monotonic() < deadline, found
            await asyncio.sleep(0.01)
        await replica.check_blocks()

    asyncio.run(abandon())


def test_a_replica_says_what_it_is_to_those_who_want_another_model(replica: Replica) -> None:
    other = replace(replica.identity, checkpoint="0")
    work = BatchWork(caller="c", identity=other, requests=[])
    assert asyncio.run(_work(replica, work)) == replica.identity
    assert other.differences(replica.identity) == ["model: its files are others"]


async def _work(replica: Replica, work: BatchWork) -> Any:
    return await replica.work(work, asyncio.get_running_loop().create_future())
