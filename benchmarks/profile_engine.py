"""`python -m benchmarks.profile_engine --work choose`: where a warm pass of TorchEngine spends its
time.

Owns the sorting of torch's operators into what they are for. Shares are of the pass's wall time;
what no operator accounts for is Python between them and waiting.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks import BUILD
from benchmarks.make_mid_model import make_mid_model
from benchmarks.systems.harness import Plan
from benchmarks.systems.torch_alone import TorchSystem
from benchmarks.workload import WorkKind, read_rows, write_rows

PURPOSES = {
    "linear layers": ("mkldnn::_linear_pointwise", "aten::mm", "aten::addmm"),
    "attention: products": ("aten::baddbmm", "aten::baddbmm_", "aten::bmm"),
    "attention: softmax and mask": (
        "aten::_softmax",
        "aten::add_",
        "aten::masked_fill_",
        "aten::repeat_interleave",
    ),
    "attention: gathering keys and values": (
        "aten::index_select",
        "aten::index_copy_",
        "aten::cat",
    ),
    "conversions and copies": ("aten::copy_",),
    "norms, rotary embedding, residuals": (
        "aten::mul",
        "aten::mul_",
        "aten::add",
        "aten::linalg_vector_norm",
    ),
}
PURPOSE_OF = {
    operator: purpose for purpose, operators in PURPOSES.items() for operator in operators
}


def main(
    work: Annotated[str, typer.Option(help="choose or generate")] = "choose",
    rows: Annotated[int, typer.Option(min=2)] = 64,
) -> None:
    """Profiles one pass with fresh rows after a warm-up pass and prints the shares."""
    kind: WorkKind = "generate" if work == "generate" else "choose"
    model_dir = make_mid_model(BUILD / "mid")
    files = [write_rows(model_dir, kind, rows, i, BUILD) for i in range(2)]
    system = TorchSystem(
        Plan(work=kind, model_dir=str(model_dir), row_files=list(map(str, files)), options={})
    )
    system.run(read_rows(files[0]))
    profiled = read_rows(files[1])
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        begin = time.perf_counter()
        system.run(profiled)
        wall_s = time.perf_counter() - begin  # the profiler's own start and end take a second
    seconds: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        seconds[PURPOSE_OF.get(event.key, "other operators")] += event.self_cpu_time_total / 1e6
    seconds["Python and waiting"] = wall_s - sum(seconds.values())
    _show(kind, wall_s, seconds)


def _show(kind: str, wall_s: float, seconds: dict[str, float]) -> None:
    table = Table(
        "", "s", "share", title=f"{kind}: one pass of {wall_s:.1f} s (profiling included)"
    )
    for purpose, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        table.add_row(purpose, f"{spent:.2f}", f"{spent / wall_s:.0%}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
