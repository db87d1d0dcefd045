"""Reads a committed output once, part by part, and keeps what a report says of it.

Memory is a part and what is kept: counts, histograms, some dozen rows. Knows nothing of HTML.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from glm_batch.pipelines.job import Job
from glm_batch.pipelines.metrics.counts import Counts
from glm_batch.pipelines.output.commit import PARTS, CommitRecord, Output, part_of
from glm_batch.pipelines.planning.plan import Plan, Unit
from glm_batch.pipelines.report.answers import WRONG, Answers, Judged, label_names
from glm_batch.pipelines.report.input_rows import InputRows
from glm_batch.pipelines.report.tallies import IntegerCounts, Lowest, random_scores
from glm_batch.pipelines.report.timeline import Clock, Timeline

SAMPLED, MISTAKES, UNSURE, OF_A_CODE = 12, 8, 6, 3


@dataclass(slots=True)
class Found:
    """What the committed rows of an output come to."""

    answers: Answers
    counts: Counts = field(default_factory=Counts)
    schema: pa.Schema | None = None
    parts: int = 0
    num_bytes: int = 0
    attempts: Counter[int] = field(default_factory=Counter)
    spent: Counter[str] = field(default_factory=Counter)
    prompt_lengths: IntegerCounts = field(default_factory=IntegerCounts)
    sampled: Lowest = field(default_factory=lambda: Lowest(SAMPLED))
    mistakes: Lowest = field(default_factory=lambda: Lowest(MISTAKES))
    unsure: Lowest = field(default_factory=lambda: Lowest(UNSURE))
    failed: dict[str, Lowest] = field(default_factory=dict)

    def add(self, record: CommitRecord, part: pa.Table, golds: list[Any] | None) -> None:
        """Takes one committed unit."""
        self.schema = self.schema or part.schema
        self.counts += record.counts
        self.spent.update(record.spent)
        self.parts += 1
        self.num_bytes += record.num_bytes
        for value in pc.value_counts(part["attempts"]).to_pylist():
            self.attempts[value["values"]] += value["counts"]
        self.prompt_lengths.add(part["prompt_tokens"])
        self._pick(record.unit, part, self.answers.add(part, golds))

    def _pick(self, unit: int, part: pa.Table, judged: Judged) -> None:
        chance = random_scores(unit, part.num_rows)
        is_ok = pc.equal(part["status"], "ok").to_numpy()
        self.sampled.offer(unit, part, np.where(is_ok, chance, np.nan))
        self.unsure.offer(unit, part, np.where(is_ok, judged.margin, np.nan))
        is_wrong = is_ok & (judged.right == WRONG)
        surest = np.where(np.isfinite(judged.confidence), -judged.confidence, chance)
        self.mistakes.offer(unit, part, np.where(is_wrong, surest, np.nan))
        codes = np.array(part["error_code"].to_pylist(), object)
        for code in {code for code in codes.tolist() if code is not None}:
            self.failed.setdefault(code, Lowest(OF_A_CODE)).offer(
                unit, part, np.where(codes == code, chance, np.nan)
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """An output as a report needs it. `left_parts` are files of attempts that do not count."""

    place: str
    job: Job
    plan: Plan
    finished: bool
    facts: dict[str, Any]
    found: Found
    timeline: Timeline
    input_rows: InputRows
    left_parts: int


def collect(output: Output, job: Job) -> Collected:
    """Raises ConfigError when no job has begun there or a committed part is damaged."""
    plan = output.standing_plan()
    finished = output.is_finished(plan)
    facts = output.manifest().facts if finished else {}
    input_rows = InputRows(job, plan)
    found = Found(
        answers=Answers(
            kind=job.task.kind, labels=label_names(job.task.kind, job.task.labels, facts)
        )
    )
    clock = Clock()
    for unit, record, part in parts(output, plan):
        clock.add(record)
        found.add(record, part, input_rows.golds(unit, part))
    return Collected(
        place=output.place,
        job=job,
        plan=plan,
        finished=finished,
        facts=facts,
        found=found,
        timeline=clock.timeline(),
        input_rows=input_rows,
        left_parts=sum(len(page) for page in output.store.pages(PARTS)) - found.parts,
    )


def parts(output: Output, plan: Plan) -> Iterator[tuple[Unit, CommitRecord, pa.Table]]:
    """Every committed unit in the order of the input, with its rows; one part in memory at a time."""
    units = plan.units()
    for record in output.records(plan):
        unit = next(unit for unit in units if unit.index == record.unit)
        yield unit, record, output.read_part(part_of(record))
