"""Whether a job over an OpenAI batch file makes sense: which keys mean something where each line
asks for itself.

Owns the refusals that are about input_format. Knows nothing of YAML, files or what a line holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from glm_batch.jobs.files.sections import Problem
from glm_batch.models.engine.api.request import SamplingParams
from glm_batch.models.request_limits import RequestLimits
from glm_batch.pipelines.job import Job, MediaSection, PreprocessSection, TaskConfig

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
