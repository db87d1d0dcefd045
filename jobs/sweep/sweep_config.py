"""A sweep file becomes a Sweep: models, data sets and tasks in YAML are multiplied into cells.

Every refusal that comes before anything starts names the key's place and the remedy. Each cell is
checked as a job of its own, by jobs.checks.checks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from glm_batch.jobs.checks.checks import check_job
from glm_batch.jobs.files.sections import Place, Problem, load_sections
from glm_batch.models.engine.api.request import SamplingParams
from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.evaluation.intervals import CONFIDENCE
from glm_batch.pipelines.job import (
    ClusterSection,
    CommitSection,
    EngineSection,
    Job,
    MediaSection,
    PreprocessSection,
    StorageSection,
    TaskConfig,
)
from glm_batch.pipelines.runs.prepared import Checked
from glm_batch.pipelines.sweep.cells import AXES, BEST, Cell, ScoreSection, Sweep

WHAT = "a sweep is a mapping of keys (output, models, datasets, tasks ...)"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]*")
DEFAULT = "default"
SCORED_KINDS = ("choose", "generate", "extract", "classify")
MAX_CELLS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """A checkpoint and how it is run, as in a job file."""

    model: str  # a checkpoint directory
    engine: EngineSection = field(default_factory=EngineSection)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetEntry:
    """Rows, as in a job file."""

    input: list[str]  # Parquet or JSONL: files, globs, directories, s3:// objects and prefixes
    key: str | None = None  # a unique column
    carry: list[str] = field(default_factory=list)  # input columns to copy into the outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEntry:
    """What is asked, and the axes along which it varies."""

    task: TaskConfig  # a job file's section; gold is needed
    datasets: list[str] | None = None  # null: all
    models: list[str] | None = None  # null: all
    # by names of your own, each in the place of task.prompt
    prompts: dict[str, str] = field(default_factory=dict)
    # a job file's sections, by names of your own
    sampling: dict[str, SamplingParams] = field(default_factory=dict)
    seeds: list[int] | None = None  # with a temperature above 0
    # each in the place of preprocess.max_pixels; null is the checkpoint's own
    max_pixels: list[int | None] | None = None
    preprocess: PreprocessSection = field(default_factory=PreprocessSection)
    score: ScoreSection = field(default_factory=ScoreSection)  # for generate


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepFile:
    """The file as it stands. The sections from `cluster` on are a job file's, for all cells."""

    output: str  # a directory or s3:// prefix
    models: dict[str, ModelEntry]  # checkpoints and how they are run, by names of your own
    datasets: dict[str, DatasetEntry]  # rows, by names of your own
    tasks: dict[str, TaskEntry]  # questions, by names of your own
    # coordinates that the others are compared with; best: the highest accuracy
    baseline: str | dict[str, str] = BEST
    confidence: float = CONFIDENCE  # of the intervals
    max_error_rate: float = 0.0  # of each cell
    cluster: ClusterSection = field(default_factory=ClusterSection)
    media: MediaSection = field(default_factory=MediaSection)
    commit: CommitSection = field(default_factory=CommitSection)
    storage: StorageSection = field(default_factory=StorageSection)


def load_sweep(path: str, overrides: Sequence[str] = ()) -> tuple[Sweep, Place]:
    """Reads the file, applies `a.b=value` overrides and lays out the grid.

    Raises ConfigError that names each key and its place.
    """
    file, place = load_sections(SweepFile, path, WHAT, overrides)
    place.refuse(list(_problems(file)))
    cells = [cell for name, task in file.tasks.items() for cell in _cells(file, name, task)]
    if len(cells) > MAX_CELLS:
        place.refuse(
            [
                Problem(
                    key="tasks",
                    message=f"the grid has {len(cells):,} cells; at most {MAX_CELLS:,} run",
                )
            ]
        )
    sweep = Sweep(
        output=file.output,
        cells=tuple(cells),
        storage=file.storage,
        baseline=file.baseline,
        confidence=file.confidence,
        max_error_rate=file.max_error_rate,
    )
    place.refuse(list(_baseline_problems(sweep)))
    return sweep, place


def check_sweep(sweep: Sweep, place: Place) -> list[Checked]:
    """Checks every cell as a job. Raises ConfigError with what is wrong, each thing once."""
    checked, problems = list[Checked](), dict[tuple[str, str], Problem]()
    for cell in sweep.cells:
        try:
            checked.append(
                check_job(cell.job, _CellPlace(path="", lines={}, overridden=frozenset()))
            )
        except _Problems as refused:
            for problem in refused.problems:
                at = replace(problem, key=sweep_key(cell, problem.key))
                problems.setdefault((at.key, at.message), at)
    place.refuse(list(problems.values()))
    return checked


def sweep_key(cell: Cell, key: str) -> str:
    """Where in the sweep file a job's key comes from."""
    at = cell.coordinates
    task = f"tasks.{at['task']}"
    section, _, rest = key.partition(".")
    if section in ("model", "engine"):
        return f"models.{at['model']}.{key}"
    if section in ("input", "key", "carry"):
        return f"datasets.{at['dataset']}.{key}"
    if key == "task.prompt" and at["prompt"] != DEFAULT:
        return f"{task}.prompts.{at['prompt']}"
    if section == "sampling" and at["sampling"] != DEFAULT:
        return f"{task}.sampling.{at['sampling']}.{rest}"
    if key == "preprocess.max_pixels" and at["max_pixels"] != DEFAULT:
        return f"{task}.max_pixels"
    return f"{task}.{key}" if section in ("task", "preprocess", "sampling") else key


def _cells(file: SweepFile, name: str, task: TaskEntry) -> Iterator[Cell]:
    prompts: Mapping[str, str | None] = task.prompts or {DEFAULT: task.task.prompt}
    sampling = task.sampling or {DEFAULT: SamplingParams()}
    seeds: Sequence[int | None] = task.seeds or [None]
    pixels: Sequence[int | None] = task.max_pixels or [task.preprocess.max_pixels]
    datasets, models = task.datasets or file.datasets, task.models or file.models
    for model, dataset, prompt, params, seed, budget in product(
        models, datasets, prompts, sampling, seeds, pixels
    ):
        coordinates = dict(
            zip(
                AXES,
                (model, dataset, name, prompt, params, _shown(seed), _shown(budget)),
                strict=True,
            )
        )
        drawn = sampling[params] if seed is None else replace(sampling[params], seed=seed)
        yield _cell(file, task, coordinates, prompts[prompt], drawn, budget)


def _cell(
    file: SweepFile,
    task: TaskEntry,
    coordinates: Mapping[str, str],
    prompt: str | None,
    sampling: SamplingParams,
    max_pixels: int | None,
) -> Cell:
    name = "-".join(coordinates[axis] for axis in AXES)
    model, dataset = file.models[coordinates["model"]], file.datasets[coordinates["dataset"]]
    job = Job(
        model=model.model,
        input=dataset.input,
        output=f"{file.output.rstrip('/')}/cells/{name}",
        task=replace(task.task, prompt=prompt, label_logprobs=task.task.kind == "choose"),
        key=dataset.key,
        carry=dataset.carry,
        sampling=sampling,
        engine=model.engine,
        cluster=file.cluster,
        preprocess=replace(task.preprocess, max_pixels=max_pixels),
        media=file.media
        if task.task.image or task.task.video or task.task.messages
        else MediaSection(),
        commit=file.commit,
        storage=file.storage,
        max_error_rate=1.0,  # the sweep's own counts
    )
    return Cell(name=name, coordinates=coordinates, job=job, score=task.score)


def _shown(value: int | None) -> str:
    return DEFAULT if value is None else str(value)


def _problems(file: SweepFile) -> Iterator[Problem]:
    for key in ("models", "datasets", "tasks"):
        if not getattr(file, key):
            yield Problem(key=key, message="it is empty; name at least one")
        yield from _name_problems(key, getattr(file, key))
    if not 0.5 <= file.confidence < 1:
        yield Problem(
            key="confidence", message=f"it is {file.confidence}, but it must be from 0.5 to below 1"
        )
    if not 0 <= file.max_error_rate <= 1:
        yield Problem(
            key="max_error_rate",
            message=f"it is {file.max_error_rate}, but it is a fraction: 0 to 1",
        )
    for name, task in file.tasks.items():
        yield from _task_problems(file, f"tasks.{name}", task)


def _task_problems(file: SweepFile, key: str, task: TaskEntry) -> Iterator[Problem]:
    for axis, known in (("datasets", file.datasets), ("models", file.models)):
        for name in getattr(task, axis) or ():
            if name not in known:
                yield Problem(
                    key=f"{key}.{axis}",
                    message=f"no {axis[:-1]} is named {name!r}; known: {', '.join(known)}",
                )
    for axis in ("datasets", "models", "seeds", "max_pixels"):
        values = getattr(task, axis)
        if values is not None and (not values or len(set(values)) < len(values)):
            yield Problem(
                key=f"{key}.{axis}",
                message="it is empty or names something twice; name each value once",
            )
    yield from _name_problems(f"{key}.prompts", task.prompts)
    yield from _name_problems(f"{key}.sampling", task.sampling)
    if task.task.kind not in SCORED_KINDS:
        yield Problem(
            key=f"{key}.task.kind",
            message=f"evaluate scores {', '.join(SCORED_KINDS)}; use one of these",
        )
    if task.task.gold is None:
        yield Problem(
            key=f"{key}.task.gold", message="missing; name the column that holds the right answers"
        )
    if task.prompts and task.task.prompt is not None:
        yield Problem(key=f"{key}.task.prompt", message="prompts are given too; keep one of them")
    if task.prompts and task.task.messages is not None:
        yield Problem(key=f"{key}.task.messages", message="prompts are given too; keep one of them")
    if task.max_pixels is not None and task.preprocess.max_pixels is not None:
        yield Problem(
            key=f"{key}.preprocess.max_pixels", message="max_pixels is given too; keep one of them"
        )
    if task.seeds and all(
        params.temperature == 0
        for params in (task.sampling or {DEFAULT: SamplingParams()}).values()
    ):
        yield Problem(
            key=f"{key}.seeds",
            message="no sampling has a temperature above 0, so all seeds say the same",
        )
    yield from _score_problems(f"{key}.score", task)


def _score_problems(key: str, task: TaskEntry) -> Iterator[Problem]:
    if task.task.kind != "generate" and task.score != ScoreSection():
        yield Problem(
            key=key, message=f"only generate takes it; remove it from this {task.task.kind} task"
        )
    if task.score.extract is not None:
        try:
            re.compile(task.score.extract)
        except re.error as error:
            yield Problem(key=f"{key}.extract", message=f"not a regular expression: {error}")
    if not 0 <= task.score.tolerance < 1:
        yield Problem(
            key=f"{key}.tolerance",
            message=f"it is {task.score.tolerance}, but it must be from 0 to below 1",
        )
    fewest = min((params.n for params in task.sampling.values()), default=1)
    for k in task.score.pass_at:
        if not 1 <= k <= fewest:
            yield Problem(
                key=f"{key}.pass_at",
                message=f"{k} is more than there are samples, or less than one: set n",
            )


def _name_problems(key: str, names: Mapping[str, Any]) -> Iterator[Problem]:
    for name in names:
        if not NAME.fullmatch(name):
            message = (
                "a name has letters, digits, _ and . and begins with a letter or digit: "
                "it becomes a folder's"
            )
            yield Problem(key=f"{key}.{name}", message=message)


def _baseline_problems(sweep: Sweep) -> Iterator[Problem]:
    if isinstance(sweep.baseline, str):
        if sweep.baseline != BEST:
            yield Problem(
                key="baseline",
                message=f'it is "{sweep.baseline}"; write best, or coordinates: {{model: ...}}',
            )
        return
    for axis, value in sweep.baseline.items():
        known = sorted({cell.coordinates[axis] for cell in sweep.cells}) if axis in AXES else []
        if not known:
            yield Problem(key=f"baseline.{axis}", message=f"no such axis; known: {', '.join(AXES)}")
        elif value not in known:
            yield Problem(
                key=f"baseline.{axis}",
                message=f"no cell has {value!r} there; known: {', '.join(known)}",
            )
    if not sweep.baseline:
        yield Problem(
            key="baseline", message="it is empty; write best, or coordinates: {model: ...}"
        )


class _Problems(ConfigError):
    """What is wrong with one cell's job."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


class _CellPlace(Place):
    """Gives a cell's problems to whoever knows where the sweep file says these things."""

    def refuse(self, problems: Sequence[Problem]) -> None:
        if problems:
            raise _Problems(problems)


def sweep_name(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]
