"""`glm-batch evaluate`: plan or run a sweep, score its cells, compare them.

The grid lies in sweep_config, the run and the results in pipelines.sweep, how it looks in
sweep_display.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from glm_batch.jobs.commands.label import EXIT_OK, EXIT_ROW_ERRORS, EXIT_SIGNAL
from glm_batch.jobs.display.display import clock_time, progress_display, short
from glm_batch.jobs.plans.cluster_plan import described_nodes
from glm_batch.jobs.plans.job_plan import (
    GEMM_SHARE,
    ROW_OVERHEAD_S,
    START_S,
    Sample,
    estimate_job,
    measure_gemm,
    shared_prefix_share,
    take_sample,
)
from glm_batch.jobs.plans.media_plan import media_tokens
from glm_batch.jobs.sweep.sweep_config import check_sweep, load_sweep, sweep_name
from glm_batch.jobs.sweep.sweep_display import (
    comparison_text,
    grid_table,
    plan_header,
    plan_line,
    results_tables,
    sweep_summary,
)
from glm_batch.models.engine.api.request import Work
from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.cluster.shares import uses_gpus
from glm_batch.pipelines.planning.plan import Plan, make_plan
from glm_batch.pipelines.runs.prepared import Checked
from glm_batch.pipelines.runs.watch import InterruptedRunError, Stop
from glm_batch.pipelines.sweep.cells import Cell
from glm_batch.pipelines.sweep.sweep_run import with_shared_units
from glm_batch.pipelines.tasks.task_runner import TaskRunner


def evaluate(path: str, overrides: Sequence[str], compare: Sequence[str] | None = None) -> int:
    """Runs a sweep file to its end, keeps and prints the results, and gives the exit code.

    With two cells' names in `compare`, only compares the scores that a finished sweep has kept.
    Raises ConfigError before Ray starts for a sweep that cannot run.
    """
    sweep, place = load_sweep(path, overrides)
    if compare:
        from glm_batch.pipelines.sweep.results import compare as compare_cells

        one, other = compare
        print(comparison_text(one, other, compare_cells(sweep.output, one, other, sweep)))
        return EXIT_OK
    _require_scikit_learn()
    checked = check_sweep(sweep, place)
    from glm_batch.pipelines.sweep.results import evaluate as score_cells
    from glm_batch.pipelines.sweep.results import keep
    from glm_batch.pipelines.sweep.sweep_run import run_sweep

    name = sweep_name(path)
    try:
        with progress_display(name, Console(file=sys.stderr)) as show:
            ran = run_sweep(sweep, show, checked=checked, stop=Stop())
    except InterruptedRunError as error:
        print(f"glm-batch: {error}", file=sys.stderr)
        return EXIT_SIGNAL + error.signum
    results = score_cells(sweep, ran.cells)
    keep(sweep, results)
    console = Console(highlight=False)
    for table in results_tables(results):
        console.print(table)
    console.print(sweep_summary(sweep, ran, results))
    failed = max(each.error_rate for each in results.cells)
    return EXIT_OK if failed <= sweep.max_error_rate else EXIT_ROW_ERRORS


def _require_scikit_learn() -> None:
    from importlib.util import find_spec

    if find_spec("sklearn") is None:
        raise ConfigError(
            "evaluate computes its metrics with scikit-learn, which is not installed: "
            "pip install scikit-learn"
        )


def plan_sweep(path: str, overrides: Sequence[str]) -> None:
    """Prints the plan of a sweep file. Raises ConfigError when the sweep could not start."""
    sweep, place = load_sweep(path, overrides)
    checked = check_sweep(sweep, place)
    rate = measure_gemm()
    lines, total_rows, total_tokens, total_s = (
        [],
        0,
        0.0,
        START_S * len({cell.replicas for cell in sweep.cells}),
    )
    samples: dict[tuple[str, str, str], Sample] = {}  # cells that ask in the same words have one
    for cell, each in zip(with_shared_units(sweep.cells, checked), checked, strict=True):
        # requests of other systems' files are no sweep's
        assert isinstance(each.runner, TaskRunner)
        plan, question = (
            make_plan(cell.job, each.survey, {}),
            (cell.job.model, cell.dataset, each.runner.prompts.key),
        )
        if question not in samples:
            samples[question] = take_sample(each, plan)
        line, rows, tokens, seconds = _line(
            cell, each, each.runner.work, plan, samples[question], rate
        )
        lines.append(line)
        total_rows, total_tokens, total_s = (
            total_rows + rows,
            total_tokens + tokens,
            total_s + (seconds or 0.0),
        )
    console = Console(highlight=False)
    console.print(grid_table(sweep.cells, lines, plan_header()))
    models = len({cell.replicas for cell in sweep.cells})
    console.print(
        Text(
            f"{len(sweep.cells):,} cells, {total_rows:,} rows, {short(total_tokens)} prompt tokens "
            f"before any sharing; {models} set{'s' * (models > 1)} of replicas; very roughly "
            f"{clock_time(total_s)} by the same basis as the plan of a job; output {sweep.output}"
        )
    )


def _line(
    cell: Cell, checked: Checked, work: Work, plan: Plan, sample: Sample, rate: float
) -> tuple[tuple[str, ...], int, float, float | None]:
    """The cell's line, rows, prompt tokens, and seconds (None on a GPU, which is not measured)."""
    if not sample.ids:
        return (
            plan_line(plan.num_rows, plan.num_units, None, len(sample.errors), None),
            plan.num_rows,
            0.0,
            None,
        )
    lengths = [len(ids) for ids in sample.ids]
    of_media = sum(media_tokens(cell.job, cell.job.preprocess, sample.media)) / len(lengths)
    share = shared_prefix_share(sample.ids)
    estimate = estimate_job(checked.config, [work], lengths, share, plan.num_rows, of_media)
    each = ROW_OVERHEAD_S + sample.row_seconds / (os.cpu_count() or 1)
    seconds: float | None = plan.num_rows * each
    if uses_gpus(cell.job, described_nodes(cell.job)):
        seconds = None
    elif cell.job.engine.kind != "echo":
        seconds = plan.num_rows * each + estimate.flops / (GEMM_SHARE * rate)
    line = plan_line(
        plan.num_rows, plan.num_units, estimate.prompt_tokens, len(sample.errors), seconds
    )
    return line, plan.num_rows, estimate.prompt_tokens, seconds
