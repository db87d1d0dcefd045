"""task.kind loglikelihood: texts and completions, as transformers scores them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from glm_batch.glm_actors.units.batches import to_requests, with_completions
from glm_batch.models.checkpoint.config_reader import load_config
from glm_batch.models.engine import Completion, EngineConfig, build_engine
from glm_batch.models.engine.api.request import Score
from glm_batch.models.processing.chat import Chat
from glm_batch.models.processing.tokenizer import Tokenizer
from glm_batch.pipelines.input.listing import InputFile
from glm_batch.pipelines.input.values import LINE
from glm_batch.pipelines.job import EngineSection, Job, TaskConfig
from glm_batch.pipelines.tasks.kinds import TASKS, output_schema
from glm_batch.pipelines.tasks.rows import TaskSpec, parse_unit, render_unit, runner_of, unit_table
from tests.models.conftest import load_oracle
from tests.models.processing.conftest import write_checkpoint

MODEL = Path(__file__).parents[3] / "examples" / "tiny_glm"
TEXT = TaskConfig(kind="loglikelihood", prompt="{text}")
PAIR = replace(TEXT, completion="answer")
CHAT = replace(PAIR, system="Be brief.")
LONG = "Where is my parcel? It was sent to Berlin two weeks ago and nobody could tell me more. "
TORCH = EngineConfig(model=str(MODEL), kind="torch", dtype="float32", device="cpu")


@pytest.fixture
def specs() -> Iterator[dict[str, TaskSpec]]:
    found = {name: spec_of(name, task) for name, task in (("t", TEXT), ("p", PAIR), ("c", CHAT))}
    yield found
    for spec in found.values():
        runner_of(spec).close()


def spec_of(name: str, task: TaskConfig, model: Path = MODEL, **changes: Any) -> TaskSpec:
    job = Job(model=str(model), input=["i"], output="o", task=task, **changes)
    schema = output_schema(job, load_config(model), {})
    return TaskSpec(job=job, model_dir=str(model), schema=schema, run_id="likely", name=name)


def read(rows: Sequence[dict[str, Any]]) -> pa.Table:
    lines = pa.array([json.dumps(row).encode() for row in rows], pa.binary())
    file = InputFile(path="rows.jsonl", name="rows.jsonl", size=1, stamp="1")
    return unit_table(pa.table({LINE: lines}), 0, file, 0, {})


def scored(
    spec: TaskSpec, rows: Sequence[dict[str, Any]], config: EngineConfig = TORCH
) -> tuple[list[dict[str, Any]], list[Completion]]:
    table = render_unit(spec, read(rows))
    engine, requests = build_engine(config), to_requests(table)
    done: dict[str, Completion] = {}
    for request in requests:  # one after the other, so that the cache has what came before
        engine.submit([request])
        while engine.has_work():
            done |= {each.id: each for each in engine.step()}
    engine.close()
    completions = [done[request.id] for request in requests]
    return parse_unit(spec, with_completions(table, completions)).to_pylist(), completions


def oracle(ids: Sequence[int], start: int) -> float:
    with torch.no_grad():
        found = load_oracle(MODEL)(torch.tensor([list(ids)])).logits[0].double().log_softmax(-1)
    return sum(float(found[place - 1, ids[place]]) for place in range(start, len(ids)))


def assert_scored(row: dict[str, Any], ids: Sequence[int], start: int) -> None:
    assert row["status"] == "ok", row["error_message"]
    assert row["num_tokens"] == len(ids) - start
    assert row["logprob"] == pytest.approx(oracle(ids, start), abs=1e-4)
    assert row["perplexity"] == pytest.approx(math.exp(-row["logprob"] / row["num_tokens"]))


def test_a_text_is_scored_from_its_second_token_on(specs: dict[str, TaskSpec]) -> None:
    texts = [LONG, "no", LONG * 30]
    rows, _ = scored(specs["t"], [{"text": text} for text in texts])
    encode = Tokenizer.from_dir(str(MODEL)).encode_raw
    for row, text in zip(rows, texts, strict=True):
        assert_scored(row, encode(text), 1)


def test_a_completion_is_scored_after_its_prompt_which_is_computed_once(
    specs: dict[str, TaskSpec],
) -> None:
    answers = ["It left today.", " It left today.", "1"]
    rows, done = scored(specs["p"], [{"text": LONG, "answer": answer} for answer in answers])
    encode = Tokenizer.from_dir(str(MODEL)).encode_raw
    prompt = encode(LONG)
    for row, answer in zip(rows, answers, strict=True):
        whole = encode(LONG + answer)
        shared = next(
            (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt)
        )
        assert_scored(row, whole, shared)  # a token across the seam is the completion's
    assert all(each.cached_tokens >= len(prompt) - 8 for each in done[1:])


def test_a_completion_may_answer_a_conversation(specs: dict[str, TaskSpec]) -> None:
    ((row,), _) = scored(specs["c"], [{"text": LONG, "answer": "Soon."}])
    chat = Chat.from_dir(str(MODEL))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": LONG}]
    prompt, answer = chat.prompt_ids(messages), chat.answer_ids("Soon.")
    assert_scored(row, [*prompt, *answer], len(prompt))
    assert runner_of(specs["c"]).preview({"text": "a", "answer": "b"}).endswith("b")


def test_special_tokens_before_a_text_are_not_scored_but_its_first_token_is(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "prefixed", "glm4_chat")  # writes [gMASK]<sop>
    (folder / "config.json").write_text((MODEL / "config.json").read_text())
    for task, rows in ((TEXT, {"text": "ab"}), (PAIR, {"text": "a", "answer": "b"})):
        spec = spec_of(task.completion or "text", task, folder)
        (request,) = to_requests(render_unit(spec, read([rows])))
        ids = Tokenizer.from_dir(str(folder)).encode_raw("ab")
        assert list(request.input_ids) == ids
        assert request.work == Score(start=2 if task is TEXT else len(ids) - 1)
        runner_of(spec).close()


def test_rows_that_cannot_be_scored(specs: dict[str, TaskSpec]) -> None:
    table = render_unit(specs["t"], read([{"text": "."}, {"text": None}, {"text": "x " * 9000}]))
    assert table["error_code"].to_pylist() == ["nothing_to_score", "null_prompt", "prompt_too_long"]
    answers = [None, "", 5, "y " * 9000]
    table = render_unit(specs["p"], read([{"text": "a", "answer": each} for each in answers]))
    codes = ["null_prompt", "empty_text", None, "prompt_too_long"]
    assert table["error_code"].to_pylist() == codes
    table = render_unit(specs["c"], read([{"text": "a", "answer": " "}]))
    assert table["error_code"].to_pylist() == ["bad_completion"]


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        (Completion(id="k", finish_reason="abort"), "aborted"),
        (Completion(id="k", finish_reason="scored"), "not_scored"),
    ],
)
def test_answers_of_no_use(specs: dict[str, TaskSpec], completion: Completion, code: str) -> None:
    assert runner_of(specs["t"]).columns({}, [completion])["error_code"] == code


def test_a_dry_run_answers_too() -> None:
    spec = spec_of("dry", PAIR, engine=EngineSection(kind="echo"))
    config = EngineConfig(model=str(MODEL), kind="echo")
    (row,), _ = scored(spec, [{"text": LONG, "answer": "Soon."}], config)
    assert row["logprob"] == -row["num_tokens"]
    assert row["perplexity"] == pytest.approx(math.e)
    runner_of(spec).close()


def test_a_conversation_needs_a_completion() -> None:
    for changes in ({"system": "x"}, {"prompt": None, "messages": "chat"}, {"image": "i"}):
        job = Job(model="", input=[], output="", task=replace(TEXT, **changes))
        ((key, message),) = TASKS["loglikelihood"].problems(job)
        assert key == "task.completion"
        assert "name the column" in message
    assert not list(TASKS["loglikelihood"].problems(Job(model="", input=[], output="", task=CHAT)))
