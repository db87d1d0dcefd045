"""What `glm-batch demo` refuses; tests/packaging runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm_batch.jobs.demo.demo import demo
from glm_batch.models.errors import ConfigError


def test_somebody_elses_examples_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "examples").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="not glm-batch's"):
        demo([])
    assert list((tmp_path / "examples").iterdir()) == []


def test_unknown_demos_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no demo is called rout; known: route, "):
        demo(["rout"])
