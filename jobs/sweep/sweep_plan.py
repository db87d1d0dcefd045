"""`glm-batch plan SWEEP`: the grid with rows, tokens, rough times; loads no model.

Samples each cell's rows as the plan of a job does. Starts no Ray and writes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from glm_batch.jobs.display.display import clock_time, short
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
from glm_batch.jobs.sweep.sweep_config import check_sweep, load_sweep
from glm_batch.jobs.sweep.sweep_display import grid_table, plan_header, plan_line
from glm_batch.models.engine.api.request import Work
from glm_batch.pipelines.cluster.shares import uses_gpus
from glm_batch.pipelines.planning.plan import Plan, make_plan
from glm_batch.pipelines.runs.prepared import Checked
from glm_batch.pipelines.sweep.cells import Cell
from glm_batch.pipelines.sweep.sweep_run import with_shared_units
from glm_batch.pipelines.tasks.task_runner import TaskRunner


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
