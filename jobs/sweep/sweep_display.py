"""How a sweep looks on a terminal: its grid before it runs, results and comparisons afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from rich.table import Table
from rich.text import Text

from glm_batch.jobs.display.display import clock_time, short
from glm_batch.pipelines.evaluation.intervals import Difference, Estimate
from glm_batch.pipelines.sweep.cells import AXES, Cell, Sweep
from glm_batch.pipelines.sweep.results import CellResult, Comparison, Results
from glm_batch.pipelines.sweep.sweep_run import Ran

# What a table shows beside the accuracy, of what its cells have, the first few; everything stands
# in the files.
SHOWN = {
    "pass@1": "pass@1",
    "majority": "majority",
    "field_accuracy": "fields",
    "normalised": "normalised",
    "macro_f1": "macro F1",
    "ece": "ECE",
    "sample_f1": "sample F1",
}
MOST_SHOWN = 1
SURE = 0.05


def results_tables(results: Results) -> Iterator[Table]:
    """A table for each task and data set: cells with accuracy and difference from the baseline."""
    against = {each.cell: each for each in results.comparisons}
    baselines = {each.baseline for each in results.comparisons}
    for question in dict.fromkeys(each.cell.question for each in results.cells):
        some = [each for each in results.cells if each.cell.question == question]
        yield _results_table(some, against, baselines)


def sweep_summary(sweep: Sweep, ran: Ran, results: Results) -> Table:
    """The closing lines: rows, tokens, time, where the files lie."""
    summary, counts = ran.summary, ran.summary.counts
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    resumed = (
        f" ({summary.resumed_rows:,} of them from an earlier run)" if summary.resumed_rows else ""
    )
    table.add_row(
        "rows",
        f"{counts.rows:,} in {len(results.cells):,} cells{resumed}; {counts.error_rows:,} failed",
    )
    table.add_row(
        "tokens",
        f"prompt {counts.prompt_tokens:,} ({counts.cached_share:.0%} cached), "
        f"output {counts.output_tokens:,}",
    )
    rate = (
        f", {(counts.rows - summary.resumed_rows) / summary.working_s:,.0f} rows/s"
        if summary.working_s
        else ""
    )
    table.add_row(
        "time",
        (
            f"{summary.elapsed_s:,.1f} s, of which the engines had rows for "
            f"{summary.working_s:,.1f} s{rate}"
        ),
    )
    unscored = sum(each.score.without_gold for each in results.cells)
    table.add_row(
        "scored",
        f"a row that failed is wrong; {unscored:,} rows have no gold answer and count nowhere",
    )
    table.add_row(
        "intervals",
        f"{sweep.confidence:.0%}, BCa bootstrap; p by McNemar, adjusted by Holm; * below {SURE}",
    )
    table.add_row(
        "results",
        Text(f"{sweep.output}/results.parquet and results.json; each row's score in scores/"),
    )
    return table


def grid_table(
    cells: Sequence[Cell], lines: Sequence[tuple[str, ...]], header: Sequence[str]
) -> Table:
    """The grid before it runs: a line for each cell with the coordinates that vary."""
    axes = _varying(cells)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(", ".join(axes) or "cell", overflow="fold")
    for name in header:
        table.add_column(name, justify="right", no_wrap=True)
    for cell, line in zip(cells, lines, strict=True):
        table.add_row(Text(", ".join(cell.coordinates[axis] for axis in axes) or cell.name), *line)
    return table


def comparison_text(one: str, other: str, difference: Difference) -> str:
    """Two cells in a sentence."""
    counts = ""
    if difference.only_first is not None:
        counts = (
            f"; {difference.only_first:,} rows right in the first alone, "
            f"{difference.only_second:,} in the second"
        )
    return (
        f"{one} - {other}: accuracy {difference.value:+.4f} "
        f"[{difference.low:+.4f}, {difference.high:+.4f}], "
        f"p = {difference.p_value:.4g} on {difference.rows:,} rows{counts}"
    )


def _results_table(
    some: Sequence[CellResult], against: dict[str, Comparison], baselines: set[str]
) -> Table:
    """Eighty columns wide where the names of the grid let it."""
    first = some[0].cell
    axes = [
        axis for axis in _varying([each.cell for each in some]) if axis not in ("task", "dataset")
    ]
    metrics = [name for name in SHOWN if any(name in each.score.metrics for each in some)][
        :MOST_SHOWN
    ]
    rows, failed = (
        first_and_last(each.score.rows for each in some),
        [sum(each.score.errors.values()) for each in some],
    )
    title = Text(
        f"{first.coordinates['task']} on {first.dataset}, {rows} rows with gold", style="bold"
    )
    table = Table(
        title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="dim"
    )
    table.add_column(", ".join(axes) or "cell", no_wrap=True)
    headers = [
        *(("failed",) if any(failed) else ()),
        "accuracy",
        *(SHOWN[name] for name in metrics),
        "tok/row",
        "vs. base",
    ]
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for each, errors in zip(some, failed, strict=True):
        name = ", ".join(each.cell.coordinates[axis] for axis in axes) or each.cell.name
        numbers = [f"{errors:,}"] if any(failed) else []
        numbers += [
            _sure(each),
            *(_number(each.score.metrics.get(metric)) for metric in metrics),
            _tokens(each),
        ]
        told = "(base)" if each.cell.name in baselines else _difference(against.get(each.cell.name))
        table.add_row(Text(name), *numbers, told)
    return table


def _varying(cells: Sequence[Cell]) -> list[str]:
    found = [axis for axis in AXES if len({cell.coordinates[axis] for cell in cells}) > 1]
    return found if len(cells) > 1 else []


def _sure(each: CellResult) -> str:
    found = each.score.metrics["accuracy"]
    return (
        "-" if math.isnan(found.value) else f"{found.value:.3f} [{found.low:.2f} {found.high:.2f}]"
    )


def _number(found: Estimate | None) -> str:
    return "-" if found is None or math.isnan(found.value) else f"{found.value:.3f}"


def _difference(found: Comparison | None) -> str:
    if found is None or math.isnan(found.difference.value):
        return "-"
    p = found.adjusted
    return (
        f"{found.difference.value:+.3f}, p {p:.0e}*"
        if p < SURE
        else f"{found.difference.value:+.3f}, p {p:.2f}"
    )


def _tokens(each: CellResult) -> str:
    return short(each.tokens_per_row)


def first_and_last(numbers: Iterable[int]) -> str:
    """A number where all are the same, else the range of them."""
    ordered = sorted(numbers)
    return f"{ordered[0]:,}" if ordered[0] == ordered[-1] else f"{ordered[0]:,} to {ordered[-1]:,}"


def plan_header() -> tuple[str, ...]:
    return "rows", "units", "tokens", "errors seen", "time"


def plan_line(
    rows: int, units: int, tokens: float | None, errors: int, seconds: float | None
) -> tuple[str, ...]:
    """One cell's numbers in a plan."""
    return (
        f"{rows:,}",
        f"{units:,}",
        "-" if tokens is None else short(tokens),
        f"{errors:,}",
        clock_time(seconds),
    )
