"""The reference has every key, column, code and metric, each with a text."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from typing import Any

import pytest
import yaml

from docs import reference_tables as reference
from glm_batch.glm_actors.serving.openai.serve_settings import ServeSettings
from glm_batch.jobs.files.sections import describe, job_keys
from glm_batch.jobs.sweep.sweep_config import SweepFile
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.report.page import ABOUT_CODES

PLAIN = {"host", "port"}  # need no more than their name and type


def rows(table: str) -> dict[str, list[str]]:
    """The rows of all tables in a text by their first cell."""
    cells = [
        re.split(r" (?<!\\)\| ", line.strip("| "))
        for line in table.splitlines()
        if line[:3] == "| `"
    ]
    return {row[0].strip("`"): row[1:] for row in cells}


def test_the_job_file_has_every_key_with_type_and_default() -> None:
    shown = rows(reference.job())
    for key, known in job_keys().items():
        if dataclasses.is_dataclass(known.type) or key.startswith("requests.limits."):
            continue
        kind, default, *_ = shown[key]
        assert kind == describe(known.type)
        wanted = "required" if known.default == "required" else f"`{json.dumps(known.default)}`"
        assert default == wanted, key


def test_the_whole_job_file_has_every_key_with_its_default() -> None:
    shown = yaml.safe_load(reference.job_yaml().strip("`").removeprefix("yaml"))
    for key, known in job_keys().items():
        value = shown
        for part in key.split("."):
            value = value[part]
        if not dataclasses.is_dataclass(known.type) and known.default != "required":
            assert value == (list(known.default) if known.default == () else known.default), key


@pytest.mark.parametrize("owner", [Job, SweepFile, ServeSettings])
def test_every_key_has_a_text(owner: type[Any]) -> None:
    hints = typing.get_type_hints(owner)
    texts = reference.field_texts(owner)
    for field in dataclasses.fields(owner):
        section = hints[field.name]
        if typing.get_origin(section) is dict:
            section = typing.get_args(section)[1]
        if dataclasses.is_dataclass(section) and isinstance(section, type):
            assert section.__doc__
            test_every_key_has_a_text(section)
        elif field.name not in PLAIN:
            assert texts.get(field.name), f"{owner.__name__}.{field.name}: put a comment behind it"


def test_every_code_that_is_raised_has_a_text() -> None:
    raised = reference.raised_codes().keys()
    assert raised - ABOUT_CODES.keys() == set(), "say in ABOUT_CODES what it means and what to do"


@pytest.mark.parametrize("name", reference.TABLES)
def test_every_table_has_rows(name: str) -> None:
    text = reference.on_page_markdown(f"<!-- generated: {name} -->")
    assert text.count("\n") > 4
    assert "| |" not in text.replace("|  |", "")
