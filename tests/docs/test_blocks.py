"""Every block of the manual and the README is what it says: YAML is read by its reader, commands
and their options exist, quick ones run, Python compiles.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from PIL import Image

import glm_batch
from glm_batch.jobs.__main__ import app
from glm_batch.jobs.checks.checks import check_keys
from glm_batch.jobs.files.sections import load_job
from glm_batch.jobs.serving.serve_config import load_settings
from glm_batch.jobs.sweep.sweep_config import load_sweep
from tests.docs.pages import ROOT, Block, blocks

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
REQUIRED = {
    "model": "examples/tiny_glm",
    "input": ["rows.parquet"],
    "output": "out/rows",
    "task": {"kind": "choose", "prompt": "{text}", "labels": ["a", "b"], "image": "photo"},
}
OTHER_PROGRAMS = {"git", "cd", "export", "lm_eval"}
SHELL = blocks("bash")


def test_blocks_are_found() -> None:
    assert len(SHELL) > 20
    assert any(block.mark == "run" for block in SHELL)


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_is_read_by_what_it_is_for(block: Block, tmp_path: Path) -> None:
    data = yaml.safe_load(block.body)
    path = tmp_path / "block.yaml"
    path.write_text(block.body)
    if block.title:
        assert (ROOT / block.title).read_text() == block.body
    if "datasets" in data:
        load_sweep(str(path))
    elif "models" in data:
        load_settings(str(path))
    else:
        base = {
            key: value
            for key, value in REQUIRED.items()
            if not (key == "task" and data.get("input_format") == "openai_batch")
        }
        path.write_text(yaml.safe_dump(base | data))
        job, _ = load_job(str(path))
        if job.media.root:
            job = replace(job, media=replace(job.media, root=str(tmp_path)))
        assert list(check_keys(job)) == []


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_exist(block: Block) -> None:
    for words in _commands(block):
        _check(words, block)


def _commands(block: Block) -> list[list[str]]:
    lines = block.body.replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines if "<this" not in line]
    return [_without_variables(words) for words in found if words]


def _without_variables(words: list[str]) -> list[str]:
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words


def _check(words: list[str], block: Block) -> None:
    match words:
        case ["glm-batch", name, *arguments]:
            _check_arguments(name, arguments)
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
        case ["python", "-m", "pytest", *arguments]:
            assert all((ROOT / path).exists() for path in arguments if path.startswith("tests/"))
        case ["python", "-m", module, *_]:
            assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
        case ["serve", "run", place, *_]:
            module, _, name = place.partition(":")
            source = (ROOT / "src" / (module.replace(".", "/") + ".py")).read_text()
            assert f"def {name}(" in source
        case ["pip", "install", what]:
            assert what.startswith(("glm-batch", "./glm_batch-"))
        case _:
            assert words[0] in OTHER_PROGRAMS, f"{block}: what is {words[0]}?"


def _check_arguments(name: str, words: list[str]) -> None:
    command = COMMANDS[name]
    options = {opt: each for each in command.params for opt in each.opts if opt.startswith("-")}
    positional = []
    rest = iter(words)
    for word in rest:
        if word.startswith("-"):
            option = options[word]
            for _ in range(0 if option.is_flag else option.nargs):
                next(rest)
        else:
            positional.append(word)
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    assert sum(each.required for each in arguments) <= len(positional) <= len(arguments)
    if positional and positional[0].startswith("examples/"):
        assert (ROOT / positional[0]).exists(), positional[0]


@pytest.mark.parametrize("block", [each for each in SHELL if each.mark == "run"], ids=str)
def test_quick_commands_run(block: Block) -> None:
    for words in _commands(block):
        assert words[0] == "glm-batch"
        command = [sys.executable, "-m", "glm_batch.jobs", *words[1:]]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_compiles_and_names_what_there_is(block: Block) -> None:
    for node in ast.walk(ast.parse(block.body)):
        if isinstance(node, ast.ImportFrom) and node.module == "glm_batch":
            assert {alias.name for alias in node.names} <= set(glm_batch.__all__)


def test_the_python_door_runs_as_shown(tmp_path: Path) -> None:
    block = next(each for each in blocks("python") if "glm_batch.load" in each.body)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    Image.new("RGB", (56, 56), "red").save(tmp_path / "cat.jpg")
    done = subprocess.run(
        [sys.executable, "-c", block.body],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
