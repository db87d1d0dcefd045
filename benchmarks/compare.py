"""`python -m benchmarks.compare`: the same rows through several systems in one run, and what each
of them needed.

Owns which systems there are, how each is started (its interpreter, its environment), and the
report. Knows nothing of how a system is called: that is in benchmarks/systems. See
benchmarks/README.md for what is measured.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import BUILD, ROOT
from benchmarks.machine import MemoryWatch, describe, end_tree
from benchmarks.make_mid_model import make_mid_model
from benchmarks.workload import (
    DEFAULT_ROWS,
    OUTPUT_TOKENS,
    WorkKind,
    arithmetic,
    write_image_rows,
    write_rows,
)

TINY_MODEL = ROOT / "examples" / "tiny_glm"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
VLLM_ENV = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the automatic binding leaves vLLM one core of two
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemSpec:
    """How one system is started. `python_env` names the variable that holds its interpreter; None
    means ours.

    `max_passes` bounds the timed passes of a system that is slow; 0 is for one that loads its model
    for each run. `comparable` is False where its answers are not of the form that the others give;
    `images` is whether it reads them. `options` are its arguments, which `--options` adds to.
    """

    module: str
    python_env: str | None = None
    env: dict[str, str] = field(default_factory=dict)
    max_passes: int | None = None
    comparable: bool = True
    images: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def interpreter(self) -> str | None:
        """The interpreter to run it with, or None where the peer is not installed."""
        return sys.executable if self.python_env is None else os.environ.get(self.python_env)


FEWER = 4  # times fewer rows in the second run of such a system
HEADINGS = (
    "ready, s",
    "first result, s",
    "steady state, s",
    "  min to max",
    "  x vLLM's speed",
    "  x ray.data.llm's speed",
    "  of GEMM limit",
    "end to end, s",
    "  x vLLM's speed",
    "  x ray.data.llm's speed",
    "peak memory, GiB",
    "  largest process, GiB",
    "agreement",
)
SYSTEMS = {
    "torch": SystemSpec(module="torch_alone"),
    "vllm": SystemSpec(module="vllm_llm", python_env="GLM_BATCH_VLLM_PYTHON", env=VLLM_ENV),
    "pipeline": SystemSpec(module="pipeline_job", max_passes=0, comparable=False, images=True),
    "pipeline-vllm": SystemSpec(
        module="pipeline_job",
        python_env="GLM_BATCH_VLLM_PYTHON",
        env=VLLM_ENV,
        max_passes=0,
        comparable=False,
        images=True,
        options={"kind": "vllm"},
    ),
    "ray": SystemSpec(
        images=True,
        module="ray_data_llm",
        python_env="GLM_BATCH_RAY_LLM_PYTHON",
        env={**VLLM_ENV, "RAY_USAGE_STATS_ENABLED": "0"},
        max_passes=0,
    ),
    "transformers": SystemSpec(module="transformers_hf", max_passes=1),
}


def main(
    works: Annotated[
        str, typer.Option("--work", help="comma-separated: choose, generate, images")
    ] = "choose,generate",
    systems: Annotated[str, typer.Option(help=f"comma-separated: {', '.join(SYSTEMS)}")] = ",".join(
        SYSTEMS
    ),
    repeats: Annotated[
        int, typer.Option(min=1, help="timed passes of each system, other rows in each")
    ] = 3,
    rows: Annotated[
        int | None, typer.Option(min=2, help="rows instead of 512 (choose) and 64 (generate)")
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--options", help="SYSTEM=JSON, e.g. vllm='{\"enforce_eager\": true}'"),
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="seconds one system may take for one work")
    ] = 1800.0,
) -> None:
    """Measures the systems side by side and writes build/benchmarks/compare-TIME.json."""
    work_kinds = cast(list[WorkKind], _names(works, get_args(WorkKind), "--work"))
    names = _names(systems, tuple(SYSTEMS), "--systems")
    system_options = _options(options or [])
    console = Console()
    model_dir = make_mid_model(BUILD / "mid")
    report: dict[str, Any] = {"machine": describe(), "repeats": repeats, "works": {}}
    console.print(f"{report['machine']['cpu']}, {report['machine']['usable_cores']} cores")
    path = BUILD / f"compare-{time.strftime('%Y%m%d-%H%M%S')}.json"
    # so that a killed comparison ends its systems too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report["gemm_before"] = _measure_gemm()
    for work_kind in work_kinds:
        num_rows = rows or DEFAULT_ROWS[work_kind]
        row_files = _row_files(model_dir, work_kind, num_rows, repeats)
        results: dict[str, Any] = {}
        report["works"][work_kind] = {"rows": num_rows, "systems": results}
        for name in names:
            console.print(f"{work_kind}: {name} ...")
            plan = {
                "work": work_kind,
                "model_dir": str(TINY_MODEL if work_kind == "images" else model_dir),
                "row_files": row_files[: 1 + _num_passes(name, repeats)],
                "options": SYSTEMS[name].options | system_options.get(name, {}),
            }
            results[name] = _run(name, plan, timeout)
            if SYSTEMS[name].max_passes == 0 and "end_to_end_s" in results[name]:
                few = _row_files(model_dir, work_kind, num_rows // FEWER, 0)
                results[name] |= _without_start(
                    results[name], _run(name, plan | {"row_files": few}, timeout)
                )
            path.write_text(json.dumps(report, indent=1))
    report["gemm_after"] = _measure_gemm()
    summarise(report)
    path.write_text(json.dumps(report, indent=1))
    _show(console, report)
    console.print(f"written to {path}")
    if any(
        "failed" in result
        for each in report["works"].values()
        for result in each["systems"].values()
    ):
        raise typer.Exit(1)


def _row_files(model_dir: Path, work_kind: WorkKind, num_rows: int, repeats: int) -> list[str]:
    if work_kind == "images":
        return [str(write_image_rows(TINY_MODEL, num_rows, BUILD))]
    return [str(write_rows(model_dir, work_kind, num_rows, i, BUILD)) for i in range(repeats + 1)]


def _names(text: str, known: tuple[str, ...], option: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{option}: {name!r} is not one of {', '.join(known)}")
    return names


def _options(texts: list[str]) -> dict[str, Any]:
    options = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in SYSTEMS:
            raise typer.BadParameter(f"--options: {name!r} is not one of {', '.join(SYSTEMS)}")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError as error:
            raise typer.BadParameter(f"--options: {value!r} is no JSON: {error}") from error
    return options


def _num_passes(name: str, repeats: int) -> int:
    bound = SYSTEMS[name].max_passes
    return repeats if bound is None else min(repeats, bound)


def _run(name: str, plan: dict[str, Any], timeout: float) -> dict[str, Any]:
    """One system's report; {"absent": why} where it is not installed, {"failed": why} where it
    broke.
    """
    spec = SYSTEMS[name]
    python = spec.interpreter()
    if plan["work"] == "images" and not spec.images:
        return {"absent": "text only in this comparison"}
    if python is None:
        return {"absent": f"not installed ({spec.python_env} is not set)"}
    stem = BUILD / f"{plan['work']}-{name}"
    plan_path, log_path = stem.with_suffix(".plan.json"), stem.with_suffix(".log")
    plan_path.write_text(json.dumps(plan))
    command = [
        python,
        "-m",
        f"benchmarks.systems.{spec.module}",
        "--plan",
        str(plan_path),
        "--started",
    ]
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [*command, repr(time.time())],
            cwd=ROOT,
            env={**os.environ, **OFFLINE, **spec.env},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        with MemoryWatch(process.pid) as memory:
            try:
                output, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                return {"failed": f"no answer within {timeout:.0f} s, see {log_path}"}
            finally:
                end_tree(process)
    if process.returncode != 0:
        last_line = (log_path.read_text().strip().splitlines() or ["no output"])[-1]
        return {"failed": f"exit status {process.returncode}: {last_line} (see {log_path})"}
    result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return {
        **result,
        "peak_rss_bytes": memory.peak,
        "process_peaks": memory.process_peaks(),
        "python": python,
        "env": spec.env,
    }


def _without_start(whole: dict[str, Any], few: dict[str, Any]) -> dict[str, Any]:
    """The steady state of a system that starts anew for each run: what the rows that a smaller run
    lacks cost it.
    """
    if "end_to_end_s" not in few:
        return few
    more = whole["end_to_end_s"] - few["end_to_end_s"]
    return {
        "fewer_rows_end_to_end_s": few["end_to_end_s"],
        "steady_s": [more * FEWER / (FEWER - 1)],
    }


def _measure_gemm() -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gemm"]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def summarise(report: dict[str, Any]) -> None:
    """Adds medians, ratios to vLLM, shares of the GEMM limit, and the agreement with transformers
    (or the first).
    """
    rates = {
        rows: max(report[when]["flops_by_rows"][rows] for when in ("gemm_before", "gemm_after"))
        for rows in report["gemm_before"]["flops_by_rows"]
    }
    for work_kind, each in report["works"].items():
        limit_s = None
        if work_kind != "images":
            limit_s = arithmetic(work_kind, each["rows"]).limit_s(
                rates["1024"], rates[_nearest(rates, each["rows"])]
            )
        each["gemm_limit_s"] = limit_s
        done = {
            name: result for name, result in each["systems"].items() if "end_to_end_s" in result
        }
        for result in done.values():
            steady = statistics.median(result["steady_s"]) if result["steady_s"] else None
            result["steady_median_s"] = steady
            result["share_of_gemm_limit"] = limit_s / steady if steady and limit_s else None
        for result in done.values():
            vllm, ray = done.get("vllm"), done.get("ray")
            result["times_vllm_steady"] = _ratio(vllm, result, "steady_median_s")
            result["times_ray_steady"] = _ratio(ray, result, "steady_median_s")
            result["times_vllm_end_to_end"] = _ratio(vllm, result, "end_to_end_s")
            result["times_ray_end_to_end"] = _ratio(ray, result, "end_to_end_s")
        comparable = {name: result for name, result in done.items() if SYSTEMS[name].comparable}
        reference = comparable.get("transformers") or next(iter(comparable.values()), None)
        for name, result in done.items():
            result["agreement"] = (
                _agreement(work_kind, reference, result)
                if reference and name in comparable
                else "-"
            )


def _nearest(rates: dict[str, float], rows: int) -> str:
    """The measured number of rows that decode steps of `rows` sequences come nearest to."""
    return min(rates, key=lambda measured: abs(int(measured) - rows))


def _ratio(base: dict[str, Any] | None, result: dict[str, Any], key: str) -> float | None:
    return base[key] / result[key] if base and base[key] and result[key] else None


def _agreement(work_kind: str, reference: dict[str, Any], result: dict[str, Any]) -> str:
    """The largest difference of a label's log-probability, or the mean number of leading output
    tokens in common.
    """
    pairs = list(zip(reference["sample"], result["sample"], strict=True))
    if work_kind != "generate":
        worst = max(
            abs(a - b) for x, y in pairs for a, b in zip(x["logprobs"], y["logprobs"], strict=True)
        )
        return f"dlogprob {worst:.3f}"
    equal = sum(_common_prefix(x["token_ids"], y["token_ids"]) for x, y in pairs)
    return f"{equal / len(pairs):.0f}/{OUTPUT_TOKENS} tokens"


def _common_prefix(left: list[int], right: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), len(left))


def _show(console: Console, report: dict[str, Any]) -> None:
    for when in ("gemm_before", "gemm_after"):
        rates = ", ".join(
            f"{rows} rows {rate / 1e9:.0f}" for rows, rate in report[when]["flops_by_rows"].items()
        )
        console.print(
            f"bf16 matrix products ({when.removeprefix('gemm_')} the run), GFLOP/s: {rates}"
        )
    for work_kind, each in report["works"].items():
        limit = (
            _number(each["gemm_limit_s"], "; GEMM limit {:.1f} s") if each["gemm_limit_s"] else ""
        )
        table = Table(title=f"{work_kind}: {each['rows']} rows{limit}")
        table.add_column("", no_wrap=True)
        done = {
            name: result for name, result in each["systems"].items() if "end_to_end_s" in result
        }
        for name in done:
            table.add_column(name, justify="right")
        columns = [_cells(result) for result in done.values()]
        for heading, *cells in zip(HEADINGS, *columns, strict=True):
            table.add_row(heading, *cells)
        console.print(table)
        for name, result in each["systems"].items():
            if name not in done:
                console.print(
                    f"{name}: {result.get('absent') or 'FAILED: ' + result['failed']}",
                    soft_wrap=True,
                )


def _cells(result: dict[str, Any]) -> list[str]:
    """A system's column, in the order of HEADINGS."""
    steady = result["steady_s"]
    return [
        f"{result['ready_s']:.1f}",
        _number(result["first_result_s"], "{:.1f}"),
        _number(result["steady_median_s"], "{:.2f}"),
        f"{min(steady):.1f} to {max(steady):.1f}" if steady else "-",
        _number(result["times_vllm_steady"], "{:.2f}"),
        _number(result["times_ray_steady"], "{:.2f}"),
        _number(result["share_of_gemm_limit"], "{:.0%}"),
        f"{result['end_to_end_s']:.1f}",
        _number(result["times_vllm_end_to_end"], "{:.2f}"),
        _number(result["times_ray_end_to_end"], "{:.2f}"),
        f"{result['peak_rss_bytes'] / 2**30:.1f}",
        f"{max(result['process_peaks'].values()) / 2**30:.1f}",
        result["agreement"],
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


if __name__ == "__main__":
    typer.run(main)
