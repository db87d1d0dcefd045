"""The head of an output's page: how far it is, its main numbers, and sentences about what stands
out.

Owns their choice and their words. Knows nothing of HTML.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from glm_batch.pipelines.report.answers import NO_ANSWER, Answers
from glm_batch.pipelines.report.collect import Collected
from glm_batch.pipelines.report.quality import wilson
from glm_batch.pipelines.report.text import compact, duration, percent, short


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A sentence on top of the page; `level` is info or warning."""

    level: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A number with its name and a line of explanation."""

    name: str
    value: str
    note: str = ""
    level: str = ""


def state(collected: Collected) -> dict[str, Any]:
    done, planned = collected.found.counts.rows, collected.plan.num_rows
    return {
        "finished": collected.finished,
        "share": done / planned if planned else 1.0,
        "rows": done,
        "of": planned,
    }


def tiles(collected: Collected) -> Iterator[Tile]:
    counts, answers, line = collected.found.counts, collected.found.answers, collected.timeline
    of = "" if collected.finished else f"of {collected.plan.num_rows:,} so far"
    yield Tile(name="Rows", value=f"{counts.rows:,}", note=of or f"{counts.ok:,} answered")
    failed = counts.error_rate > collected.job.max_error_rate
    yield Tile(
        name="Failed",
        value=f"{counts.error_rows:,}",
        note=f"{percent(counts.error_rate)}, allowed {percent(collected.job.max_error_rate)}",
        level="bad" if failed else "",
    )
    if counts.accuracy is not None:
        low, high = wilson(counts.gold_correct, counts.gold_rows)
        yield Tile(
            name="Accuracy",
            value=percent(counts.accuracy),
            note=f"95 % interval {low * 100:.1f} to {high * 100:.1f}; {counts.gold_rows:,} rows with gold",
        )
    if answers.confidence.rows:
        ece = answers.gold.reliability.ece if answers.gold and answers.gold.reliability else None
        note = (
            f"calibration error {ece * 100:.1f} points"
            if ece is not None
            else "of the answer given"
        )
        yield Tile(name="Mean confidence", value=percent(answers.confidence.mean), note=note)
    if line.rows_per_s:
        yield Tile(
            name="Rows per second",
            value=compact(line.rows_per_s),
            note=f"over {duration(line.active_s)} of work",
        )
    total = counts.prompt_tokens + counts.output_tokens
    yield Tile(
        name="Tokens",
        value=compact(total),
        note=f"{percent(counts.cached_share)} of the prompts cached",
    )


def notes(collected: Collected) -> Iterator[Note]:
    """What stands out, the gravest first."""
    counts, answers, job = collected.found.counts, collected.found.answers, collected.job
    if not collected.finished:
        done = f"{collected.found.parts:,} of {collected.plan.num_units:,} units"
        yield Note(
            level="warning",
            text=f"The job is not finished: {done} are committed, and all numbers are theirs. "
            "The same label command goes on from there.",
        )
    if counts.error_rate > job.max_error_rate:
        yield Note(
            level="warning",
            text=f"{counts.error_rows:,} rows failed ({percent(counts.error_rate)}), and "
            f"max_error_rate allows {percent(job.max_error_rate)}. What failed, and why, stands below; "
            "glm-batch retry processes these rows again.",
        )
    if collected.input_rows.problems:
        first = next(iter(collected.input_rows.problems.values()))
        yield Note(
            level="warning",
            text=f"{len(collected.input_rows.problems):,} input files cannot be read any more, "
            f"so prompts, media and gold answers of their rows are missing here: {first}",
        )
    yield from _quality_notes(answers)
    for start, stop in collected.timeline.stalls[:3]:
        yield Note(
            level="warning",
            text=f"Nothing was committed for {duration(stop - start)} from {clock(start)} on while units were in work.",
        )
    if collected.left_parts > 0 and collected.finished:
        yield Note(
            level="info",
            text=f"{collected.left_parts:,} files of attempts that died, came second or were "
            "retried are left; glm-batch gc removes them.",
        )


def _quality_notes(answers: Answers) -> Iterator[Note]:
    gold = answers.gold
    if (
        gold is not None
        and gold.reliability is not None
        and gold.bins[0].sum() >= 100
        and gold.reliability.ece > 0.05
    ):
        rows, sure, right = gold.bins.sum(axis=1)
        how = "surer than it is right" if sure > right else "less sure than it could be"
        yield Note(
            level="warning",
            text=f"The model is {how}: mean confidence {percent(sure / rows)}, accuracy "
            f"{percent(right / rows)} (calibration error {gold.reliability.ece * 100:.1f} points).",
        )
    if answers.off_set_mass.mean > 0.1:
        yield Note(
            level="warning",
            text=f"On average {percent(answers.off_set_mass.mean)} of the probability goes to "
            "answers outside of the labels: the prompt may not tell which ones there are.",
        )
    if gold is not None:
        wrong = [
            (pair, rows)
            for pair, rows in gold.pairs.items()
            if pair[0] != pair[1] and pair[1] != NO_ANSWER
        ]
        if wrong:
            (truth, given), rows = max(wrong, key=lambda item: (item[1], item[0]))
            if rows >= 3:
                yield Note(
                    level="info",
                    text=f"The most frequent mistake: {short(truth, 40)} taken for {short(given, 40)}, {rows:,} rows.",
                )
    never = (
        [label for label in answers.labels if label not in answers.values.counts]
        if answers.kind == "choose"
        else []
    )
    if never and answers.values.total:
        yield Note(
            level="info",
            text=f"Never given: {', '.join(short(label, 30) for label in never[:8])}"
            f"{' ...' if len(never) > 8 else ''}.",
        )
    cut = answers.finished.counts.get("length", 0)
    if cut:
        yield Note(
            level="warning",
            text=f"{cut:,} texts ({percent(cut / answers.finished.total)}) were cut off at sampling.max_tokens.",
        )


def clock(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(moment))
