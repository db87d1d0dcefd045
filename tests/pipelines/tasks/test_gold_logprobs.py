"""task.gold_logprobs from a row to its columns: the oracle's log-probabilities, and what becomes of
rows without.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from glm_batch.glm_actors.faults.suspects import Answer
from glm_batch.glm_actors.units.batches import to_requests, with_completions
from glm_batch.glm_actors.units.model_actor import ModelActor, _completions
from glm_batch.models.checkpoint.config_reader import load_config
from glm_batch.models.engine import Completion, EngineConfig, Request, SamplingParams, build_engine
from glm_batch.models.engine.api.request import Generate, Output
from glm_batch.models.errors import ConfigError, RowError
from glm_batch.models.processing.chat import Chat
from glm_batch.pipelines.input.listing import InputFile
from glm_batch.pipelines.input.values import LINE
from glm_batch.pipelines.job import EngineSection, Job, TaskConfig
from glm_batch.pipelines.tasks.kinds import output_schema
from glm_batch.pipelines.tasks.rows import (
    TaskSpec,
    num_rows,
    parse_unit,
    render_unit,
    rows_of,
    runner_of,
    unit_table,
)
from glm_batch.pipelines.tasks.task_runner import TaskRunner
from tests.models.conftest import load_oracle

MODEL = Path(__file__).parents[3] / "examples" / "tiny_glm"
TASK = TaskConfig(
    kind="generate", prompt="Answer in a sentence: {text}", gold="answer", gold_logprobs=True
)
SAMPLING = SamplingParams(max_tokens=4)
QUESTION = (
    "Where is my parcel? It was sent to Berlin two weeks ago and nobody could tell me what has "
    "become of it."
)
ANSWERS = ["We will look into it today.", "no", None, " \n", 42]


def spec_of(name: str, **changes: Any) -> TaskSpec:
    job = Job(model=str(MODEL), input=["i"], output="o", task=TASK, sampling=SAMPLING)
    job = replace(job, **changes)
    schema = output_schema(job, load_config(MODEL), {})
    return TaskSpec(job=job, model_dir=str(MODEL), schema=schema, run_id="gold_logprobs", name=name)


@pytest.fixture
def spec(request: pytest.FixtureRequest) -> Iterator[TaskSpec]:
    found = spec_of(request.node.name)
    yield found
    runner_of(found).close()


def read(answers: Sequence[object], text: str = QUESTION) -> pa.Table:
    """Rows of JSON text, as read: their gold answers are of any type."""
    lines = [json.dumps({"text": text, "answer": answer}).encode() for answer in answers]
    file = InputFile(path="rows.jsonl", name="rows.jsonl", size=1, stamp="1")
    return unit_table(pa.table({LINE: pa.array(lines, pa.binary())}), 0, file, 0, {})


def requests_of(table: pa.Table) -> list[int]:
    """How many travelling rows each row has."""
    return [rows_of(table, row, row + 1).num_rows for row in range(num_rows(table))]


def answered(table: pa.Table, config: EngineConfig) -> tuple[pa.Table, dict[str, Completion]]:
    """The engine's completions of everything at once, as the actor puts them into the table."""
    engine, requests = build_engine(config), to_requests(table)
    engine.submit(requests)
    found: dict[str, Completion] = {}
    while engine.has_work():
        found |= {each.id: each for each in engine.step()}
    engine.close()
    return with_completions(table, [found[each.id] for each in requests]), found


def oracle_logprob(request: Request, answer: str) -> tuple[float, int]:
    """Of the prompt and the answer in one sequence, read off a whole softmax."""
    ids = list(request.input_ids) + list(Chat.from_dir(str(MODEL)).label_continuations([answer])[0])
    start = len(request.input_ids)
    with torch.no_grad():
        logprobs = load_oracle(MODEL)(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids))), len(ids) - start


def test_log_probabilities_are_the_oracles_and_the_prompt_is_computed_once(spec: TaskSpec) -> None:
    table = render_unit(spec, read(ANSWERS))
    assert num_rows(table) == len(ANSWERS)
    assert requests_of(table) == [2, 2, 1, 1, 2]
    requests = to_requests(table)
    config = EngineConfig(model=str(MODEL), kind="torch", dtype="float32", device="cpu")
    completions, by_id = answered(table, config)
    rows = parse_unit(spec, completions).to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * len(ANSWERS)
    for row, answer in zip(rows, ANSWERS, strict=True):
        # the question is the same, whatever is scored beside it
        assert row["text"] == rows[0]["text"]
        if answer is None or not str(answer).strip():
            assert (row["gold_logprob"], row["gold_num_tokens"]) == (None, None)
        else:
            logprob, num_tokens = oracle_logprob(requests[0], str(answer))
            assert row["gold_logprob"] == pytest.approx(logprob, abs=1e-4)
            assert row["gold_num_tokens"] == num_tokens
    prompt_tokens = len(requests[0].input_ids)
    assert min(by_id[each.id].cached_tokens for each in requests[1:]) >= prompt_tokens - 16 > 16


def test_an_answer_that_does_not_fit_is_the_rows_error(spec: TaskSpec) -> None:
    table = render_unit(spec, read(["yes", "never again " * 4000, "yes"]))
    assert requests_of(table) == [2, 1, 2]
    assert table["error_code"].to_pylist() == [None, None, "gold_too_long", None, None]
    limit = load_config(MODEL).longest_context
    assert f"at most {limit} fit together" in table["error_message"][2].as_py()


def test_through_the_actor_with_several_outputs() -> None:
    """The echo engine gives a single continuation four fifths."""
    spec = spec_of("several", sampling=replace(SAMPLING, n=2), engine=EngineSection(kind="echo"))
    table = render_unit(spec, read(["yes", None, "no"]))
    rows = parse_unit(
        spec, ModelActor(EngineConfig(model=str(MODEL), kind="echo"), 1)(table)
    ).to_pylist()
    assert [row["gold_logprob"] for row in rows] == [
        pytest.approx(math.log(0.8)),
        None,
        pytest.approx(math.log(0.8)),
    ]
    assert [len(row["text"]) for row in rows] == [2, 2, 2]
    runner_of(spec).close()


def test_what_ended_the_worker_is_the_error_of_the_whole_row(spec: TaskSpec) -> None:
    table = render_unit(spec, read(["yes"]))
    lost: Answer[list[Completion]] = Answer(
        start=0, stop=2, result=RowError("worker_died", "twice")
    )
    (row,) = parse_unit(
        spec, with_completions(table, _completions(lost, to_requests(table)))
    ).to_pylist()
    assert (row["status"], row["error_code"], row["gold_logprob"]) == ("error", "worker_died", None)


def test_an_answer_that_the_engine_cannot_score_is_the_rows_error(spec: TaskSpec) -> None:
    table = render_unit(spec, read(["yes", "no", None]))
    fine = Output(token_ids=(1,), text="x", finish_reason="stop")
    ended = Completion(id="", finish_reason="abort")
    failed = Completion(id="", finish_reason="error", error=RowError("out_of_memory", "full"))
    written = Completion(id="", finish_reason="stop", outputs=(fine,))
    completions = [written, failed, written, ended, written]
    rows = parse_unit(spec, with_completions(table, completions)).to_pylist()
    assert [row["error_code"] for row in rows] == ["out_of_memory", "not_scored", None]
    assert [row["text"] for row in rows] == [None, None, "x"]


def test_a_checkpoint_that_would_reason_first_is_refused(
    tmp_path: Path, echo_checkpoint: Path
) -> None:
    folder = shutil.copytree(echo_checkpoint, tmp_path / "checkpoint")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "{# reads enable_thinking #}")
    job = Job(model=str(folder), input=["i"], output="o", task=TASK)
    assert TaskRunner(job, str(folder)).work == Generate()
    with pytest.raises(ConfigError, match=r"task\.gold_logprobs: .* set task\.thinking: false"):
        TaskRunner(replace(job, task=replace(TASK, thinking=True)), str(folder))
