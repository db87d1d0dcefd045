"""What a run looks like: a live display on a terminal, plain lines elsewhere, and the closing
summary.

Owns wording and layout, for 80 columns and more. Knows nothing of how the numbers come about.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from glm_batch.pipelines.metrics.counts import Counts, Phase, Progress, Summary, bottleneck
from glm_batch.pipelines.output.state import Status

LOG_EVERY_S = 5.0
BAR_WIDTH = 24
SHOWN_SHARE = 0.01
PHASES: dict[Phase, str] = {
    "planning": "listing the input",
    "starting": "starting the workers and loading the model",
    "running": "running",
    "done": "done",
}

ShowProgress = Callable[[Progress], None]


@contextmanager
def progress_display(name: str, console: Console) -> Iterator[ShowProgress]:
    """Gives a function to call with each Progress; what it draws ends with the context."""
    if console.is_terminal:
        view = LiveView(name)
        with Live(view, console=console, refresh_per_second=4, transient=True):
            yield view
    else:
        yield LogLines(name, console)


class LiveView:
    """The latest Progress, drawn anew whenever rich asks, so that the clock runs on between two of
    them.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._progress = Progress(phase="planning")
        self._received_at = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        self._progress, self._received_at = progress, time.monotonic()

    def __rich__(self) -> Group:
        return live_view(self._name, self._progress, since_s=time.monotonic() - self._received_at)


class LogLines:
    """Prints a line when the phase changes and every few seconds while rows come in."""

    def __init__(self, name: str, console: Console, *, every_s: float = LOG_EVERY_S) -> None:
        self._name = name
        self._console = console
        self._every_s = every_s
        self._phase: Phase | None = None
        self._printed_at = 0.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.phase == self._phase and now - self._printed_at < self._every_s:
            return
        self._phase, self._printed_at = progress.phase, now
        clock = time.strftime("%H:%M:%S")
        self._console.print(
            f"{clock} {self._name}: {log_text(progress)}", soft_wrap=True, highlight=False
        )


def log_text(progress: Progress) -> str:
    """One line with everything that the live display shows."""
    if progress.phase in ("planning", "starting"):
        return f"{PHASES[progress.phase]}{_resumed_note(progress)}"
    return ", ".join([_rows_done(progress), *_rates(progress), f"ETA {clock_time(progress.eta_s)}"])


def live_view(name: str, progress: Progress, *, since_s: float = 0.0) -> Group:
    """Bar and rows on the first line, rates on the second; `since_s` is the age of `progress`. Fits
    80 columns.
    """
    waiting = progress.phase in ("planning", "starting")
    bar = ProgressBar(
        total=max(progress.rows_total, 1),
        completed=progress.counts.rows,
        width=BAR_WIDTH,
        pulse=waiting,
        animation_time=time.monotonic(),
    )
    head = Table.grid(padding=(0, 1))
    if waiting:
        state = f"{PHASES[progress.phase]} {clock_time(progress.elapsed_s + since_s)}"
        below = _resumed_note(progress).strip(" ,")
    else:
        eta = None if progress.eta_s is None else max(progress.eta_s - since_s, 0.0)
        state = f"{_rows_done(progress)}  ETA {clock_time(eta)}"
        below = "  ".join(_rates(progress))
    head.add_row(Text(name, style="bold"), bar, Text(state))
    return Group(head, Text(below, style="cyan"))


def summary_table(summary: Summary, *, name: str, max_error_rate: float) -> Table:
    """The closing table: rows by status and error code, accuracy, tokens, time, rate, output, what
    to do next.
    """
    resumed = (
        f" ({summary.resumed_rows:,} of them from an earlier run)" if summary.resumed_rows else ""
    )
    table = _two_columns(name)
    table.add_row("rows", f"{summary.counts.rows:,}{resumed}")
    for line in count_lines(summary.counts):
        table.add_row(*line)
    table.add_row(
        "time",
        f"{summary.elapsed_s:,.1f} s, of which the engine had rows for {summary.working_s:,.1f} s",
    )
    if summary.working_s > 0:
        done = summary.counts.rows - summary.resumed_rows
        table.add_row("rate", f"{done / summary.working_s:,.0f} rows/s")
    for line in stage_lines(summary.spent):
        table.add_row(*line)
    table.add_row("output", Text(summary.output))
    for note in summary.notes:
        table.add_row("note", Text(note))
    table.add_row("next", Text(next_step(summary.counts, summary.output, max_error_rate)))
    return table


def status_table(status: Status, output: str) -> Table:
    """How far an output is, and what its rows add up to so far."""
    table = _two_columns(output)
    table.add_row(
        "state",
        "finished" if status.finished else "not finished; the same `label` command goes on with it",
    )
    table.add_row("units", f"{status.units_done:,} of {status.num_units:,}")
    table.add_row("rows", f"{status.counts.rows:,} of {status.num_rows:,}")
    for line in count_lines(status.counts):
        table.add_row(*line)
    for line in stage_lines(status.spent):
        table.add_row(*line)
    return table


def stage_lines(spent: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Where the time goes, and what to change; nothing where that is not known."""
    found = bottleneck(spent)
    if found is None:
        return
    yield "engine", f"busy {found.engine_share:.0%} of its time, else waiting for rows"
    shares = ", ".join(
        f"{stage} {share:.0%}" for stage, share in found.shares.items() if share >= SHOWN_SHARE
    )
    if shares:
        yield "other workers", shares
    yield "bottleneck", f"{found.stage}: {found.remedy}"


def count_lines(counts: Counts) -> Iterator[tuple[str, str]]:
    """Rows by status and error code, accuracy against gold, tokens."""
    yield "  ok", f"{counts.ok:,}"
    if counts.filtered:
        yield "  filtered", f"{counts.filtered:,}"
    yield "  error", f"{counts.error_rows:,}"
    for code, rows in sorted(counts.errors.items(), key=lambda item: (-item[1], item[0])):
        yield f"    {code}", f"{rows:,}"
    if counts.accuracy is not None:
        yield (
            "accuracy",
            (
                f"{counts.accuracy:.3f} ({counts.gold_correct:,} of {counts.gold_rows:,} rows "
                f"with gold)"
            ),
        )
    yield "tokens", _tokens(counts)


def next_step(counts: Counts, output: str, max_error_rate: float) -> str:
    """One sentence: where to read on, or what to do about failed rows."""
    if counts.error_rate > max_error_rate:
        return (
            f"{counts.error_rate:.2%} of the rows failed, max_error_rate allows "
            f"{max_error_rate:.2%}: look at "
            f"error_message where status is error; `glm-batch retry {output}` processes "
            f"these rows again"
        )
    return f"read the parts that {output}/manifest.json lists"


def clock_time(seconds: float | None) -> str:
    """Seconds as 1:02:03 or 2:03; "-:--" when unknown."""
    if seconds is None:
        return "-:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def short(number: float) -> str:
    """A rate in at most five characters: 9,876, 98.8k, 1.2M."""
    if number < 10_000:
        return f"{number:,.0f}"
    return f"{number / 1e3:,.1f}k" if number < 1e6 else f"{number / 1e6:,.1f}M"


def _two_columns(title: str) -> Table:
    table = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        show_header=False,
        box=None,
        padding=(0, 2, 0, 0),
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _rows_done(progress: Progress) -> str:
    done, total = progress.counts.rows, progress.rows_total
    share = f" {done / total:.0%}" if total else ""
    return f"{done:,}/{total:,} rows{share}"


def _rates(progress: Progress) -> list[str]:
    counts, resumed = progress.counts, progress.resumed
    seconds = progress.working_s or float("inf")
    return [
        f"{short(progress.rows_per_s)} rows/s",
        f"in {short((counts.prompt_tokens - resumed.prompt_tokens) / seconds)}",
        f"out {short((counts.output_tokens - resumed.output_tokens) / seconds)} tok/s",
        f"errors {counts.error_rows:,}",
        f"cached {counts.cached_share:.0%}",
        *([f"engine {found.engine_share:.0%}"] if (found := bottleneck(progress.spent)) else []),
    ]


def _resumed_note(progress: Progress) -> str:
    return f", {progress.resumed.rows:,} rows are there already" if progress.resumed.rows else ""


def _tokens(counts: Counts) -> str:
    media = f", media {counts.media_tokens:,}" if counts.media_tokens else ""
    return (
        f"prompt {counts.prompt_tokens:,} ({counts.cached_share:.0%} cached), output "
        f"{counts.output_tokens:,}{media}"
    )
