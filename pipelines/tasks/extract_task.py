"""task.kind extract: a JSON text that follows a schema."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import fields
from functools import cached_property
from typing import Any

import pyarrow as pa

from glm_batch.glm_actors.faults.schema_check import SchemaChecker
from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.engine.api.request import Completion, Constraint, Generate, SamplingParams
from glm_batch.models.errors import ConfigError, RowError
from glm_batch.pipelines.input.values import json_or_text, same_json
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.tasks.task import Columns, Task

SCHEMA_S = 60.0  # that task.schema may take to compile


class ExtractTask(Task):
    keys = ("schema", "gold", "image", "video")
    engine_task = "extract"
    # The grammar of a JSON text begins at "{": what the template puts before an answer must stand
    # already.
    start_answer = True
    sampling = frozenset(field.name for field in fields(SamplingParams)) - {"n", "logprobs"}
    has_right_answer = True

    @staticmethod
    def columns(job: Job, model: ModelConfig) -> dict[str, pa.DataType]:
        return {"json": pa.string()}

    @staticmethod
    def problems(job: Job) -> Iterator[tuple[str, str]]:
        if job.task.schema is None:
            yield "task.schema", "extract needs a JSON schema; write schema: {type: object, ...}"
            return
        try:
            check_schema(job.task.schema)
        except ConfigError as error:
            yield "task.schema", str(error).removeprefix("task.schema: ")

    def _work(self) -> Generate:
        if not self.prompter.tokenizer.eos_token_ids:
            raise ConfigError(
                "model: generation_config.json and config.json name no eos_token_id, so that the "
                "end of a JSON text cannot be told; add it"
            )
        constraint = Constraint(kind="json_schema", text=json.dumps(self.config.schema))
        return Generate(sampling=self.job.sampling, constraint=constraint)

    @property
    def num_answer_tokens(self) -> int:
        return 1

    def answer(self, completions: Sequence[Completion], note: Mapping[str, Any]) -> Columns:
        output = completions[0].outputs[0]
        text = output.text.strip()
        if output.finish_reason == "length":
            raise RowError(
                "output_truncated",
                f"the JSON was cut off after {len(output.token_ids)} tokens: raise "
                f"sampling.max_tokens (now {self.job.sampling.max_tokens}) or allow shorter values "
                f"in task.schema; it began {text[:80]!r}",
            )
        self._validator.check(text)
        return {"json": text}

    def is_right(self, columns: Columns, gold: object) -> bool:
        return same_json(json.loads(columns["json"]), json_or_text(gold))

    @cached_property
    def _validator(self) -> JsonValidator:
        return JsonValidator(self.config.schema or {})


class JsonValidator:
    """Checks a text against a JSON schema with the library that constrains decoding."""

    def __init__(self, schema: dict[str, Any]) -> None:
        import llguidance

        self._grammar = llguidance.grammar_from("json_schema", json.dumps(schema))
        self._tokenizer = llguidance.LLTokenizer("byte")

    def check(self, text: str) -> None:
        """Raises RowError("invalid_json") with the place where the text leaves JSON or the "
        "schema."""
        import llguidance

        try:
            json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise RowError(
                "invalid_json", f"the output is not JSON: {error}; it began {text[:80]!r}"
            ) from error
        matcher = llguidance.LLMatcher(self._tokenizer, self._grammar)
        # which the library takes for a control character
        spelled = text.replace("\x7f", "\\u007f").encode()
        data = list(spelled)
        accepted = matcher.validate_tokens(data)
        if accepted < len(data):
            place = spelled[:accepted].decode(errors="replace")
            raise RowError("invalid_json", f"the output leaves task.schema after {place[-80:]!r}")
        matcher.consume_tokens(data)
        if not matcher.is_accepting():
            raise RowError(
                "invalid_json", f"the output ends before task.schema is satisfied: {text[-80:]!r}"
            )


def check_schema(schema: dict[str, Any], timeout_s: float = SCHEMA_S) -> None:
    """Raises ConfigError for a schema that decoding cannot follow, or not compile in time."""
    with closing(SchemaChecker(timeout_s)) as checker:
        problem = checker.problem(json.dumps(schema))
    if problem:
        raise ConfigError(f"task.schema: not a JSON schema that decoding can follow: {problem}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")
