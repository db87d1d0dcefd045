"""A job on its way to a run: checked against its checkpoint and input, then with the plan that
counts.

    check -> Checked -> prepare -> Prepared -> process and finish, in pipelines.runs.pipeline
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from glm_batch.models import rooms
from glm_batch.models.checkpoint.config_reader import load_config
from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.errors import ConfigError
from glm_batch.models.processing.scores import Scaling
from glm_batch.pipelines.input.listing import InputFile
from glm_batch.pipelines.input.source import Survey
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.planning.plan import (
    Plan,
    differences,
    extended_plan,
    identify,
    job_source,
    make_plan,
    survey_input,
)
from glm_batch.pipelines.tasks.kinds import output_schema
from glm_batch.pipelines.tasks.rows import TaskSpec
from glm_batch.pipelines.tasks.task_runner import build_runner


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A job that can run, and what was read to know that: nobody needs to read it again."""

    job: Job
    config: ModelConfig
    survey: Survey
    runner: Any  # a pipelines.tasks.task_runner.Runner

    @cached_property
    def schema(self) -> pa.Schema:
        """The output's, by the present input. Raises ConfigError where a carried name is taken."""
        return self._output_schema(self.survey.schema)

    def prepared(self, plan: Plan) -> Prepared:
        """With a plan of this job, whose types count."""
        job = self.job
        spec = TaskSpec(
            job=job,
            model_dir=os.path.abspath(job.model),
            schema=self._output_schema(plan.schema),
            run_id=f"{plan.fingerprint}-{uuid.uuid4().hex[:8]}",
            scaling=self._scaling(plan.identity["task"]),
        )
        return Prepared(plan=plan, spec=spec, facts=self.runner.facts)

    def _scaling(self, task: Mapping[str, Any]) -> Scaling | None:
        if "calibration" not in task:
            return None
        calibration = rooms.load("pipelines.calibration.calibration")
        labels = self.job.task.labels or self.config.id2label
        return calibration.planned_scaling(task, labels)  # type: ignore[no-any-return]

    def _output_schema(self, types: pa.Schema) -> pa.Schema:
        carried = {name: types.field(name).type for name in self.job.carry}
        return output_schema(self.job, self.config, carried)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A checked job with its plan, what travels to the workers, and what goes into the manifest."""

    plan: Plan
    spec: TaskSpec
    facts: dict[str, Any]


def check(job: Job, files: Sequence[InputFile] | None = None) -> Checked:
    """Lists the input, unless its `files` are given, and builds what reads rows and answers.

    jobs.checks.checks.check_job does the same for people, with places in the job file. Raises
    ConfigError.
    """
    checked = Checked(
        job=job,
        config=load_config(job.model),
        survey=survey_input(job, files),
        runner=build_runner(job),
    )
    _ = checked.schema
    return checked


def check_again(job: Job, plan: Plan, units: Collection[int]) -> Checked:
    """Checks that a job is the one of this plan still, and so are the input files of these units.

    Raises ConfigError.
    """
    files = [planned.file for planned in plan.files]
    identity = identify(job, files, os.path.abspath(job.model))
    source = job_source(job)
    for number in {unit.file for unit in plan.units() if unit.index in units}:
        (now,) = source.list_files([files[number].path])
        identity["input"][files[number].name] = {"size": now.size, "modified": now.stamp}
    if identity != plan.identity:
        lines = "\n  ".join(differences(plan.identity, identity))
        raise ConfigError(
            f"this is another job now; undo the difference (there -> now):\n  {lines}"
        )
    return Checked(
        job=job,
        config=load_config(job.model),
        survey=Survey(files=files, schema=plan.schema, num_rows={}),
        runner=build_runner(job),
    )


def prepare(job: Job | Checked, output: Output | None, *, extend: bool = False) -> Prepared:
    """The job with the plan that stands in its output, or else a new one, which is created there.

    With `extend`, the plan that stands may lack some of the present files. Without an output, the
    plan stands nowhere. Raises ConfigError.
    """
    checked, job = (job, job.job) if isinstance(job, Checked) else (None, job)
    files = checked.survey.files if checked else job_source(job).list_files(job.input)
    identity = identify(job, files, os.path.abspath(job.model))
    plan = output.adopt(identity, extend=extend) if output is not None else None
    checked = checked or check(job, files)
    if plan is None:
        plan = make_plan(job, checked.survey, identity)
        if output is not None:
            plan = output.begin(plan)
    elif plan.identity != identity:
        plan = extended_plan(job, plan, checked.survey, identity)
    return checked.prepared(plan)
