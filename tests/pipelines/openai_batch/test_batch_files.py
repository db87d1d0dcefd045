"""OpenAI batch files: a record for every line whatever is in it, and the two files that OpenAI
would give.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai.types import BatchError, Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion

from glm_batch.models.errors import ConfigError, RowError
from glm_batch.models.request_limits import RequestLimits
from glm_batch.pipelines import run
from glm_batch.pipelines.graph.steps import orders
from glm_batch.pipelines.job import CommitSection, RequestsSection, StorageSection, job_file
from glm_batch.pipelines.openai_batch.answer_files import EXPORT, is_exported
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.state import status_of
from glm_batch.pipelines.planning.plan import HEAVY_UNIT_BYTES, make_plan, survey_input
from glm_batch.pipelines.runs.prepared import prepare
from glm_batch.pipelines.runs.retry_run import retry_failed
from glm_batch.pipelines.tasks.task_runner import ReadRow
from tests.pipelines.openai_batch.batch_files import (
    Json,
    LocalStages,
    answer_all,
    exported,
    line,
    make_job,
    write_lines,
)
from tests.s3_faults import new_bucket, proxy

ROOT = Path(__file__).parents[3]
CHAT, COMPLETIONS, EMBEDDINGS, SCORE = (
    f"/v1/{name}" for name in ("chat/completions", "completions", "embeddings", "score")
)
NUM_MANY = 50_000


def chat(custom_id: Any, model: str, text: str = "Which shape is this?", **more: Any) -> Json:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 8,
        **more,
    }
    return line(custom_id, CHAT, body)


@pytest.fixture
def model(echo_checkpoint: Path) -> str:
    return echo_checkpoint.name


# ---- what comes out


def test_lines_of_all_endpoints_come_out_in_the_clients_form(
    echo_checkpoint: Path, tmp_path: Path, model: str
) -> None:
    lines = [
        chat("a", model),
        line(
            "b",
            COMPLETIONS,
            {"model": model, "prompt": ["one", "two", "three"], "n": 2, "max_tokens": 3},
        ),
        line("c", EMBEDDINGS, {"model": model, "input": ["x", "y", "z"]}),
        line("d", SCORE, {"model": model, "prompt": "Which?", "labels": ["circle", "square"]}),
        line("e", EMBEDDINGS, {"model": model, "input": [1, 2, 3]}, priority=7),
    ]
    write_lines(tmp_path / "requests.jsonl", lines)
    job = make_job(echo_checkpoint, tmp_path, commit=CommitSection(unit_rows=2))
    good, bad = answer_all(job)
    assert bad == []
    assert [each["custom_id"] for each in good] == ["a", "b", "c", "d", "e"]
    assert all(
        set(each) == {"id", "custom_id", "response", "error"} and each["error"] is None
        for each in good
    )
    assert all(set(each["response"]) == {"status_code", "request_id", "body"} for each in good)
    assert {each["response"]["status_code"] for each in good} == {200}
    assert (
        len({each["id"] for each in good})
        == len({each["response"]["request_id"] for each in good})
        == 5
    )
    bodies = [each["response"]["body"] for each in good]
    assert ChatCompletion.model_validate(bodies[0]).choices[0].message.content
    completion = Completion.model_validate(bodies[1])
    assert [choice.index for choice in completion.choices] == list(range(6))
    assert len({choice.text for choice in completion.choices[::2]}) == 3
    assert [each.index for each in CreateEmbeddingResponse.model_validate(bodies[2]).data] == [
        0,
        1,
        2,
    ]
    assert bodies[3]["label"] in ("circle", "square")
    (table,) = [
        part for part in Output.at(job.output).iter_tables() if "b" in part["row_key"].to_pylist()
    ]
    row = table.to_pylist()[1]
    assert (row["status"], row["status_code"], row["url"], row["line"]) == (
        "ok",
        200,
        COMPLETIONS,
        2,
    )
    assert json.loads(row["response"]) == bodies[1]
    assert row["prompt_tokens"] == bodies[1]["usage"]["prompt_tokens"]


def test_every_kind_of_bad_line_is_told_and_none_is_lost(
    echo_checkpoint: Path, tmp_path: Path, model: str
) -> None:
    good = chat("good", model)
    body = good["body"]
    bad_schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "no"}}}
    lines: list[tuple[Json | str, str | None, int | None, str]] = [
        ("{", None, None, "bad_json"),
        ('"text"', None, None, "bad_json"),
        ("[" * 100_000, None, None, "bad_json"),
        ({**good, "custom_id": None}, None, None, "missing_custom_id"),
        ({"method": "POST", "url": CHAT, "body": body}, None, None, "missing_custom_id"),
        ({**good, "custom_id": 5}, None, None, "bad_custom_id"),
        ({**good, "custom_id": ""}, None, None, "bad_custom_id"),
        ({**good, "custom_id": "\ud800"}, None, None, "bad_custom_id"),
        (good, "good", None, "duplicate_custom_id"),
        ({**good, "custom_id": "m1", "method": "GET"}, "m1", 400, "invalid_value"),
        ({"custom_id": "m2", "url": CHAT, "body": body}, "m2", 400, "invalid_value"),
        (line("u1", "/v1/models", {}), "u1", 400, "invalid_value"),
        (line("u2", "/tokenize", {"model": model, "prompt": "x"}), "u2", 400, "invalid_value"),
        (line("u3", ["x"], body), "u3", 400, "invalid_value"),  # type: ignore[arg-type]
        (line("b1", CHAT, None), "b1", 400, "invalid_json"),
        (line("b2", CHAT, "text"), "b2", 400, "invalid_json"),
        (line("b3", CHAT, {"model": model}), "b3", 400, "invalid_value"),
        (chat("b4", model, unknown=1), "b4", 400, "invalid_value"),
        (chat("b5", model, stream=True), "b5", 400, "invalid_value"),
        (chat("b6", "gpt-9"), "b6", 404, "model_not_found"),
        (chat("b7", model, metadata=json.loads('{"a":' * 700 + "1" + "}" * 700)), "b7", 400, "invalid_value"),
        (chat("b8", model, "x" * 9000), "b8", 413, "body_too_large"),
        (chat("b9", model, response_format=bad_schema), "b9", 400, "invalid_constraint"),
        (line("b10", "/v1/classify", {"model": model, "input": ["x", "y"]}), "b10", 0, ""),
    ]  # fmt: skip
    texts: list[Json | str] = [good, "", *(each for each, *_ in lines), "\r", chat("last", model)]
    write_lines(tmp_path / "requests.jsonl", texts)
    with (tmp_path / "requests.jsonl").open("ab") as stream:
        stream.write(b'{"custom_id": "\xff"}\n')
    limits = RequestsSection(limits=RequestLimits(max_body_bytes=8000))
    job = make_job(echo_checkpoint, tmp_path, requests=limits, commit=CommitSection(unit_rows=4))
    answered, refused = answer_all(job)
    # The echo engine classifies with any checkpoint.
    assert [each["custom_id"] for each in answered] == ["good", "b10", "last"]
    expected = [(id, status, code) for _, id, status, code in lines if code] + [
        (None, None, "not_utf8")
    ]
    told = []
    for each in refused:
        status = each["response"] and each["response"]["status_code"]
        error = each["error"] or each["response"]["body"]["error"]
        told.append((each["custom_id"], status, error["code"]))
        assert error["message"]
        assert each["response"] is None or each["error"] is None
    assert told == expected
    for each, number in zip(refused[:9], range(3, 12), strict=True):
        assert BatchError.model_validate(each["error"]).line == number
    assert refused[-1]["error"]["line"] == len(texts) + 1
    assert "row " + str(tmp_path) in refused[8]["error"]["message"]
    summary = status_of(Output.at(job.output)).counts
    assert (summary.rows, summary.ok, summary.error_rows) == (len(lines) + 3, 3, len(refused))


def test_a_row_that_is_lost_on_the_way_is_the_servers_fault(
    echo_checkpoint: Path, tmp_path: Path, model: str
) -> None:
    write_lines(
        tmp_path / "requests.jsonl", [line("a", EMBEDDINGS, {"model": model, "input": ["x", "y"]})]
    )
    prepared = prepare(make_job(echo_checkpoint, tmp_path), None)
    stages = LocalStages(prepared.spec)
    (order,) = orders(prepared.plan, list(prepared.plan.units()))
    (row,) = stages.rows(order, lambda table: RowError("worker_died", "it died twice")).to_pylist()
    stages.close()
    assert (row["row_key"], row["status"], row["status_code"]) == ("a", "error", 500)
    assert json.loads(row["response"])["error"] == {
        "message": "it died twice", "type": "server_error", "param": None, "code": "worker_died",
    }  # fmt: skip


def test_names_of_the_model_and_seeds(echo_checkpoint: Path, tmp_path: Path) -> None:
    write_lines(
        tmp_path / "requests.jsonl",
        [chat(name, name) for name in ("gpt-4", echo_checkpoint.name, "other")],
    )
    job = make_job(echo_checkpoint, tmp_path, requests=RequestsSection(models=["gpt-4"]))
    good, bad = answer_all(job)
    assert [each["response"]["body"]["model"] for each in good] == ["gpt-4", echo_checkpoint.name]
    assert "gpt-4" in bad[0]["response"]["body"]["error"]["message"]
    from glm_batch.pipelines.openai_batch.requests import RequestRunner

    drawn = []
    for seed in (0, 0, 1):
        runner = RequestRunner(replace(job, sampling=replace(job.sampling, seed=seed)), job.model)
        rows = [ReadRow(name=name, row=chat(name, "gpt-4"), size=10) for name in ("a", "b")]
        asked = list(runner.ask(rows))
        drawn.append([each.requests[0].work.sampling.seed for each in asked])  # type: ignore[union-attr]
        runner.close()
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][0] != drawn[0][1]


# ---- jobs that cannot be


def test_parquet_is_no_batch_file_and_rows_need_a_task(
    echo_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    job = replace(make_job(echo_checkpoint, tmp_path), input=[str(tmp_path / "a.parquet")])
    with pytest.raises(ConfigError, match=r"a\.parquet is no JSONL"):
        prepare(job, None)
    write_lines(tmp_path / "requests.jsonl", ["{}"])
    with pytest.raises(ConfigError, match="task: it is missing"):
        prepare(replace(make_job(echo_checkpoint, tmp_path), input_format="rows"), None)


# ---- units


def test_units_are_as_small_as_heavy_lines_need(
    echo_checkpoint: Path, tmp_path: Path, model: str
) -> None:
    """Also where the heavy ones stand together behind many light ones."""
    heavy = "x" * (HEAVY_UNIT_BYTES // 8)
    lines = [
        *(chat(f"light{n}", model) for n in range(2000)),
        *(chat(f"heavy{n}", model, heavy) for n in range(24)),
    ]
    write_lines(tmp_path / "requests.jsonl", lines)
    job = make_job(echo_checkpoint, tmp_path)
    plan = make_plan(job, survey_input(job), {})
    offsets = plan.files[0].offsets
    assert plan.num_rows == 2024
    assert max(stop - start for start, stop in pairwise(offsets)) <= HEAVY_UNIT_BYTES
    assert 4 <= plan.unit_rows < 16
    vectors = [line(str(n), EMBEDDINGS, {"model": model, "input": ["x"] * 2000}) for n in range(40)]
    write_lines(tmp_path / "requests.jsonl", vectors)
    plan = make_plan(job, survey_input(job), {})
    assert plan.unit_rows == 16
    wide = RequestsSection(limits=RequestLimits(max_inputs=10_000))
    assert make_plan(replace(job, requests=wide), survey_input(job), {}).unit_rows == plan.unit_rows


# ---- crashes and retries


@pytest.mark.parametrize(
    "aim",
    [
        "after_manifest",
        "before_export",
        "before_rename:8",
        "before_rename:9",
        "after_export",
        "before_rename:10",
    ],
)
def test_a_kill_between_the_manifest_and_the_files_costs_a_rerun(
    echo_checkpoint: Path, tmp_path: Path, model: str, aim: str
) -> None:
    lines = [chat("a", model), "{", line("b", EMBEDDINGS, {"model": model, "input": ["x", "y"]})]
    write_lines(tmp_path / "requests.jsonl", lines)
    job = make_job(echo_checkpoint, tmp_path)
    (tmp_path / "job.json").write_bytes(job_file(job))
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "GLM_BATCH_CRASH_AT": aim}
    driver = [
        sys.executable,
        "-m",
        "tests.pipelines.openai_batch.batch_files",
        str(tmp_path / "job.json"),
    ]
    done = subprocess.run(driver, cwd=ROOT, env=environment, check=False, timeout=240)
    assert done.returncode == -signal.SIGKILL
    output = Output.at(job.output)
    manifest = output.manifest()
    assert not is_exported(output, manifest)
    parts = {path: path.read_bytes() for path in Path(job.output).glob("parts/*")}
    result = run(job)
    assert result.summary.notes == ("2 lines in output.jsonl, 1 lines in errors.jsonl",)
    assert is_exported(output, manifest)
    assert {path: path.read_bytes() for path in Path(job.output).glob("parts/*")} == parts
    first = exported(job)
    assert ([each["custom_id"] for each in first[0]], first[1][0]["error"]["line"]) == (
        ["a", "b"],
        2,
    )
    (Path(job.output) / "output.jsonl").unlink()
    run(job)
    assert exported(job) == first


@pytest.mark.usefixtures("ray_cluster")
def test_a_whole_job_and_a_retry_of_what_failed(
    echo_checkpoint: Path, tmp_path: Path, model: str
) -> None:
    lines = [chat(f"r{n}", "later" if n % 5 == 0 else model) for n in range(23)]
    lines += [line("v", EMBEDDINGS, {"model": model, "input": ["x", "y"]}), chat("r1", model)]
    write_lines(tmp_path / "requests.jsonl", lines)
    job = make_job(echo_checkpoint, tmp_path, commit=CommitSection(unit_rows=4))
    summary = run(job).summary
    assert summary.counts.errors == {"model_not_found": 5, "duplicate_custom_id": 1}
    good, bad = exported(job)
    assert [each["custom_id"] for each in good] == [f"r{n}" for n in range(23) if n % 5] + ["v"]
    assert [each["custom_id"] for each in bad] == ["r0", "r5", "r10", "r15", "r20", "r1"]
    again = replace(job, requests=RequestsSection(models=["later"]))
    retry_failed(again, Output.at(job.output), ["model_not_found"])
    answered, refused = exported(job)
    assert [each["custom_id"] for each in answered] == [f"r{n}" for n in range(23)] + ["v"]
    assert [each["error"]["code"] for each in refused] == ["duplicate_custom_id"]
    known = {each["custom_id"]: each for each in answered}
    assert all(known[each["custom_id"]] == each for each in good)
    counts = status_of(Output.at(job.output)).counts
    assert (counts.rows, counts.ok, counts.errors) == (25, 24, {"duplicate_custom_id": 1})


# ---- stores and sizes


def test_the_files_lie_on_s3_too(
    echo_checkpoint: Path,
    tmp_path: Path,
    model: str,
    s3_server: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where they are too large for one call, and the store fails one in ten."""
    monkeypatch.setattr("glm_batch.pipelines.storage.s3.PART_BYTES", 5 << 20)
    write_lines(tmp_path / "requests.jsonl", [chat(str(n), model) for n in range(5)])
    local = make_job(echo_checkpoint, tmp_path)
    lines = answer_all(local)
    storage = StorageSection(endpoint_url=s3_server)
    remote = replace(local, output=f"s3://{new_bucket(s3_server)}/out", storage=storage)
    answered, refused = answer_all(remote)
    assert ([each["custom_id"] for each in answered], refused) == (
        [each["custom_id"] for each in lines[0]],
        [],
    )
    with proxy(s3_server, seed=3, one_in=10, stall_s=0.05) as faulty:
        output = Output.at(remote.output, StorageSection(endpoint_url=faulty.url))
        big = os.urandom(1 << 20)
        with output.store.replacing("big") as stream:
            for _ in range(13):
                stream.write(big)
        assert output.store.read("big") == big * 13
        with pytest.raises(TypeError), output.store.replacing("big") as stream:
            stream.write(big * 6 + None)  # type: ignore[operator]
        assert output.store.size("big") == 13 << 20
    assert faulty.faults


def many_lines(model: str) -> Iterator[Json | str]:
    for n in range(NUM_MANY):
        # 2 KB each, of which nothing is computed: the job's own bookkeeping is what shall show.
        body = {"model": model, "prompt": [5, 6, 7 + n % 90], "max_tokens": 4, "user": "x" * 2000}
        yield line(f"request-{n}", COMPLETIONS, body if n % 100 else {**body, "unknown": 1})


@pytest.mark.usefixtures("ray_cluster")
def test_many_lines_need_no_memory_of_the_driver(
    echo_checkpoint: Path, tmp_path: Path, model: str
) -> None:
    (tmp_path / "small").mkdir()
    write_lines(tmp_path / "small" / "requests.jsonl", [chat("a", model)])
    run(make_job(echo_checkpoint, tmp_path / "small"))  # what is imported and started once
    write_lines(tmp_path / "requests.jsonl", many_lines(model))
    assert (tmp_path / "requests.jsonl").stat().st_size > 100 << 20
    job = make_job(echo_checkpoint, tmp_path, commit=CommitSection(unit_rows=500))
    before = psutil.Process().memory_info().rss
    summary = run(job).summary
    grown = psutil.Process().memory_info().rss - before
    assert summary.counts.errors == {"invalid_value": NUM_MANY // 100}
    assert grown < 64 << 20, grown
    with (tmp_path / "out" / "output.jsonl").open() as stream:
        expected = (n for n in range(NUM_MANY) if n % 100)
        for number, text in zip(expected, stream, strict=True):
            assert text.startswith('{"id":"batch_req_')
            assert f'"custom_id":"request-{number}","response":{{"status_code":200' in text
    assert (
        json.loads((tmp_path / "out" / EXPORT).read_bytes())["files"]["errors.jsonl"]["lines"]
        == NUM_MANY // 100
    )
