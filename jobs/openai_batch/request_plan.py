"""`glm-batch plan` of an OpenAI batch file: what a sample of its lines asks for.

Owns the sample's requests and their lines of the report; the estimate and its basis are
jobs.plans.job_plan's. Starts no Ray.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glm_batch.models.engine.api.request import Request
from glm_batch.models.errors import RowError
from glm_batch.pipelines.input.source import Source
from glm_batch.pipelines.input.values import LINE, NUMBER, parse_line, row_key
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.planning.plan import Plan, Unit

if TYPE_CHECKING:
    from glm_batch.glm_actors.serving.openai.api_errors import ApiError
    from glm_batch.pipelines.openai_batch.requests import RequestRunner

LINES_PER_UNIT = 64
MEDIA_LINES_PER_UNIT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSample:
    """Sampled lines: what the good ones ask of the engine, with the place and url of each, and
    errors with theirs.
    """

    requests: list[tuple[str, str, list[Request]]]
    errors: list[tuple[str, RowError | ApiError]]
    units: int

    @property
    def rows(self) -> int:
        return len(self.requests) + len(self.errors)

    @property
    def all_requests(self) -> list[Request]:
        return [request for _, _, requests in self.requests for request in requests]


def take_requests(
    runner: RequestRunner, source: Source, plan: Plan, units: Sequence[Unit]
) -> RequestSample:
    """The first lines of these units."""
    good: list[tuple[str, str, list[Request]]] = []
    errors: list[tuple[str, RowError | ApiError]] = []
    with closing(runner):
        most = LINES_PER_UNIT if runner.prompter.config.vision is None else MEDIA_LINES_PER_UNIT
        for unit in units:
            file = plan.files[unit.file].file
            lines = source.read(file, unit.rows).slice(0, most)
            pairs = zip(lines[LINE].to_pylist(), lines[NUMBER].to_pylist(), strict=True)
            for row, (line, number) in enumerate(pairs, unit.rows.start):
                where = f"{file.name}, line {number}"
                asked = runner.ask(parse_line(line), len(line), row_key(file, row))
                if asked.error is None:
                    good.append((where, asked.url or "", asked.requests))
                else:
                    errors.append((where, asked.error))
    return RequestSample(requests=good, errors=errors, units=len(units))


def request_lines(
    job: Job, sample: RequestSample, models: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Name and text of the plan's lines about what is asked for."""
    yield (
        "input format",
        f"OpenAI batch: each line is a request of its own, to a model named {' or '.join(models)}",
    )
    yield "answers", f"{job.output}/output.jsonl and errors.jsonl, once all is done"
    urls = Counter(url for _, url, _ in sample.requests)
    if urls:
        yield "requests", ", ".join(f"{url} {count:,}" for url, count in urls.most_common())
