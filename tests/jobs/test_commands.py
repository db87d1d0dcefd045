"""The commands as processes, on a small input with the echo engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from glm_batch.jobs.__main__ import EXIT_BAD_CONFIG, EXIT_OK, EXIT_ROW_ERRORS


def test_label_status_and_a_rerun(work: Any) -> None:
    path = work.write_job()
    done = work.run("label", path.name, "--set", "max_error_rate=0.5")
    assert done.code == EXIT_OK, done.err
    for part in (
        "rows",
        "8",
        "null_prompt",
        "empty_text",
        "prompt_too_long",
        "bad_json",
        "accuracy",
        "out",
    ):
        assert part in done.out
    assert "starting the workers" in done.err
    assert "Traceback" not in done.err
    rows = [
        row
        for part in json.loads(Path("out/manifest.json").read_text())["parts"]
        for row in read(part["part"])
    ]
    assert sorted(row["row_key"] for row in rows) == [
        "0",
        "1",
        "2",
        "3",
        "4",
        "5",
        "6",
        "data/b.jsonl:2",
    ]
    assert {row["error_code"] for row in rows} == {
        None,
        "null_prompt",
        "empty_text",
        "prompt_too_long",
        "bad_json",
    }

    status = work.run("status", "out")
    assert status.code == EXIT_OK
    assert "finished" in status.out
    assert "8 of 8" in status.out

    again = work.run("label", path.name)
    assert again.code == EXIT_ROW_ERRORS, again.err
    assert "8 of them from an earlier run" in " ".join(again.out.split())
    assert "50.00% of the rows failed" in " ".join(again.out.split())
    assert "ray" not in again.imported  # nothing was left to do

    other = work.run("label", path.name, "--set", "task.prompt={text}?")
    assert other.code == EXIT_BAD_CONFIG
    assert "begun by another job" in other.err
    assert "task.prompt" in other.err


def test_what_a_worker_refuses_is_told_without_its_traceback(work: Any) -> None:
    """Ray's wrapper once put a page of frames in front of the reason."""
    weights = Path("model/model.safetensors")
    tensors = load_file(weights)
    save_file(tensors | {"lm_head.weight": 2 * tensors["lm_head.weight"]}, weights)
    work.write_config(tie_word_embeddings=True)
    done = work.run("label", work.write_job().name, "--set", "engine.kind=torch")
    assert done.code == EXIT_BAD_CONFIG, done.err
    assert "Traceback" not in done.err
    assert "tensor lm_head.weight differs from the one that config.json ties it to" in done.err
    assert len(done.err.splitlines()) < 8


def test_unfit_weights_are_refused_before_anything_starts(work: Any) -> None:
    """They once were when the engine loaded, and an output lay there already."""
    weights = Path("model/model.safetensors")
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.down_proj.qweight"] = tensors.pop(
        "model.layers.0.mlp.down_proj.weight"
    )
    save_file(tensors, weights)
    job = work.write_job().name
    for arguments in (["label", job], ["plan", job], ["inspect", "model"]):
        chosen = [] if arguments[0] == "inspect" else ["--set", "engine.kind=torch"]
        done = work.run(*arguments, *chosen)
        assert done.code == EXIT_BAD_CONFIG, done.err
        assert "a quantised checkpoint (GPTQ or AWQ)" in done.err
        assert "starting the workers" not in done.err
    assert not Path("out").exists()


def read(part: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(Path("out") / part).to_pylist()
    return rows


def test_inspect_names_the_source_of_each_value(work: Any) -> None:
    done = work.run("inspect", "model")
    assert done.code == EXIT_OK
    lines = {line.split()[0]: line.split() for line in done.out.splitlines()}
    assert lines["hidden_size"][1:] == ["8", "config.json"]
    assert lines["rms_norm_eps"][2:] == ["class", "default"]
    assert lines["chat_template"][1:] == ["there", "chat_template.jinja"]
    assert "torch" not in done.imported


@pytest.mark.parametrize(
    ("file", "said"), [("config.json", "config.json"), ("model.safetensors", "no weights")]
)
def test_inspect_refuses_a_broken_checkpoint(work: Any, file: str, said: str) -> None:
    (Path("model") / file).unlink()
    done = work.run("inspect", "model")
    assert done.code == EXIT_BAD_CONFIG
    assert said in done.err


def test_doctor_is_content_with_the_machine_that_runs_the_tests(work: Any) -> None:
    done = work.run("doctor")
    assert done.code == EXIT_OK, done.out
    for part in ("python", "torch", "cpu", "memory", "disk", "ready to run a job"):
        assert part in done.out


def test_help_lists_commands_and_exit_codes(work: Any) -> None:
    done = work.run("--help")
    assert done.code == EXIT_OK
    for part in (
        "plan",
        "label",
        "status",
        "calibrate",
        "retry",
        "gc",
        "inspect",
        "doctor",
        "bad configuration",
    ):
        assert part in done.out
    assert not done.imported & {"ray", "torch", "pyarrow", "pydantic"}
