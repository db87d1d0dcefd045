"""What people see: it fits 80 columns, says every number, and is plain where there is no terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from glm_batch.glm_actors.faults.spent import ENGINE_BUSY, ENGINE_IDLE, MEDIA
from glm_batch.jobs.display.display import (
    LogLines,
    clock_time,
    live_view,
    next_step,
    progress_display,
    short,
    summary_table,
)
from glm_batch.pipelines.metrics.counts import Counts, Progress, Summary

COUNTS = Counts(
    rows=1_234_567,
    ok=1_230_000,
    errors={"null_prompt": 4_000, "prompt_too_long": 567},
    prompt_tokens=400_000_000,
    cached_tokens=300_000_000,
    output_tokens=50_000_000,
    gold_rows=1_234_000,
    gold_correct=1_200_000,
)
RUNNING = Progress(
    phase="running",
    units_total=3000,
    units_done=1300,
    rows_total=3_000_000,
    counts=COUNTS,
    working_s=100.0,
    spent={ENGINE_BUSY: 61.0, ENGINE_IDLE: 39.0, MEDIA: 9.0, "reading": 1.0},
)


def drawn(renderable: object, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_the_live_display_is_two_lines_of_80_columns() -> None:
    lines = drawn(live_view("a-long-job-name", RUNNING))
    assert len(lines) == 2
    assert "1,234,567/3,000,000 rows 41%" in lines[0]
    assert "ETA 2:23" in lines[0]
    rates = "12.3k rows/s  in 4.0M  out 500.0k tok/s  errors 4,567  cached 75%  engine 61%"
    assert lines[1].strip() == rates


def test_the_clock_runs_on_between_two_reports() -> None:
    assert "ETA 2:13" in drawn(live_view("job", RUNNING, since_s=10.0))[0]
    starting = Progress(phase="starting", elapsed_s=3.0, rows_total=9, resumed=Counts(rows=5))
    first, second = drawn(live_view("job", starting, since_s=4.0))
    assert "loading the model 0:07" in first
    assert second.strip() == "5 rows are there already"


def test_the_summary_says_every_number_within_80_columns() -> None:
    summary = Summary(
        output="out/x",
        counts=COUNTS,
        resumed_rows=34_567,
        elapsed_s=130.0,
        working_s=100.0,
        spent=RUNNING.spent,
        notes=("hm",),
    )
    lines = drawn(summary_table(summary, name="job", max_error_rate=0.01))
    assert all(len(line) <= 80 for line in lines)
    text = " ".join(" ".join(lines).split())
    for part in (
        "engine busy 61% of its time", "other workers reading 10%, media 90%", "bottleneck media: raise",
        "rows 1,234,567 (34,567 of them from an earlier run)", "ok 1,230,000", "error 4,567", "null_prompt 4,000",
        "prompt_too_long 567", "accuracy 0.972 (1,200,000 of 1,234,000 rows with gold)",
        "prompt 400,000,000 (75% cached), output 50,000,000", "12,000 rows/s", "out/x", "note hm",
    ):  # fmt: skip
        assert part in text, part


def test_the_next_step_depends_on_the_error_rate() -> None:
    assert "`glm-batch retry out`" in next_step(COUNTS, "out", 0.001)
    assert "0.37% of the rows failed, max_error_rate allows 0.10%" in next_step(
        COUNTS, "out", 0.001
    )
    assert next_step(COUNTS, "out", 0.004) == "read the parts that out/manifest.json lists"


def test_without_a_terminal_there_are_plain_lines_now_and_then() -> None:
    console = Console(file=io.StringIO(), width=80)
    with progress_display("job", console) as show:
        show(Progress(phase="planning"))
        show(RUNNING)
        show(RUNNING)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert [line.split(" ", 1)[1].split(",")[0] for line in lines] == [
        "job: listing the input",
        "job: 1",
    ]
    assert lines[1].endswith("errors 4,567, cached 75%, engine 61%, ETA 2:23")
    assert "\x1b" not in console.file.getvalue()


def test_log_lines_repeat_after_the_interval() -> None:
    console = Console(file=io.StringIO(), width=80)
    log = LogLines("job", console, every_s=0.0)
    log(RUNNING)
    log(RUNNING)
    assert isinstance(console.file, io.StringIO)
    assert len(console.file.getvalue().splitlines()) == 2


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-:--"), (0.4, "0:00"), (59.6, "1:00"), (3723, "1:02:03")]
)
def test_clock_time(seconds: float | None, text: str) -> None:
    assert clock_time(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (9876.4, "9,876"), (98_765, "98.8k"), (1_234_567, "1.2M")]
)
def test_short(number: float, text: str) -> None:
    assert short(number) == text
