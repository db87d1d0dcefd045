"""The plan's arithmetic against values worked out by hand, and its text."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_batch.jobs.checks.checks import check_job
from glm_batch.jobs.files.sections import load_job
from glm_batch.jobs.plans.cluster_plan import cluster_lines
from glm_batch.jobs.plans.job_plan import (
    estimate_job,
    excerpt,
    measure_gemm,
    plan,
    shared_prefix_share,
    take_sample,
)
from glm_batch.models.checkpoint.config_reader import load_config
from glm_batch.models.engine.api.request import Choose, Embed, Generate, SamplingParams, Score
from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.planning.plan import make_plan
from glm_batch.pipelines.tasks.task_runner import TaskRunner


def test_shared_prefix_share_counts_what_a_neighbour_has_already() -> None:
    assert shared_prefix_share([[1, 2, 3, 4], [1, 2, 9], [7]]) == 2 / 8
    assert shared_prefix_share([[1, 2], [1, 2]]) == 0.5
    assert shared_prefix_share([[1]]) == 0.0


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=12))
def test_shared_prefix_share_equals_a_trie(prompts: list[list[int]]) -> None:
    nodes = {tuple(prompt[:end]) for prompt in prompts for end in range(1, len(prompt) + 1)}
    total = sum(map(len, prompts))
    assert shared_prefix_share(prompts) == pytest.approx(1 - len(nodes) / total)
    assert len(list(pairwise(prompts))) == len(prompts) - 1


def test_the_estimate_counts_weights_attention_and_projection(work: Any) -> None:
    config = load_config("model")
    layer_weights = config.num_parameters - 2 * 320 * 8
    per_token = 2 * layer_weights + 4 * 2 * 4 * 10 / 2  # one layer, 2 heads of width 4, 10 tokens
    embed = estimate_job(config, [Embed()], [10, 10], 0.0, 100)
    assert (embed.prompt_tokens, embed.computed_prompt_tokens, embed.output_tokens) == (
        1000,
        1000,
        0,
    )
    assert embed.flops == pytest.approx(100 * 10 * per_token)
    half = estimate_job(
        config, [Generate(sampling=SamplingParams(max_tokens=6, n=2))], [10], 0.5, 1
    )
    assert (half.computed_prompt_tokens, half.output_tokens) == (5, 12)
    assert half.flops == pytest.approx(17 * per_token + 2 * 320 * 8 * 13)
    tree = estimate_job(config, [Choose(choices=((1, 2), (1, 3), (4,)))], [10], 0.0, 1)
    assert tree.output_tokens == 4  # 1, 2, 3, 4: the shared beginning once
    scored = estimate_job(config, [Score()], [10, 10], 0.0, 100)  # reads all positions
    assert scored.flops == pytest.approx(100 * 10 * (per_token + 2 * 320 * 8))


def test_the_sample_holds_good_rows_and_typed_errors(work: Any) -> None:
    job, place = load_job(work.write_job().name)
    checked = check_job(job, place)
    assert isinstance(checked.runner, TaskRunner)
    sample = take_sample(checked, make_plan(job, checked.survey, {}))
    assert sample.rows == 8
    assert len(sample.ids) == 4
    assert [error.code for _, error in sample.errors] == [
        "null_prompt",
        "empty_text",
        "prompt_too_long",
        "bad_json",
    ]
    assert sample.errors[-1][0] == "data/b.jsonl, row 2"
    assert [where for where, _ in sample.prompts] == [
        "data/a.parquet, row 0",
        "data/b.jsonl, row 0",
        "data/b.jsonl, row 1",
    ]


def test_plan_prints_files_prompts_tokens_and_errors(
    work: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(work.write_job().name, [])
    text = capsys.readouterr().out
    for part in (
        "data/a.parquet", "<|user|>", "Team? hello<|assistant|>", "8 in 2 units", "prompt_too_long",
        "min ", "median ", "p95 ", "repeat the beginning", "red (", "the end of a label is not counted",
        "the echo engine computes nothing",
    ):  # fmt: skip
        assert part in text, part
    assert not Path("out").exists()


def test_plan_of_an_openai_batch_file(work: Any, capsys: pytest.CaptureFixture[str]) -> None:
    body = {"model": "model", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
    lines = [
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body},
        {
            "custom_id": "a",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {**body, "model": "other"},
        },
        {
            "custom_id": "b",
            "method": "POST",
            "url": "/v1/embeddings",
            "body": {"model": "model", "input": ["x", "y"]},
        },
    ]
    Path("requests.jsonl").write_text("\n" + "".join(json.dumps(line) + "\n" for line in lines))

    def change(job: dict[str, Any]) -> None:
        for key in ("task", "key", "carry"):
            job.pop(key)
        job.update(input=["requests.jsonl"], input_format="openai_batch")

    plan(work.write_job(change).name, [])
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "requests.jsonl, line 2, /v1/chat/completions", "<|user|> │ │ hello<|assistant|>", "3 in 1 units",
        "each line is a request of its own, to a model named model", "out/output.jsonl and errors.jsonl",
        "/v1/chat/completions 1, /v1/embeddings 1", "1 rows of the whole input repeat the key",
        "model_not_found 1; first in requests.jsonl, line 3: there is no model 'other' here", "at most 5 output tokens",
    ):  # fmt: skip
        assert part in text, part


def test_plan_of_a_sample_without_a_good_row(work: Any, capsys: pytest.CaptureFixture[str]) -> None:
    plan(work.write_job(lambda job: job["task"].update(prompt="{text}" + "x" * 500)).name, [])
    assert "none: the sample has no row without an error" in capsys.readouterr().out


def test_plan_for_a_cluster_that_is_not_here(work: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def describe(job: dict[str, Any]) -> None:
        job["cluster"] = {"nodes": 2, "cpus": 64, "gpus": 8}
        job["engine"] = {
            "kind": "torch",
            "device": "cuda",
            "tensor_parallel_size": 2,
            "replicas": [2, 7],
        }

    plan(work.write_job(describe).name, [])
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "2 nodes of 64 cores and 8 GPUs",
        "2 to 7 replicas of 2 ranks, 2 GPUs on one node, 8 threads a rank; 2 GPUs left over",
        "32 preprocessing and 16 committing workers",
        "node 1 4 replicas on 8 of 8 GPUs, 16 preprocessing workers",
        "node 2 3 replicas on 6 of 8 GPUs, 16 preprocessing workers",
        "not estimated",
    ):
        assert part in text, part
    with pytest.raises(ConfigError, match=r"engine.replicas: 9 replicas of 2 GPUs .* room for 8"):
        plan("job.yaml", ["engine.replicas=9"])


def test_plan_of_this_machine(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("glm_batch.jobs.plans.cluster_plan.num_gpus", lambda: 0)
    job, _ = load_job(work.write_job().name)
    assert list(cluster_lines(job)) == [
        ("cluster", "this machine: 1 node of 4 cores and 0 GPUs"),
        (
            "replicas",
            "1 replica of no GPU, 4 threads; 1 preprocessing and 1 committing workers (0.25 logical CPUs each)",
        ),
    ]


def test_an_excerpt_spells_control_characters_and_counts_what_it_leaves_out() -> None:
    assert excerpt("a\x1b[31mb\u202ec\n") == "a\\x1b[31mb\\u202ec\n"
    long = excerpt("x" * 5000)
    assert "[... 3,800 more characters ...]" in long
    assert long.count("x") == 1200


def test_the_measured_rate_is_a_rate() -> None:
    assert measure_gemm(size=64, seconds=0.01) > 1e6


@pytest.mark.parametrize("name", [None, "Ann"])
def test_plan_shows_calls_of_a_history_and_names_what_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str | None
) -> None:
    """Calls and results once vanished from the prompts of rows, but not from those of a batch line."""
    model = Path(__file__).parents[2] / "examples" / "tiny_glm"
    call = {"id": "c1", "type": "function", "function": {"name": "get", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "31 degrees"},
        {"role": "user", "content": "Should I go out?", "name": name},
    ]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "1", "messages": messages}))
    job = f"{{model: {model}, input: [{tmp_path}/rows.jsonl], output: {tmp_path}/out, key: id,"
    (tmp_path / "rows.yaml").write_text(job + " task: {kind: generate, messages: messages}}")
    plan(str(tmp_path / "rows.yaml"), [])
    told = capsys.readouterr().out
    assert '{"a": 1}' in told
    assert "31 degrees" in told
    warned = "name (1 rows) of the messages" in " ".join(told.split())
    assert warned is (name is not None)
    body = {"model": "tiny_glm", "messages": messages, "max_tokens": 4}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (tmp_path / "rows.jsonl").write_text(json.dumps(line))
    (tmp_path / "lines.yaml").write_text(job.replace(" key: id,", "input_format: openai_batch}"))
    plan(str(tmp_path / "lines.yaml"), [])
    shown = [line for line in told.splitlines() if "│" in line]
    assert [line for line in capsys.readouterr().out.splitlines() if "│" in line] == shown


def test_plan_of_log_likelihoods_shows_what_is_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(__file__).parents[2] / "examples" / "tiny_glm"
    rows = [{"q": "Where is it?", "a": " On its way."}, {"q": "Where?", "a": "x " * 9000}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "job.yaml").write_text(
        f"{{model: {model}, input: [{tmp_path}/rows.jsonl], output: {tmp_path}/out,"
        " task: {kind: loglikelihood, prompt: '{q}', completion: a}}"
    )
    plan(str(tmp_path / "job.yaml"), [])
    told = " ".join(capsys.readouterr().out.split())
    for part in (
        "Where is it? On its way.",
        "logprob, num_tokens, perplexity",
        "prompt_too_long 1; first in",
        "row 1: prompt and completion have",
    ):
        assert part in told, part
    with pytest.raises(ConfigError, match=r"task.completion: missing; a conversation is scored"):
        plan(str(tmp_path / "job.yaml"), ["task.system=x", "task.completion=null"])
    with pytest.raises(ConfigError, match=r"task.completion: only loglikelihood takes it"):
        plan(str(tmp_path / "job.yaml"), ["task.kind=embed"])
