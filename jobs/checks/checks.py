"""Whether a job makes sense: its keys together, its checkpoint, its input.

Owns every refusal that comes before Ray starts, as problems that name a key and the remedy. Knows
nothing of YAML, and loads no weights.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from glm_batch.jobs.checks.engine_checks import checkpoint_problems, engine_problems
from glm_batch.jobs.files.sections import Place, Problem, job_keys
from glm_batch.models import rooms
from glm_batch.models.checkpoint.config_reader import load_config
from glm_batch.models.checkpoint.headers import check_weights
from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.engine.api.request import SamplingParams
from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.input.listing import InputFile
from glm_batch.pipelines.input.source import Survey
from glm_batch.pipelines.job import Job, MediaSection, RequestsSection, TaskConfig
from glm_batch.pipelines.planning.plan import job_source, survey_input
from glm_batch.pipelines.runs.prepared import Checked
from glm_batch.pipelines.tasks.kinds import TASKS
from glm_batch.pipelines.tasks.prompts import PromptTemplate, column_keys, media_columns
from glm_batch.pipelines.tasks.task import unsupported_keys
from glm_batch.pipelines.tasks.task_runner import build_runner

# Keys that mean something for images and videos only.
OF_MEDIA = (
    "preprocess.min_pixels", "preprocess.max_pixels", "preprocess.fps",
    *(f"media.{field.name}" for field in fields(MediaSection)),
)  # fmt: skip


def check_job(job: Job, place: Place, files: Sequence[InputFile] | None = None) -> Checked:
    """Checks keys, then checkpoint and input. Raises ConfigError with all problems of the first of
    these that has any.

    The input is listed unless its `files` are given. The tokenizer is loaded and the labels are
    tokenized, so that what a worker would refuse is refused here.
    """
    place.refuse([*check_keys(job), *check_output(job)])
    config, model_problems = check_checkpoint(job)
    survey, input_problems = check_input(job, files)
    place.refuse([*model_problems, *input_problems])
    assert config is not None
    assert survey is not None
    try:
        checked = Checked(job=job, config=config, survey=survey, runner=build_runner(job))
        _ = checked.schema
    except ConfigError as error:
        place.refuse([_problem_from(error, "model")])
        raise AssertionError("refuse() must raise") from error
    return checked


def is_s3(path: str) -> bool:
    return path.startswith("s3://")


def value_of(job: Job, key: str) -> Any:
    """The value at a dotted key."""
    value: Any = job
    for name in key.split("."):
        value = getattr(value, name)
    return value


def check_keys(job: Job) -> Iterator[Problem]:
    """The rules between keys and the ranges that a type cannot say; touches no file."""
    task = job.task
    if not any(is_s3(path) for path in (*job.input, job.output)):
        for key in ("storage.endpoint_url", "storage.anon"):
            if value_of(job, key) != job_keys()[key].default:
                yield Problem(
                    key=key,
                    message="no input or output is an s3:// path, so it has no effect; remove it",
                )
    yield from _check_requests(job) if job.asks_by_row else _check_rows_alone(job)
    if task.kind != "requests":
        yield from _check_task(job)
    yield from _check_engine(job)
    yield from _check_ranges(job)


def _check_requests(job: Job) -> Iterator[Problem]:
    try:
        yield from rooms.load("jobs.openai_batch.request_plan").check_requests(job)
    except ConfigError as error:  # that room is not here
        yield _problem_from(error, "input_format")


def _check_rows_alone(job: Job) -> Iterator[Problem]:
    """What only makes sense where each row is a request of its own."""
    if job.task.kind == "requests":
        message = "missing; every job needs it, but for one with input_format: openai_batch"
        yield Problem(key="task", message=message)
    for field in fields(RequestsSection):
        if getattr(job.requests, field.name) != getattr(RequestsSection(), field.name):
            yield Problem(
                key=f"requests.{field.name}",
                message="only input_format: openai_batch takes it; remove it",
            )


def _check_task(job: Job) -> Iterator[Problem]:
    task = job.task
    for name, kinds in unsupported_keys(task, TASKS).items():
        message = f"only {_listing(tuple(kinds))} takes it; remove it from this {task.kind} task"
        yield Problem(key=f"task.{name}", message=message)
    yield from _check_prompt(task)
    yield from _check_media(job)
    for key, message in TASKS[task.kind].problems(job):
        yield Problem(key=key, message=message)
    yield from _check_sampling(job)


def _check_prompt(task: TaskConfig) -> Iterator[Problem]:
    if task.prompt is None and task.messages is None:
        yield Problem(
            key="task.prompt",
            message='missing; write a template over columns, for example "{text}"',
        )
    if task.prompt is not None and task.messages is not None:
        yield Problem(key="task.messages", message="task.prompt is set too; keep one of them")
    if task.prompt is not None:
        try:
            columns = PromptTemplate.parse(task.prompt).columns
        except ConfigError as error:
            yield Problem(key="task.prompt", message=str(error).removeprefix("task.prompt: "))
            return
        if not columns and not media_columns(task):
            yield Problem(
                key="task.prompt",
                message="it names no column, so every row would ask the same; add a {column}",
            )


def _check_media(job: Job) -> Iterator[Problem]:
    task, media = job.task, job.media
    for key in ("task.image", "task.video"):
        if value_of(job, key) is not None and task.messages is not None:
            yield Problem(
                key=key,
                message="with task.messages, media stand in the messages themselves; remove it",
            )
    for column in sorted(
        {column for column in media_columns(task) if media_columns(task).count(column) > 1}
    ):
        yield Problem(key="task.image", message=f"the column {column!r} is named twice; keep one")
    if task.messages is None and not media_columns(task):
        for key in OF_MEDIA:
            if value_of(job, key) != job_keys()[key].default:
                yield Problem(
                    key=key,
                    message="the task names no task.image or task.video, so it has no effect",
                )
    if job.preprocess.fps is not None and not 0 < job.preprocess.fps < float("inf"):
        yield Problem(
            key="preprocess.fps", message=f"it is {job.preprocess.fps}, but it must be above 0"
        )
    if media.root is not None and not os.path.isdir(media.root):
        yield Problem(
            key="media.root",
            message=f"{media.root}: no such directory; name the one that holds the media",
        )
    for name in ("max_bytes", "fetch_timeout_s", "decode_timeout_s", "decode_bytes"):
        if not 0 < getattr(media, name) < float("inf"):
            yield Problem(
                key=f"media.{name}", message=f"it is {getattr(media, name)}, but it must be above 0"
            )
    for key in ("media.hosts", "media.private_hosts"):
        for host in value_of(job, key):
            if not re.fullmatch(r"[^\s/:@]+(:\d+)?|\[[0-9a-fA-F:]+\](:\d+)?", host):
                message = (
                    f"{host!r} is no host name; write it like images.example.com, without "
                    f"https:// and path"
                )
                yield Problem(key=key, message=message)


def _check_sampling(job: Job) -> Iterator[Problem]:
    kind, sampling, default = job.task.kind, job.sampling, SamplingParams()
    counts = TASKS[kind].sampling
    for field in fields(SamplingParams):
        if field.name not in counts and getattr(sampling, field.name) != getattr(
            default, field.name
        ):
            why = f"{kind} gives one JSON text for a row" if counts else f"{kind} draws no tokens"
            message = f"{why}, so it has no effect; remove it"
            yield Problem(key=f"sampling.{field.name}", message=message)
    if sampling.logprobs > 1:
        yield Problem(
            key="sampling.logprobs",
            message="the output holds the chosen tokens' log-probabilities only; use 1 or 0",
        )


def _check_engine(job: Job) -> Iterator[Problem]:
    engine, constrained = job.engine, job.task.kind == "extract"
    yield from engine_problems(engine, "engine", plans_gpus=job.cluster.gpus not in ("auto", 0))
    if engine.replica_range[0] > engine.replica_range[1]:
        yield Problem(key="engine.replicas", message="the fewest come first: write [fewest, most]")
    if engine.kind == "vllm" and rooms.is_here("vllm"):
        limits = rooms.load("models.engine.vllm.vllm_limits")
        for name, message in limits.sampling_problems(job.sampling, constrained=constrained):
            yield Problem(key=f"sampling.{name}", message=f"{message}; or use engine.kind torch")


def _check_ranges(job: Job) -> Iterator[Problem]:
    at_least_one = (
        "engine.replicas", "cluster.nodes", "cluster.cpus", "preprocess.workers",
        "commit.unit_rows", "cron.keep",
    )  # fmt: skip
    for key in at_least_one:
        value = value_of(job, key)
        least = min(value) if isinstance(value, tuple) else value
        if least != "auto" and least < 1:
            yield Problem(key=key, message=f"it is {least}, but it must be at least 1")
    if job.cluster.gpus != "auto" and job.cluster.gpus < 0:
        yield Problem(
            key="cluster.gpus", message=f"it is {job.cluster.gpus}, but it must be at least 0"
        )
    if not 0 < job.commit.every_seconds < float("inf"):
        yield Problem(
            key="commit.every_seconds",
            message=f"it is {job.commit.every_seconds}, but it must be above 0",
        )
    if not 0 <= job.max_error_rate <= 1:
        yield Problem(
            key="max_error_rate",
            message=f"it is {job.max_error_rate}, but it is a fraction of the rows: 0 to 1",
        )
    if job.cron.webhook is not None and not re.match("https?://[^/]", job.cron.webhook):
        yield Problem(
            key="cron.webhook", message="it is no URL; write https://host/path, or remove it"
        )
    if not job.input:
        yield Problem(key="input", message="no file is named; write input: [data/*.parquet]")
    for path in job.input:
        if "://" in path and not is_s3(path):
            yield Problem(
                key="input",
                message=f"{path}: files are read from disks and s3://; copy it to one of these",
            )
    for column in sorted({column for column in job.carry if job.carry.count(column) > 1}):
        yield Problem(key="carry", message=f"the column {column!r} stands there twice; keep one")


def check_output(job: Job) -> Iterator[Problem]:
    """Output must be an s3:// prefix, or a directory that is there or can be made."""
    if is_s3(job.output):
        if not re.fullmatch(r"s3://[^/]+/.*[^/].*", job.output):
            yield Problem(
                key="output",
                message=f"{job.output}: name a bucket and a prefix in it: s3://bucket/name",
            )
        return
    if "://" in job.output:
        yield Problem(
            key="output",
            message=f"{job.output}: outputs are directories or s3:// prefixes; name one",
        )
        return
    if not job.output.strip():
        yield Problem(key="output", message="it is empty; name a directory")
        return
    path = Path(job.output)
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not existing.is_dir():
        yield Problem(key="output", message=f"{existing} is a file; name a directory")
    elif not os.access(existing, os.W_OK):
        yield Problem(
            key="output",
            message=f"{existing} cannot be written by this user; choose another directory",
        )


def check_checkpoint(job: Job) -> tuple[ModelConfig | None, list[Problem]]:
    """Directory, architecture, weights and tokenizer of `model`, without loading it."""
    path = Path(job.model)
    if "://" in job.model:
        return None, [
            _of_model(
                f"{job.model}: only local directories are available in this version; copy it first"
            )
        ]
    if not path.is_dir():
        return None, [
            _of_model(
                f"{path}: no such directory; name a checkpoint in the Hugging Face layout on "
                f"this disk"
            )
        ]
    try:
        config = load_config(path)
    except ConfigError as error:
        return None, [_of_model(str(error))]
    problems = [_of_model(text) for text in _head_problems(job, config)]
    task = None if job.asks_by_row else TASKS[job.task.kind].engine_task
    problems += checkpoint_problems(job.engine, config, task, "engine")
    if not (path / "tokenizer.json").is_file():
        problems.append(
            _of_model(f"{path / 'tokenizer.json'} is missing; the checkpoint needs it to read text")
        )
    if job.engine.kind != "echo":
        try:
            check_weights(path, quantised=job.engine.kind == "vllm")
        except ConfigError as error:
            problems.append(_of_model(str(error)))
    return config, problems


def check_input(
    job: Job, files: Sequence[InputFile] | None = None
) -> tuple[Survey | None, list[Problem]]:
    """The files, the types of the columns that the job reads, and what is wrong with either."""
    try:
        files = job_source(job).list_files(job.input) if files is None else files
        survey = survey_input(job, files)
        return survey, list(_media_type_problems(job, survey.schema))
    except ConfigError as error:
        columns = list(_column_problems(job, files or []))
        return None, columns or [_problem_from(error, "input")]


def _column_problems(job: Job, files: Sequence[InputFile]) -> Iterator[Problem]:
    """Looks at each column by itself, so that a missing one is told at the key that names it."""
    for key, column in column_uses(job) if files else ():
        try:
            replace(job_source(job), columns=(column,)).survey(files)
        except ConfigError as error:
            if "no column" in str(error):
                yield Problem(key=key, message=str(error).removeprefix("input: "))


def column_uses(job: Job) -> Iterator[tuple[str, str]]:
    """(key of the job, input column that it names), for every column that the job reads."""
    yield from ((f"task.{key}", column) for key, column in column_keys(job.task))
    if job.key is not None:
        yield "key", job.key
    yield from (("carry", column) for column in job.carry)


def _media_type_problems(job: Job, schema: pa.Schema) -> Iterator[Problem]:
    for key, column in column_uses(job):
        if key in ("task.image", "task.video") and not _holds_media(schema.field(column).type):
            yield Problem(
                key=key,
                message=f"column {column!r} has type {schema.field(column).type}; media are bytes, "
                f"text (a path or "
                "URL), a struct of bytes and path, or a list of these",
            )


def _holds_media(dtype: pa.DataType) -> bool:
    types = pa.types
    if types.is_list(dtype) or types.is_large_list(dtype) or types.is_fixed_size_list(dtype):
        return _holds_media(dtype.value_type)
    if types.is_dictionary(dtype):
        return _holds_media(dtype.value_type)
    if types.is_struct(dtype):
        return bool({"bytes", "path"} & {field.name for field in dtype})
    text = types.is_string(dtype) or types.is_large_string(dtype)
    return bool(text or types.is_binary(dtype) or types.is_large_binary(dtype))


def _head_problems(job: Job, config: ModelConfig) -> Iterator[str]:
    """What the checkpoint's head cannot do."""
    file, task = Path(job.model) / "config.json", TASKS.get(job.task.kind)
    if task is None:
        return
    if task.head not in (None, config.head):
        kinds = tuple(name for name, each in TASKS.items() if each.head in (None, config.head))
        can = f"which can {_listing(kinds)}, but not {job.task.kind}"
        yield f"{file} says {config.architecture}, {can}"
    elif media_columns(job.task) and config.vision is None:
        can = "which reads text only; images and videos need a GLM-4.1V"
        yield f"{file} says {config.architecture}, {can}"
    else:
        yield from task.checkpoint_problems(job, config)


def _of_model(message: str) -> Problem:
    return Problem(key="model", message=message)


def _problem_from(error: ConfigError, default_key: str) -> Problem:
    """Errors from below begin with the key that they are about, where they are about one."""
    key, _, message = str(error).partition(": ")
    return (
        Problem(key=key, message=message)
        if key in job_keys()
        else Problem(key=default_key, message=str(error))
    )


def _listing(words: tuple[str, ...]) -> str:
    return " or ".join(words)
