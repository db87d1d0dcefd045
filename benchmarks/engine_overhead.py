"""`python -m benchmarks.engine_overhead`: what a step of TorchEngine costs beside the model, in ms
by part.

Owns a runner that computes nothing: its numbers are the same whatever is asked. What remains is
scheduling, building the batch, drawing tokens and handing them out, with the block and step sizes
of a GPU. Medians over the steps.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from glm_batch.models.checkpoint.config_reader import load_config
from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.engine import Choose, Generate, Request, SamplingParams, Work
from glm_batch.models.engine.execution.batch import Batch
from glm_batch.models.engine.execution.settings import Limits, resolve_end_ids
from glm_batch.models.engine.scheduling.scheduler import Scheduler
from glm_batch.models.engine.torch_engine import TorchEngine
from glm_batch.models.engine.works.readout import StepOutput
from glm_batch.models.processing.tokenizer import Tokenizer

CHECKPOINT = Path(__file__).parents[1] / "examples" / "tiny_glm"
CONTEXT, OUTPUT = 1024, 48
SHARED, OWN, LABELS = 900, 100, ((5,), (6, 7), (8,), (9, 10, 11))
LIMITS = Limits(
    max_model_len=2048,
    max_step_tokens=8192,
    batch_step_tokens=8192,
    max_num_seqs=512,
    num_blocks=65536,
    block_size=16,
    prefix_caching=True,
    media_cache_bytes=1 << 20,
)


class IdleRunner:
    """Answers every batch at once."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._logits = torch.randn(
            LIMITS.max_num_seqs, config.vocab_size, generator=torch.Generator().manual_seed(0)
        )

    def run(self, batch: Batch) -> StepOutput:
        return StepOutput(
            sample_logits=self._logits[: len(batch.readout.sample)],
            pair_logprobs=[-1.0] * len(batch.readout.pair_rows),
        )

    def free_memory(self) -> None:
        """Holds nothing."""


def make_engine(*, paged: bool) -> TorchEngine:
    """`paged`: with batches as the fused attention reads them."""
    config = load_config(CHECKPOINT)
    tokenizer = Tokenizer.from_dir(str(CHECKPOINT))
    tokenizer.eos_token_ids = resolve_end_ids(tokenizer, config)
    return TorchEngine(
        IdleRunner(config), tokenizer, replace(LIMITS, tile_queries=8 if paged else 0)
    )


def requests(work: Work, count: int, *, shared: int, own: int) -> list[Request]:
    """Prompts of `shared` equal tokens and `own` others."""
    rng = np.random.default_rng(0)
    beginning = rng.integers(0, 256, shared).tolist()
    return [
        Request(id=str(i), input_ids=beginning + rng.integers(0, 256, own).tolist(), work=work)
        for i in range(count)
    ]


@contextmanager
def timed_parts(seconds: dict[str, list[float]]) -> Iterator[None]:
    """Appends each call's time to the part that it belongs to."""

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[part].append(time.perf_counter() - begin)

        return call

    with (
        mock.patch.object(Scheduler, "schedule", timed("schedule", Scheduler.schedule)),
        mock.patch.object(TorchEngine, "_pack", timed("build batch", TorchEngine._pack)),
        mock.patch.object(TorchEngine, "_draw", timed("draw", TorchEngine._draw)),
        mock.patch.object(TorchEngine, "_hand_out", timed("hand out", TorchEngine._hand_out)),
    ):
        yield


def steps(batch: list[Request], *, skip_prefill: bool, paged: bool) -> tuple[dict[str, float], int]:
    """Median ms of each part over a run's steps, and how many those were."""
    engine = make_engine(paged=paged)
    engine.submit(batch)
    seconds: dict[str, list[float]] = defaultdict(list)
    while skip_prefill and (
        engine.scheduler.waiting or any(s.is_prefilling for s in engine.scheduler.running)
    ):
        engine.step()
    with timed_parts(seconds):
        while engine.has_work():
            begin = time.perf_counter()
            engine.step()
            seconds["step"].append(time.perf_counter() - begin)
    return {part: 1e3 * statistics.median(times) for part, times in seconds.items()}, len(
        seconds["step"]
    )


def main(
    batch_sizes: Annotated[str, typer.Option(help="of the decode steps")] = "1,64,256",
    paged: Annotated[
        bool, typer.Option(help="batches as block tables, for the fused attention")
    ] = False,
) -> None:
    """Prints one line a case."""
    parts = ("step", "schedule", "build batch", "draw", "hand out")
    table = Table("", "steps", *(f"{part}, ms" for part in parts))
    greedy = Generate(sampling=SamplingParams(max_tokens=OUTPUT, ignore_eos=True))
    warm = Generate(
        sampling=SamplingParams(max_tokens=OUTPUT, ignore_eos=True, temperature=0.8, top_p=0.9)
    )
    cases = {
        f"decode {count}, context {CONTEXT}, {name}": (
            requests(work, count, shared=0, own=CONTEXT),
            True,
        )
        for count in map(int, batch_sizes.split(","))
        for name, work in (("greedy", greedy), ("top-p", warm))
    }
    cases["decode 256, half of the context shared"] = (
        requests(greedy, 256, shared=512, own=512),
        True,
    )
    cases[f"choose, {SHARED} shared + {OWN}"] = (
        requests(Choose(choices=LABELS), 1024, shared=SHARED, own=OWN),
        False,
    )
    cases[f"prefill {CONTEXT}"] = (
        requests(Choose(choices=((5,),)), 256, shared=0, own=CONTEXT),
        False,
    )
    for name, (batch, skip_prefill) in cases.items():
        medians, count = steps(batch, skip_prefill=skip_prefill, paged=paged)
        table.add_row(name, str(count), *(f"{medians[part]:.2f}" for part in parts))
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
