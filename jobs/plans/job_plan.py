"""`glm-batch plan`: what a job would do, from its files and a sample of its rows, without loading a
model.

Owns the sample, the token statistics and the estimate with its basis. Starts no Ray and writes
nothing.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise, repeat
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from glm_batch.jobs.checks.checks import check_job
from glm_batch.jobs.display.display import clock_time, short
from glm_batch.jobs.files.sections import load_job
from glm_batch.jobs.plans.cluster_plan import cluster_lines, described_nodes
from glm_batch.jobs.plans.media_plan import MediaSize, media_lines, media_note, media_tokens
from glm_batch.models import rooms
from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.engine.api.request import Choose, Generate, Score, Work
from glm_batch.models.errors import RowError
from glm_batch.models.processing.prompt import Prompt
from glm_batch.pipelines.cluster.shares import uses_gpus
from glm_batch.pipelines.input.values import Row, decode_rows
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.planning.plan import Plan, Unit, job_source, make_plan
from glm_batch.pipelines.runs.prepared import Checked
from glm_batch.pipelines.tasks.task_runner import TaskRunner

SAMPLED_UNITS = 8
ROWS_PER_UNIT = 64
MEDIA_ROWS_PER_UNIT = 8  # each of them is loaded and decoded
SHOWN_PROMPTS = 3
SHOWN_FILES = 10
SHOWN_CHARS = 1200
# The basis of the time estimate, said in its text: the share of the GEMM rate that a batch reaches,
# what a row costs beside its matrices, and how long the workers take to come up.
GEMM_SHARE = 0.4
ROW_OVERHEAD_S = 0.002
START_S = 12.0
NO_ESTIMATE = "estimate", "none: the sample has no row without an error"
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Sampled rows: prompts of the good ones as tokens and texts, (place, error) of the others, and
    all media.

    `ids` tell images apart: see `told_apart`. `row_seconds` is what a row took to become a prompt,
    its media loaded, on one worker. `unprinted` counts the rows by what the chat template leaves
    out of their messages.
    """

    ids: list[list[int]]
    prompts: list[tuple[str, str]]
    errors: list[tuple[str, RowError]]
    media: list[MediaSize]
    units: int
    row_seconds: float
    unprinted: Mapping[str, int] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(self.ids) + len(self.errors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Tokens of the whole job and the floating-point operations of its matrices."""

    prompt_tokens: float
    computed_prompt_tokens: float
    output_tokens: float
    flops: float


def plan(path: str, overrides: Sequence[str]) -> None:
    """Prints the plan of a job file. Raises ConfigError when the job could not start."""
    job, place = load_job(path, overrides)
    checked = check_job(job, place)
    units = make_plan(job, checked.survey, {})
    if job.asks_by_row:
        shown, lines = rooms.load("jobs.openai_batch.request_plan").plan_lines(job, checked, units)
    else:
        sample = take_sample(checked, units)
        shown, lines = sample.prompts, report_lines(job, checked, units, sample)
    _show(units, shown, lines)


def _show(plan: Plan, prompts: Sequence[tuple[str, str]], lines: Iterator[tuple[str, str]]) -> None:
    console = Console(highlight=False)
    console.print(files_table(plan))
    for where, prompt in prompts:
        console.print(Panel(Text(excerpt(prompt)), title=Text(where), title_align="left"))
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in lines:
        table.add_row(name, Text(text))
    console.print(table)


def evenly(items: Sequence[T]) -> list[T]:
    """Some of the items, from all over them."""
    if not items:
        return []
    return [
        items[index]
        for index in sorted(
            {round(place) for place in np.linspace(0, len(items) - 1, SHOWN_PROMPTS)}
        )
    ]


def take_sample(checked: Checked, plan: Plan) -> Sample:
    """The first rows of a few units that are spread evenly over the input."""
    units, runner = spread(plan), checked.runner
    good: list[tuple[str, Row]] = []
    ids: list[list[int]] = []
    media: list[MediaSize] = []
    errors: list[tuple[str, RowError]] = []
    seconds: list[float] = []
    unprinted: Counter[str] = Counter()
    with closing(runner):
        for unit in units:
            begun = time.perf_counter()
            sampled = list(_sampled(checked, plan, unit))
            seconds.append((time.perf_counter() - begun) / len(sampled))
            for where, row, prompt in sampled:
                if isinstance(prompt, RowError):
                    errors.append((where, prompt))
                    continue
                ids.append(told_apart(prompt, checked.config))
                media += map(MediaSize.of, prompt.patches)
                unprinted.update(runner.prompts.unprinted(row))
                good.append((where + "".join(map(media_note, prompt.patches)), row))
    prompts = [(where, runner.preview(row)) for where, row in evenly(good)]
    return Sample(
        ids=ids,
        prompts=prompts,
        errors=errors,
        media=media,
        units=len(units),
        # the first one waits for the decoder to start
        row_seconds=statistics.median(seconds) if seconds else 0.0,
        unprinted=unprinted,
    )


def _sampled(
    checked: Checked, plan: Plan, unit: Unit
) -> Iterator[tuple[str, Row, Prompt | RowError]]:
    """(place, row, prompt or error) of the first rows of a unit."""
    file, runner = plan.files[unit.file].file, checked.runner
    num_rows = MEDIA_ROWS_PER_UNIT if runner.prompts.reads_media else ROWS_PER_UNIT
    rows = decode_rows(job_source(checked.job).read(file, unit.rows).slice(0, num_rows))
    prompts = iter(runner.prompts([row for row in rows if not isinstance(row, RowError)]))
    for number, row in enumerate(rows, unit.rows.start):
        where = f"{file.name}, row {number}"
        if isinstance(row, RowError):
            yield where, {}, row
            continue
        prompt = next(prompts)
        asked = runner.asked(where, row, prompt)
        ids = () if asked.error else asked.requests[0].input_ids
        yield where, row, asked.error or replace(prompt, input_ids=ids)


def files_table(plan: Plan) -> Table:
    """The input files with their rows and sizes; those that are not shown are counted."""
    table = Table("input", "rows", "MB", box=None, padding=(0, 2, 0, 0), header_style="dim")
    for planned in plan.files[:SHOWN_FILES]:
        table.add_row(
            Text(planned.file.name), f"{planned.num_rows:,}", f"{planned.file.size / 1e6:,.1f}"
        )
    if len(plan.files) > SHOWN_FILES:
        rest = plan.files[SHOWN_FILES:]
        rows, size = (
            sum(planned.num_rows for planned in rest),
            sum(planned.file.size for planned in rest),
        )
        table.add_row(f"and {len(rest):,} more files", f"{rows:,}", f"{size / 1e6:,.1f}")
    return table


def report_lines(
    job: Job, checked: Checked, plan: Plan, sample: Sample
) -> Iterator[tuple[str, str]]:
    """Name and text of each line below the prompts."""
    runner = checked.runner
    yield from plan_lines(job, checked, plan, f"{sample.rows:,} rows from {sample.units}")
    yield from error_lines(sample.errors)
    if sample.unprinted:
        names = ", ".join(f"{name} ({rows:,} rows)" for name, rows in sample.unprinted.items())
        yield "left out", f"{names} of the messages: the checkpoint's template does not print it"
    yield from _label_lines(job, runner)
    if not sample.ids:
        yield NO_ESTIMATE
        return
    lengths, share = [len(ids) for ids in sample.ids], shared_prefix_share(sample.ids)
    yield lengths_line(lengths)
    yield from media_lines(job, sample.media, sum(lengths))
    yield shared_line(share)
    of_media = sum(media_tokens(job, job.preprocess, sample.media)) / len(lengths)
    estimate = estimate_job(checked.config, [runner.work], lengths, share, plan.num_rows, of_media)
    yield estimate_line(estimate, [runner.work], "label" if job.task.kind == "choose" else "output")
    yield "time", time_text(job, estimate, plan.num_rows, sample.row_seconds)


def plan_lines(job: Job, checked: Checked, plan: Plan, sampled: str) -> Iterator[tuple[str, str]]:
    yield "rows", f"{plan.num_rows:,} in {plan.num_units:,} units of up to {plan.unit_rows:,} rows"
    yield "output", f"{job.output}: columns {', '.join(checked.schema.names)}"
    yield from cluster_lines(job)
    yield "sample", f"{sampled} of {plan.num_units:,} units"
    if plan.duplicates:
        yield (
            "duplicate keys",
            f"{len(plan.duplicates):,} rows of the whole input repeat the key of an earlier row",
        )


def lengths_line(lengths: Sequence[int]) -> tuple[str, str]:
    return (
        "prompt tokens",
        f"min {min(lengths)}, median {statistics.median(lengths):.0f}, "
        f"p95 {np.percentile(lengths, 95):.0f}, max {max(lengths)}",
    )


def shared_line(share: float) -> tuple[str, str]:
    return (
        "shared prefix",
        f"{share:.0%} of the prompt tokens repeat the beginning of another sampled prompt",
    )


def estimate_line(estimate: Estimate, works: Sequence[Work], what: str) -> tuple[str, str]:
    at_most = "at most " if any(isinstance(work, Generate) for work in works) else ""
    return (
        "estimate",
        f"{short(estimate.prompt_tokens)} prompt tokens, of which "
        f"{short(estimate.computed_prompt_tokens)} to compute; "
        f"{at_most}{short(estimate.output_tokens)} {what} tokens",
    )


def told_apart(prompt: Prompt, config: ModelConfig) -> list[int]:
    """The prompt's ids, with a number of each image's or video's own in the place of the token that
    stands for all.
    """
    if prompt.media is None or config.media_tokens is None or config.vision is None:
        return list(prompt.input_ids)
    merged = config.vision.spatial_merge_size**2
    items = prompt.media.items
    own = chain.from_iterable(
        repeat(int.from_bytes(item.digest), len(item.patches) // merged) for item in items
    )
    return [next(own) if id == config.media_tokens.image else id for id in prompt.input_ids]


def shared_prefix_share(prompts: Sequence[list[int]]) -> float:
    """The share of prompt tokens that a prefix cache without blocks or limits would not compute
    again.

    Sorted, a prompt shares its longest known beginning with its neighbour.
    """
    ordered = sorted(prompts)
    shared = sum(_common(left, right) for left, right in pairwise(ordered))
    total = sum(map(len, prompts))
    return shared / total if total else 0.0


def estimate_job(
    config: ModelConfig,
    works: Sequence[Work],
    lengths: Sequence[int],
    share: float,
    num_rows: int,
    media_tokens: float = 0.0,
) -> Estimate:
    """Scales the sample to the whole job, whose rows ask for one of `works` each.

    A token costs 2 operations for each weight of the layers, plus attention over half of its
    prompt; the vocabulary projection is paid at the positions that are read: one for a prompt with
    an answer, one for each output token, and all of a prompt whose tokens are scored.
    `media_tokens` of a row cost the vision tower's weights for each of their patches.
    """
    mean = statistics.fmean(lengths)
    outputs = statistics.fmean(map(_num_outputs, works))
    computed = mean * (1 - share)
    vocabulary = config.vocab_size * config.hidden_size
    has_projection = config.head == "causal_lm"
    tables = vocabulary * (2 if has_projection and not config.tie_word_embeddings else 1)
    attention = (
        4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * mean / 2
    )
    tower = config.vision.num_parameters if config.vision else 0
    patches = media_tokens * (config.vision.spatial_merge_size**2 if config.vision else 0)
    per_token = 2 * (config.num_parameters - tables - tower) + attention
    scored = [
        mean if isinstance(work, Score) else isinstance(work, Generate | Choose) for work in works
    ]
    read = outputs + statistics.fmean(scored)
    flops = (computed + outputs) * per_token + 2 * vocabulary * read + 2 * tower * patches
    return Estimate(
        prompt_tokens=mean * num_rows,
        computed_prompt_tokens=computed * num_rows,
        output_tokens=outputs * num_rows,
        flops=flops * num_rows,
    )


def _num_outputs(work: Work) -> int:
    """Tokens behind the prompt: those that may be written, or all that the labels have, what they
    share once.
    """
    if isinstance(work, Generate):
        return work.sampling.max_tokens * work.sampling.n
    if isinstance(work, Choose):
        return len({choice[:end] for choice in work.choices for end in range(1, len(choice) + 1)})
    return 0


def time_text(job: Job, estimate: Estimate, num_rows: int, row_seconds: float = 0.0) -> str:
    """A rough time with its basis; none where the hardware was not measured."""
    if job.engine.kind == "echo":
        return (
            f"about {clock_time(START_S + num_rows * ROW_OVERHEAD_S)}: the echo engine computes "
            f"nothing"
        )
    if uses_gpus(job, described_nodes(job)):
        return (
            f"not estimated: {short(estimate.flops / 1e12)} TFLOP on a GPU, whose rate was not "
            f"measured"
        )
    rate = measure_gemm()
    each = ROW_OVERHEAD_S + row_seconds / (os.cpu_count() or 1)
    seconds = START_S + estimate.flops / (GEMM_SHARE * rate) + num_rows * each
    return (
        f"very roughly {clock_time(seconds)}: {short(estimate.flops / 1e9)} GFLOP at "
        f"{GEMM_SHARE:.0%} of "
        f"{rate / 1e9:,.0f} GFLOP/s (float32 matrix product, measured just now on "
        f"{os.cpu_count()} cores), "
        f"{each * 1e3:.1f} ms for each row, {START_S:.0f} s to start; be ready for three "
        f"times as much"
    )


def measure_gemm(size: int = 768, seconds: float = 0.25) -> float:
    """Operations per second of a float32 matrix product in numpy; the best of the repetitions that
    fit.
    """
    a = np.ones((size, size), np.float32)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return float(2 * size**3 / best)


def excerpt(text: str) -> str:
    """A prompt fit for a terminal: control characters spelled out, and the middle of a long one
    counted, not shown.
    """
    shown = "".join(
        char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text
    )
    if len(shown) <= SHOWN_CHARS:
        return shown
    head, tail = SHOWN_CHARS * 3 // 4, SHOWN_CHARS // 4
    return (
        f"{shown[:head]}\n[... {len(shown) - SHOWN_CHARS:,} more characters ...]\n{shown[-tail:]}"
    )


def spread(plan: Plan) -> list[Unit]:
    wanted = {round(number) for number in np.linspace(0, plan.num_units - 1, SAMPLED_UNITS)}
    return [unit for unit in plan.units() if unit.index in wanted]


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two prompts have in common at the start."""
    for number, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return number
    return min(len(left), len(right))


def error_lines(errors: Sequence[tuple[str, RowError]]) -> Iterator[tuple[str, str]]:
    yield "errors", f"{len(errors):,} of the sampled rows" if errors else "none in the sample"
    for code, count in Counter(error.code for _, error in errors).most_common():
        where, error = next((where, error) for where, error in errors if error.code == code)
        yield f"  {code}", f"{count:,}; first in {where}: {error.message}"


def _label_lines(job: Job, runner: TaskRunner) -> Iterator[tuple[str, str]]:
    if isinstance(runner.work, Choose):
        labels = zip(job.task.labels or [], runner.work.choices, strict=True)
        counted = "counted" if runner.work.count_end else "not counted"
        text = ", ".join(f"{label} ({len(choice)})" for label, choice in labels)
        yield "label tokens", f"{text}; the end of a label is {counted}"
    if (calibration := runner.task.calibration) is not None:
        yield "calibration", f"{job.task.calibration}: {calibration.sentence()}"
