"""Tests with the mark `browser` run where `-m browser` asks for them, as `make test-report` does."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "browser" in config.getoption("markexpr"):
        return
    asked = [item for item in items if item.get_closest_marker("browser")]
    items[:] = [item for item in items if item not in asked]
    config.hook.pytest_deselected(items=asked)
