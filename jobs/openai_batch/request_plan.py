"""An OpenAI batch file before it runs: whether its job makes sense, and what `plan` says of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, fields

from glm_batch.jobs.files.sections import Problem
from glm_batch.jobs.plans import job_plan
from glm_batch.models.engine.api.request import Request, SamplingParams
from glm_batch.models.errors import RowError
from glm_batch.models.request_limits import RequestLimits
from glm_batch.pipelines.input.values import LINE, NUMBER, parse_line, row_key
from glm_batch.pipelines.job import Job, MediaSection, PreprocessSection, TaskConfig
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


# Limits of a server that a file never meets.
OF_SERVERS = ("max_queue", "request_s", "body_s", "drain_s")


def check_requests(job: Job) -> Iterator[Problem]:
    """Keys of a job with input_format openai_batch that mean nothing there."""
    if job.task != TaskConfig(kind="requests"):
        message = "with input_format: openai_batch each line says what is asked; remove it"
        yield Problem(key="task", message=message)
    if job.key is not None:
        yield Problem(
            key="key", message="the key of an OpenAI batch file is its custom_id; remove it"
        )
    if job.carry:
        yield Problem(
            key="carry",
            message="an OpenAI batch file has no columns; join by custom_id, and remove it",
        )
    yield from _useless(
        job.sampling,
        SamplingParams(),
        "sampling",
        "each request says how it is answered",
        ("seed",),
    )
    inside = "images and videos come inside the requests, within requests.limits"
    yield from _useless(job.media, MediaSection(), "media", inside)
    yield from _useless(job.preprocess, PreprocessSection(), "preprocess", inside, ("workers",))
    if job.engine.kind == "vllm":
        message = (
            "the requests of a file may ask for different things, which torch alone can; use "
            "torch or auto"
        )
        yield Problem(key="engine.kind", message=message)
    yield from _check_limits(job.requests.limits)


def _check_limits(limits: RequestLimits) -> Iterator[Problem]:
    for field in fields(RequestLimits):
        value, key = getattr(limits, field.name), f"requests.limits.{field.name}"
        if isinstance(value, int | float) and value is not False and not 0 < value < float("inf"):
            yield Problem(key=key, message=f"it is {value}, but it must be above 0")
        if field.name in OF_SERVERS and value != getattr(RequestLimits(), field.name):
            yield Problem(key=key, message="it is a server's alone, so it has no effect; remove it")


def _useless(
    section: object, default: object, key: str, reason: str, kept: tuple[str, ...] = ()
) -> Iterator[Problem]:
    for field in fields(default):  # type: ignore[arg-type]
        if field.name not in kept and getattr(section, field.name) != getattr(default, field.name):
            yield Problem(
                key=f"{key}.{field.name}", message=f"{reason}, so it has no effect; remove it"
            )
