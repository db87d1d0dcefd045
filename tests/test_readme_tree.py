"""The tree in the README names every module, and none that is gone."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("models", "glm_actors", "pipelines", "jobs")


def told() -> dict[str, list[str]]:
    """The modules that the README tells of, by package."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "README.md").read_text().partition("## Reading the code")[2].splitlines():
        if head := re.match(r"(\w+)/ ", line):
            found[head[1]] = []
        elif found and (entry := re.match(r"  (\S+\.py) +\S", line)):
            found[list(found)[-1]].append(entry[1])
    return found


def test_the_tree_is_the_code() -> None:
    for package in PACKAGES:
        folder = ROOT / package
        files = {str(path.relative_to(folder)) for path in folder.rglob("*.py")}
        modules = {name for name in files if not name.endswith("__init__.py")}
        named = told()[package]
        assert set(named) - {"__init__.py"} == modules
        assert len(named) == len(set(named))
