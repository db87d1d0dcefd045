"""`python -m benchmarks.shared_replicas`: a batch job and online requests on one replica, together
and each alone.

Owns the phases, one after the other in one run: the job with an engine of its own; the server's
clients alone; the job through the idle server; both together. Rows per second are those of a window
in the middle of a job.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import shutil
import signal
import socket
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import BUILD
from benchmarks.machine import describe
from benchmarks.make_mid_model import make_mid_model
from benchmarks.serve_load import MAX_MODEL_LEN, MODEL, Answer, Connection, Load, summary
from benchmarks.workload import OUTPUT_TOKENS, TextKind, build_rows
from glm_batch.models.engine import SamplingParams
from glm_batch.models.engine.api.interface import EngineOptions
from glm_batch.pipelines.job import CommitSection, EngineSection, Job, TaskConfig
from glm_batch.pipelines.metrics.counts import Progress
from glm_batch.pipelines.runs.pipeline import run
from glm_batch.pipelines.runs.watch import InterruptedRunError, Stop

UNIT_ROWS = 32  # small ones, so that the rows of a window can be counted
STARTED_ROWS = 4 * UNIT_ROWS  # from then on a job runs steadily
WARM_UP = 8


async def _drive(
    port: int, bodies: list[bytes], clients: int, pause_s: float
) -> tuple[list[Answer], float]:
    """As benchmarks.serve_load, with pauses between a client's requests, drawn exponentially."""
    waiting, rng = iter(bodies), random.Random(0)
    answers: list[Answer] = []

    async def client() -> None:
        _, connection = await asyncio.get_running_loop().create_connection(
            Connection, "127.0.0.1", port
        )
        for body in waiting:
            if pause_s:
                await asyncio.sleep(rng.expovariate(1 / pause_s))
            answers.append(await connection.ask(body))

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return answers, time.perf_counter() - begun


def _load(port: int, load: Load, seed: int, pause_s: float) -> dict[str, Any]:
    """In a process of its own: what the job's driver does must not be measured."""
    return summary(
        *asyncio.run(_drive(port, load.bodies(seed, load.requests), load.clients, pause_s))
    )


@dataclass(slots=True)
class RunningJob:
    """A job in a thread, whose committed rows can be counted meanwhile."""

    job: Job
    app: str | None
    rows: int = 0
    _stop: Stop = field(default_factory=lambda: Stop(grace_s=0.0))
    _error: BaseException | None = None
    _thread: threading.Thread | None = None

    def __enter__(self) -> RunningJob:
        shutil.rmtree(self.job.output, ignore_errors=True)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        while self.rows < STARTED_ROWS:
            self._check()
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self._check()
        self._stop.ask(signal.SIGINT)
        assert self._thread is not None
        self._thread.join()

    def _run(self) -> None:
        try:
            run(self.job, self._count, stop=self._stop, app=self.app)
        except InterruptedRunError:
            pass
        except BaseException as error:
            self._error = error

    def _count(self, progress: Progress) -> None:
        self.rows = progress.counts.rows

    def _check(self) -> None:
        if self._error:
            raise self._error
        if self._thread and not self._thread.is_alive():
            raise RuntimeError("the job is over already: give it more rows")


def _job(model_dir: Path, work: TextKind, num_rows: int, folder: Path) -> Job:
    rows = build_rows(model_dir, work, num_rows, 0)
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table({"id": [row.id for row in rows.rows], "text": [row.text for row in rows.rows]})
    pq.write_table(table, folder / "rows.parquet")
    generate = work == "generate"
    return Job(
        model=str(model_dir),
        input=[str(folder / "rows.parquet")],
        output=str(folder / "out"),
        task=TaskConfig(
            kind=work, prompt=rows.instruction + "{text}", labels=None if generate else rows.labels
        ),
        sampling=SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=generate),
        engine=EngineSection(dtype="bfloat16", max_model_len=MAX_MODEL_LEN),
        commit=CommitSection(unit_rows=UNIT_ROWS),
    )


def _rows_per_s(job: RunningJob, seconds: float) -> float:
    begun, before = time.perf_counter(), job.rows
    time.sleep(seconds)
    return (job.rows - before) / (time.perf_counter() - begun)


def measure(
    job: Job, load: Load, pauses_s: list[float], window_s: float, engine: dict[str, Any]
) -> dict[str, Any]:
    """All phases' numbers; `engine` are more keys of the server's engine."""
    import ray
    from ray import serve as ray_serve

    from glm_batch.glm_actors.serving.openai.serve_settings import ServedModel, ServeSettings
    from glm_batch.glm_actors.serving.replicas.deployment import APP_NAME
    from glm_batch.jobs.serving.serve import start
    from glm_batch.pipelines.cluster.cluster import cluster

    found: dict[str, Any] = {"rows_per_s": {}, "online": {}}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    chosen = EngineOptions(dtype="bfloat16", max_model_len=MAX_MODEL_LEN, **engine)
    served = ServedModel(model=job.model, engine=chosen)
    with cluster(), multiprocessing.get_context("spawn").Pool(1) as clients:
        assert ray.is_initialized()
        with RunningJob(job, None) as alone:
            found["rows_per_s"]["alone"] = _rows_per_s(alone, window_s)
        start(ServeSettings(models={MODEL: served}, port=port), None)
        clients.apply(_load, (port, replace(load, requests=WARM_UP), 99, 0.0))
        for seed, pause_s in enumerate(pauses_s):
            found["online"][f"alone, pause {pause_s:g} s"] = clients.apply(
                _load, (port, load, seed, pause_s)
            )
        with RunningJob(job, APP_NAME) as shared:
            found["rows_per_s"]["through the idle server"] = _rows_per_s(shared, window_s)
            for seed, pause_s in enumerate(pauses_s):
                before = shared.rows
                beside = clients.apply(_load, (port, load, 1000 + seed, pause_s))
                name = f"beside clients, pause {pause_s:g} s"
                found["online"][f"beside the job, pause {pause_s:g} s"] = beside
                found["rows_per_s"][name] = (shared.rows - before) / beside["seconds"]
        ray_serve.shutdown()
    return found


def _show(console: Console, found: dict[str, Any]) -> None:
    table = Table(
        "online", "first token p50, ms", "p99", "between chunks p50", "p99", "tokens/s", "errors"
    )
    for name, online in found["online"].items():
        times = [
            online[key][cut] * 1e3
            for key in ("first_token_s", "between_chunks_s")
            for cut in ("p50", "p99")
        ]
        numbers = [
            *(f"{value:.0f}" for value in times),
            f"{online['tokens_per_s']:.1f}",
            str(online["num_errors"]),
        ]
        table.add_row(name, *numbers)
    console.print(table)
    table = Table("batch", "rows/s", "of alone")
    for name, rate in found["rows_per_s"].items():
        table.add_row(name, f"{rate:.2f}", f"{rate / found['rows_per_s']['alone']:.0%}")
    console.print(table)


def main(
    work: Annotated[str, typer.Option(help="choose or generate")] = "choose",
    rows: Annotated[
        int, typer.Option(min=2 * STARTED_ROWS, help="more than are done in all phases")
    ] = 6000,
    requests: Annotated[int, typer.Option(min=2)] = 150,
    clients: Annotated[int, typer.Option(min=1)] = 4,
    pauses: Annotated[
        str, typer.Option(help="comma-separated: mean seconds between a client's requests")
    ] = "0,2",
    prompt_tokens: Annotated[tuple[int, int], typer.Option(help="least and most")] = (64, 256),
    output_tokens: Annotated[int, typer.Option(min=1)] = 32,
    window: Annotated[float, typer.Option(help="seconds in which a job's rows are counted")] = 30.0,
    engine: Annotated[
        str, typer.Option(help="more keys of the server's engine: section, as JSON")
    ] = "{}",
) -> None:
    """Measures all phases and writes build/benchmarks/shared-replicas-TIME.json."""
    assert work in ("choose", "generate"), work
    BUILD.mkdir(parents=True, exist_ok=True)
    model_dir = make_mid_model(BUILD / "mid")
    job = _job(model_dir, work, rows, BUILD / f"shared-replicas-{work}")  # type: ignore[arg-type]
    load = Load(
        requests=requests, clients=clients, prompt_tokens=prompt_tokens, output_tokens=output_tokens
    )
    report: dict[str, Any] = {
        "machine": describe(),
        "work": work,
        "clients": clients,
        "requests": requests,
    }
    report |= measure(
        job, load, [float(pause) for pause in pauses.split(",")], window, json.loads(engine)
    )
    path = BUILD / f"shared-replicas-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps(report, indent=1))
    console = Console()
    _show(console, report)
    console.print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
