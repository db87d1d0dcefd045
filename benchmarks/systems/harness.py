"""The course every system runs: load, cold pass, timed passes, one JSON line on standard output.

Owns the clock and the form of the report. Knows no system. Standard library only: it runs in the
peers' interpreters.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from benchmarks.workload import Row, RowSet, read_rows

# How the time of the first result is found: the first row of the cold pass is asked alone, or
# answers stream.
FirstResult = Literal["ask_alone", "streamed", "unknown"]
# rows of the cold pass whose answers are reported, so that systems can be checked against each
# other
SAMPLE_ROWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the parent asks of a system. `row_files`: the cold pass first, then one file for each
    timed pass.
    """

    work: str
    model_dir: str
    row_files: list[str]
    options: dict[str, Any]  # the peer's own arguments, as JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A row's result: log-probabilities of the labels (choose) or output ids (generate)."""

    id: str
    logprobs: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    cached_tokens: int = 0


class System(Protocol):
    """A loaded system."""

    first_result: FirstResult

    def run(self, rows: RowSet) -> Iterable[Answer]: ...

    def settings(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


def run_system(load: Callable[[Plan, RowSet], System]) -> None:
    """Entry point of a runner: `--plan FILE --started UNIX_TIME`. Whatever libraries print goes to
    standard error.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument(
        "--started", type=float, required=True, help="when the parent started this process"
    )
    arguments = parser.parse_args()
    report_fd = os.dup(1)
    os.dup2(2, 1)
    plan = Plan(**json.loads(arguments.plan.read_text()))
    report = measure(load, plan, arguments.started)
    with os.fdopen(report_fd, "w") as report_file:
        report_file.write(json.dumps(report) + "\n")
    sys.stdout.flush()


def measure(load: Callable[[Plan, RowSet], System], plan: Plan, started: float) -> dict[str, Any]:
    """Loads a system and puts it through its passes; times are in seconds, the first three since
    `started`.
    """
    cold_rows, *timed_rows = [read_rows(Path(path)) for path in plan.row_files]
    system = load(plan, cold_rows)
    ready_s = time.time() - started
    answers, first_result_s = _cold_pass(system, cold_rows, started)
    end_to_end_s = time.time() - started
    passes = []
    for rows in timed_rows:
        begin = time.perf_counter()
        timed_answers = list(system.run(rows))
        passes.append(time.perf_counter() - begin)
        _check(rows, timed_answers)
    report = {
        "settings": system.settings(),
        "ready_s": ready_s,
        "first_result_s": first_result_s,
        "end_to_end_s": end_to_end_s,
        "steady_s": passes,
        "cached_tokens": sum(
            answer.cached_tokens for answer in (timed_answers if timed_rows else answers)
        ),
        "sample": [asdict(answer) for answer in answers[:SAMPLE_ROWS]],
    }
    system.close()
    return report


def _cold_pass(system: System, rows: RowSet, started: float) -> tuple[list[Answer], float | None]:
    """All rows once, untouched caches: the answers in the rows' order and the time of the first
    one.
    """
    answers: list[Answer] = []
    first_result_s = None
    for part in (
        (rows.rows[:1], rows.rows[1:]) if system.first_result == "ask_alone" else (rows.rows,)
    ):
        for answer in system.run(_with_rows(rows, part)):
            if first_result_s is None and system.first_result != "unknown":
                first_result_s = time.time() - started
            answers.append(answer)
    _check(rows, answers)
    position = {row.id: i for i, row in enumerate(rows.rows)}
    answers.sort(key=lambda answer: position[answer.id])
    return answers, first_result_s


def _with_rows(rows: RowSet, part: list[Row]) -> RowSet:
    return RowSet(
        work=rows.work,
        instruction=rows.instruction,
        labels=rows.labels,
        label_ids=rows.label_ids,
        rows=part,
    )


def _check(rows: RowSet, answers: list[Answer]) -> None:
    """Every row answered once and in full: a system must not be fast by leaving something out."""
    from benchmarks.workload import OUTPUT_TOKENS

    if sorted(answer.id for answer in answers) != sorted(row.id for row in rows.rows):
        raise RuntimeError(
            f"{len(rows.rows)} rows were asked, the {len(answers)} answers are not one for "
            f"each of them"
        )
    for answer in answers:
        complete = (
            len(answer.logprobs) == len(rows.label_ids)
            if rows.work != "generate"
            else len(answer.token_ids) == OUTPUT_TOKENS
        )
        if not complete:
            raise RuntimeError(f"{answer.id}: incomplete answer {answer}")
