"""Outputs made without an engine, and what a page says, read back from its HTML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from glm_batch.glm_actors.faults.spent import IN_ENGINE
from glm_batch.pipelines.job import CommitSection, Job, TaskConfig, job_file
from glm_batch.pipelines.metrics.counts import Counts
from glm_batch.pipelines.output.commit import JOB, Output
from glm_batch.pipelines.output.manifest import write_manifest
from glm_batch.pipelines.planning.plan import make_plan, survey_input
from glm_batch.pipelines.report.committed_rows import committed_rows
from glm_batch.pipelines.report.page import render_job
from glm_batch.pipelines.tasks.kinds import ROW_COLUMNS
from glm_batch.pipelines.tasks.tag_task import TOKEN

FLOATS = pa.list_(pa.float64())
TYPES: dict[str, dict[str, pa.DataType]] = {
    "choose": {"label": pa.string(), "probability": pa.float64(), "label_probs": FLOATS, "off_set_mass": pa.float64()},
    "generate": {
        "text": pa.string(), "reasoning": pa.string(), "finish_reason": pa.string(), "logprobs": pa.list_(pa.float32()),
    },
    "extract": {"json": pa.string()},
    "classify": {"scores": FLOATS, "label": pa.string()},
    "tag": {"tokens": pa.list_(TOKEN)},
    "embed": {"vector": pa.list_(pa.float32(), 3)},
    "loglikelihood": {"logprob": pa.float64(), "num_tokens": pa.int32(), "perplexity": pa.float64()},
}  # fmt: skip
TOKENS = {"prompt_tokens": 40, "cached_tokens": 10, "output_tokens": 0, "media_tokens": 0}
LABELS = ["red", "green", "blue"]
Answer = Mapping[str, Any]


def choose_job(root: Path, **task: Any) -> Job:
    return a_job(
        root, TaskConfig(kind="choose", prompt="Which? {text}", labels=LABELS, gold="gold", **task)
    )


def a_job(root: Path, task: TaskConfig, **rest: Any) -> Job:
    (root / "model").mkdir(exist_ok=True)
    return Job(
        model=str(root / "model"), input=[str(root / "in.parquet")], output=str(root / "out"), key="id", task=task,
        **{"commit": CommitSection(unit_rows=10), **rest},
    )  # fmt: skip


def commit_rows(
    job: Job,
    rows: pa.Table,
    answers: Sequence[Answer],
    *,
    types: Mapping[str, pa.DataType] | None = None,
    units: int | None = None,
    facts: Mapping[str, Any] | None = None,
    seconds: float = 1.0,
    identity: Mapping[str, Any] | None = None,
    spent: Mapping[str, float] | None = None,
) -> Output:
    """Writes the input and commits an answer for each of its rows; `units` bounds how many units
    are committed.
    """
    pq.write_table(rows, job.input[0])
    output = Output.at(job.output, job.storage)
    known = dict(identity or {"task": {"kind": job.task.kind}, "input": {}})
    plan = output.begin(make_plan(job, survey_input(job), known))
    output.store.write(JOB, job_file(job))
    schema = pa.schema(
        ROW_COLUMNS | dict(types or TYPES[job.task.kind]) | dict.fromkeys(TOKENS, pa.int32())
    )
    keys = [str(key) for key in rows["id"].to_pylist()]
    first = 0
    for unit in plan.units():
        last = first + unit.num_rows
        if units is None or unit.index < units:
            some = zip(keys[first:last], answers[first:last], strict=True)
            whole = [{"row_key": key, **row(**answer)} for key, answer in some]
            table = pa.Table.from_pylist(whole, schema)
            output.commit(
                unit.index, table, counts_of(table), spent=dict(spent or {IN_ENGINE: seconds})
            )
        first = last
    if units is None:
        write_manifest(output, plan, schema, dict(facts or {}))
    return output


def row(**answer: Any) -> dict[str, Any]:
    """A good row's columns, or with error_code= a failed one's."""
    if answer.get("error_code"):
        status = {"status": "error", "error_message": answer.get("error_message", "it is broken")}
        return {"attempts": 1, **status, **dict.fromkeys(TOKENS), **answer}
    return {
        "status": "ok",
        "error_code": None,
        "error_message": None,
        "attempts": 1,
        **TOKENS,
        **answer,
    }


def chosen(
    probabilities: Sequence[float], labels: Sequence[str] = LABELS, mass: float = 0.01
) -> dict[str, Any]:
    best = int(np.argmax(probabilities))
    return {
        "label": labels[best], "probability": probabilities[best], "label_probs": list(probabilities),
        "off_set_mass": mass,
    }  # fmt: skip


def counts_of(table: pa.Table) -> Counts:
    codes = Counter(code for code in table["error_code"].to_pylist() if code is not None)
    tokens = {name: sum(value or 0 for value in table[name].to_pylist()) for name in TOKENS}
    return Counts(
        rows=table.num_rows, ok=table.num_rows - codes.total(), errors=dict(codes), **tokens
    )


def html_of(output: Output, job: Job) -> str:
    with committed_rows(output, job) as rows:
        return render_job(rows)


def page_of(output: Output, job: Job) -> Page:
    return Page.read(html_of(output, job))


@dataclass
class Page(HTMLParser):
    """The elements of a page: (tag, attributes), texts, and the cells of each table as they are
    shown.
    """

    html: str = ""
    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    tables: list[list[list[str]]] = field(default_factory=list)
    raw: dict[str, list[str]] = field(default_factory=dict)
    tiles: dict[str, str] = field(default_factory=dict)
    _open: list[str] = field(default_factory=list)
    _term: str = ""

    @classmethod
    def read(cls, html: str) -> Page:
        page = cls(html=html)
        HTMLParser.__init__(page)
        page.feed(html)
        page.close()
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside in ("style", "script"):
            self.raw.setdefault(inside, []).append(data)
            return
        self.texts.append(data)
        if {"td", "th"} & set(self._open) and "svg" not in self._open:
            self.tables[-1][-1][-1] += data.strip() + " "
        if inside == "dt":
            self._term = data
        elif inside == "dd":
            self.tiles.setdefault(self._term, data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    def table_with(self, heading: str) -> list[list[str]]:
        """The rows, without the heading, of the first table that has this heading."""
        for table in self.tables:
            if table and heading in [cell.strip() for cell in table[0]]:
                return [[cell.strip() for cell in cells] for cells in table[1:]]
        raise AssertionError(f"no table has the heading {heading!r}")
