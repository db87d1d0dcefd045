"""One reader for job files, sweeps and serve configurations: each message in all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from glm_batch.jobs.files.sections import load_sections
from glm_batch.models.engine.api.request import SamplingParams
from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.job import TaskConfig


@dataclass(frozen=True, kw_only=True)
class Entry:
    task: TaskConfig
    sampling: dict[str, SamplingParams] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class File:
    tasks: dict[str, Entry]
    confidence: float = 0.95


GOOD = """\
tasks:
  team:
    task: {kind: choose, labels: [red, green]}
"""


def load(tmp_path: Path, text: str, *overrides: str) -> File:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    return load_sections(File, str(path), "a file is a mapping", overrides)[0]


def test_a_text_is_set_as_it_stands_in_a_section_that_the_user_named(tmp_path: Path) -> None:
    file = load(tmp_path, GOOD, "tasks.team.task.prompt={text}?", "confidence=0.9")
    assert file.tasks["team"].task.prompt == "{text}?"
    assert file.confidence == 0.9


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            "    sampling: {hot: {top_p: 2.0}}",
            "yaml:4: tasks.team.sampling.hot.top_p: it is 2.0, but it must be in (0, 1]",
        ),
        ("    sampling: {hot: {topp: 1}}", "hot.topp: unknown key; did you mean tasks.team.sam"),
        ("    confidenc: 1", "tasks.team.confidenc: unknown key; did you mean confidence?"),
        ("    zzz: 1", "tasks.team.zzz: unknown key; known here: task, sampling"),
        ("    sampling: {hot: {stop: [a, 3]}}", "hot.stop: item 2 of it is 3, but it must be a li"),
        ("    sampling: {hot: {seed: null}}", "give it a value, or remove the line for the def"),
        ("  other: {}", "tasks.other.task: the key is missing, and it has no default"),
        ("confidence: 2024-01-01", "confidence: YAML reads 2024-01-01 as a date: put it in quo"),
    ],
)
def test_messages_below_names_of_the_users(tmp_path: Path, more: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, GOOD + more + "\n")
    assert said in str(caught.value)
