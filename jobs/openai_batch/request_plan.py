"""`glm-batch plan` of an OpenAI batch file: what a sample of its lines asks for, and estimates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

from glm_batch.jobs.plans import job_plan
from glm_batch.models.engine.api.request import Request
from glm_batch.models.errors import RowError
from glm_batch.pipelines.input.values import LINE, NUMBER, parse_line, row_key
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.planning.plan import Plan, job_source
from glm_batch.pipelines.runs.prepared import Checked
from glm_batch.pipelines.tasks.task_runner import ReadRow

LINES_PER_UNIT = 64
MEDIA_LINES_PER_UNIT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSample:
    """Sampled lines: what the good ones ask of the engine, with the place and url of each, and
    errors with theirs.
    """

    requests: list[tuple[str, str, list[Request]]]
    errors: list[tuple[str, RowError]]
    units: int

    @property
    def rows(self) -> int:
        return len(self.requests) + len(self.errors)

    @property
    def all_requests(self) -> list[Request]:
        return [request for _, _, requests in self.requests for request in requests]


def plan_lines(
    job: Job, checked: Checked, plan: Plan
) -> tuple[list[tuple[str, str]], Iterator[tuple[str, str]]]:
    """Some prompts with their places, and name and text of each line below them."""
    sample = take_requests(job, checked, plan)
    decode = checked.runner.prompter.tokenizer.decode
    asked = [(f"{where}, {url}", each) for where, url, some in sample.requests for each in some]
    prompts = [
        (where, decode(list(request.input_ids), skip_special_tokens=False))
        for where, request in job_plan.evenly(asked)
    ]
    return prompts, _report_lines(job, checked, plan, sample)


def take_requests(job: Job, checked: Checked, plan: Plan) -> RequestSample:
    """The first lines of a few units that are spread evenly over the input."""
    good: list[tuple[str, str, list[Request]]] = []
    errors: list[tuple[str, RowError]] = []
    units = job_plan.spread(plan)
    with closing(checked.runner) as runner:
        most = LINES_PER_UNIT if checked.config.vision is None else MEDIA_LINES_PER_UNIT
        for unit in units:
            file = plan.files[unit.file].file
            lines = job_source(job).read(file, unit.rows).slice(0, most)
            pairs = zip(lines[LINE].to_pylist(), lines[NUMBER].to_pylist(), strict=True)
            rows = [
                ReadRow(name=row_key(file, row), row=parse_line(line), size=len(line), line=number)
                for row, (line, number) in enumerate(pairs, unit.rows.start)
            ]
            for read, asked in zip(rows, runner.ask(rows), strict=True):
                where = f"{file.name}, line {read.line}"
                if asked.error is None:
                    good.append((where, asked.note["url"], asked.requests))
                else:
                    errors.append((where, asked.error))
    return RequestSample(requests=good, errors=errors, units=len(units))


def _report_lines(
    job: Job, checked: Checked, plan: Plan, sample: RequestSample
) -> Iterator[tuple[str, str]]:
    sampled = f"{sample.rows:,} lines from {sample.units}"
    yield from job_plan.plan_lines(job, checked, plan, sampled)
    named = " or ".join(checked.runner.models)
    yield (
        "input format",
        f"OpenAI batch: each line is a request of its own, to a model named {named}",
    )
    yield "answers", f"{job.output}/output.jsonl and errors.jsonl, once all is done"
    urls = Counter(url for _, url, _ in sample.requests)
    if urls:
        yield "requests", ", ".join(f"{url} {count:,}" for url, count in urls.most_common())
    yield from job_plan.error_lines(sample.errors)
    requests = sample.all_requests
    if not requests:
        yield job_plan.NO_ESTIMATE
        return
    ids = [list(request.input_ids) for request in requests]
    lengths, works = [len(each) for each in ids], [request.work for request in requests]
    share = job_plan.shared_prefix_share(ids)
    yield job_plan.lengths_line(lengths)
    yield job_plan.shared_line(share)
    num_requests = round(plan.num_rows * len(requests) / sample.rows)
    estimate = job_plan.estimate_job(checked.config, works, lengths, share, num_requests)
    yield job_plan.estimate_line(estimate, works, "output")
    yield "time", job_plan.time_text(job, estimate, num_requests)
