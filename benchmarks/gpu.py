"""`python -m benchmarks.gpu`: TorchEngine on one GPU with a random 9B-shaped glm4, held against the
GPU's own limits.

Owns the cases (prefill, decode by batch size, choices after a shared instruction, a step too large
for the memory) and the limits, measured in the same run: a large matrix product and a large copy.
`--layers 2 --hidden 256` tries the script itself on any machine.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.make_large_model import Shape, make_large_model
from glm_batch.models.engine import (
    Choose,
    Completion,
    EngineConfig,
    Generate,
    Request,
    SamplingParams,
    Work,
)
from glm_batch.models.engine.torch_engine import TorchEngine

IDS = 1900  # prompts are drawn from so many ids
CONTEXT, PREFILL_ROWS = 1024, 128
DECODE_SIZES, DECODE_STEPS = (1, 64, 256), 48
SHARED, OWN, CHOOSE_ROWS, LABELS = 900, 100, 512, ((5,), (6,), (7,), (8,))
MAX_TRIES = 3


class Bench:
    """One engine, and requests whose prompts never repeat unless they are meant to."""

    def __init__(self, engine: TorchEngine, device: str) -> None:
        self.engine = engine
        self._sync = synchronize(device)
        self._rng = np.random.default_rng(0)
        self._count = 0

    def requests(self, work: Work, count: int, own: int, shared: int = 0) -> list[Request]:
        beginning = self._ids(shared)
        self._count += count
        return [
            Request(id=f"{self._count}-{i}", input_ids=beginning + self._ids(own), work=work)
            for i in range(count)
        ]

    def timed(self, requests: list[Request]) -> tuple[float, list[Completion]]:
        """(seconds, completions) until the last one is back."""
        self._sync()
        begin = time.perf_counter()
        self.engine.submit(requests)
        done = []
        while self.engine.has_work():
            done += self.engine.step()
        self._sync()
        for completion in done:
            if completion.error is not None:
                raise completion.error
        return time.perf_counter() - begin, done

    def decode_step_s(self, batch_size: int) -> float:
        """Median seconds of a step while `batch_size` sequences decode at a context of CONTEXT and
        a little more.
        """
        greedy = Generate(sampling=SamplingParams(max_tokens=DECODE_STEPS, ignore_eos=True))
        self.engine.submit(self.requests(greedy, batch_size, CONTEXT))
        scheduler, times = self.engine.scheduler, []
        while self.engine.has_work():
            all_decode = not scheduler.waiting and all(
                len(s.tokens) > s.num_prompt for s in scheduler.running
            )
            self._sync()
            begin = time.perf_counter()
            self.engine.step()
            if all_decode:
                times.append(time.perf_counter() - begin)
        return statistics.median(times)

    def _ids(self, count: int) -> list[int]:
        return self._rng.integers(0, IDS, count).tolist()  # type: ignore[no-any-return]


def synchronize(device: str) -> Callable[[], None]:
    """Waits until the device has done what it was given; a CPU always has."""
    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None


def gpu_limits(device: str) -> tuple[float, float]:
    """(FLOP/s of a bf16 product, bytes/s of a copy, read and written), the best of several; small
    ones off a GPU.
    """
    size, elements = (8192, 1 << 31) if device.startswith("cuda") else (512, 1 << 24)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(0, 255, (elements,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    sync = synchronize(device)

    def best(call: Callable[[], object]) -> float:
        times = []
        for _ in range(12):
            sync()
            begin = time.perf_counter()
            call()
            sync()
            times.append(time.perf_counter() - begin)
        return min(times[2:])

    return 2 * size**3 / best(lambda: a @ b), 2 * elements / best(lambda: target.copy_(source))


def measure(bench: Bench, limits: tuple[float, float], tries: int) -> dict[str, float]:
    """Tokens or rows a second of each case, and the share of its limit; the first try of each is
    the warm-up.
    """
    flops, bandwidth = limits
    config = bench.engine.config
    weights = config.num_parameters - 2 * config.vocab_size * config.hidden_size  # of the layers
    head = config.vocab_size * config.hidden_size
    kv_bytes = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    found: dict[str, float] = {}

    def best(call: Callable[[], float]) -> float:
        return min([call() for _ in range(tries + 1)][1:])

    one_label = Choose(choices=((5,),))
    seconds = best(lambda: bench.timed(bench.requests(one_label, PREFILL_ROWS, CONTEXT))[0])
    attention = (
        2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * CONTEXT
    )
    found["prefill tokens/s"] = PREFILL_ROWS * CONTEXT / seconds
    found["prefill share of the product limit"] = (
        found["prefill tokens/s"] * (2 * weights + attention) / flops
    )
    for size in DECODE_SIZES:
        seconds = best(lambda size=size: bench.decode_step_s(size))  # type: ignore[misc]
        floor = max(
            (2 * (weights + head) + size * CONTEXT * kv_bytes) / bandwidth,
            2 * size * (weights + head) / flops,
        )
        found[f"decode tokens/s at {size}"] = size / seconds
        found[f"decode share of the memory limit at {size}"] = floor / seconds
    choose = Choose(choices=LABELS)
    seconds = best(lambda: bench.timed(bench.requests(choose, CHOOSE_ROWS, OWN, SHARED))[0])
    found["choose rows/s"] = CHOOSE_ROWS / seconds
    found["choose share of the product limit"] = found["choose rows/s"] * OWN * 2 * weights / flops
    return found


def overfill(model: str, options: dict[str, Any]) -> dict[str, float]:
    """Steps of 65,536 tokens with next to no memory left: how many failed, and whether every row
    came back.
    """
    engine = TorchEngine.from_checkpoint(
        EngineConfig(model=model, max_step_tokens=65536, kv_cache_tokens=150_000, **options)
    )
    bench = Bench(engine, options["device"])
    bench.timed(bench.requests(Choose(choices=((5,),)), 2, CONTEXT))
    free = torch.cuda.mem_get_info()[0]
    hog = torch.empty(max(free - (3 << 30), 0), dtype=torch.uint8, device=options["device"])
    _, done = bench.timed(bench.requests(Choose(choices=((5,),)), 96, CONTEXT))
    del hog
    failures, tokens = engine._step_size.num_failures, engine._step_size.tokens
    engine.close()
    return {
        "rows back": len(done),
        "steps out of memory": failures,
        "tokens of a step in the end": tokens,
    }


def main(
    layers: Annotated[int, typer.Option(min=1)] = 40,
    hidden: Annotated[int, typer.Option(help="smaller than 4096 to try the script")] = 4096,
    device: str = "cuda",
    kernels: Annotated[
        bool, typer.Option(help="fused kernels and recorded steps, or plain torch")
    ] = True,
    tries: Annotated[int, typer.Option(min=1)] = MAX_TRIES,
    out_of_memory: Annotated[bool, typer.Option(help="try a step that does not fit, too")] = False,
    directory: Annotated[Path, typer.Option(help="of the checkpoint")] = Path(
        "build/benchmarks/large"
    ),
    report: Annotated[Path | None, typer.Option(help="JSON file")] = None,
) -> None:
    """Makes the checkpoint, measures the GPU's limits, loads, runs the cases and prints one line
    each.
    """
    shape = Shape(num_hidden_layers=layers)
    if hidden != shape.hidden_size:
        shape = Shape(
            num_hidden_layers=layers,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            vocab_size=4096,
        )
    model = str(make_large_model(directory, shape, device))
    limits = gpu_limits(device)
    options: dict[str, Any] = {"dtype": "bfloat16", "device": device, "cuda_kernels": kernels}
    begin = time.perf_counter()
    engine = TorchEngine.from_checkpoint(EngineConfig(model=model, **options))
    found: dict[str, Any] = {"load s": time.perf_counter() - begin}
    found |= {"product limit TFLOP/s": limits[0] / 1e12, "copy limit TB/s": limits[1] / 1e12}
    found |= measure(Bench(engine, device), limits, tries)
    engine.close()
    if out_of_memory:
        found |= overfill(model, options)
    table = Table(
        "", "", title=f"{layers} layers of {hidden}, kernels {'on' if kernels else 'off'}, {device}"
    )
    for name, value in found.items():
        table.add_row(name, f"{value:,.3g}" if value < 1000 else f"{value:,.0f}")
    Console(width=100).print(table)
    if report:
        report.write_text(
            json.dumps({"kernels": kernels, "layers": layers, "torch": torch.__version__} | found)
        )


if __name__ == "__main__":
    typer.run(main)
