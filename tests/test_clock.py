"""A clock that is set back or forth changes no decision: nothing but labels for people comes from
the time of day.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIME_OF_DAY = {  # but for gmtime, which makes the labels
    "time": {"time", "time_ns", "localtime"},
    "datetime": {"now", "utcnow", "today"},
    "date": {"today"},
}
ALLOWED = {
    "models/processing/chat.py",  # templates may write today's date into a prompt
    "glm_actors/serving/openai/work.py",  # OpenAI's answers say when they were made
    # a version is called after the moment in which it began, but always later than the last
    "pipelines/cron/versions.py",
    "jobs/cron/cron.py",  # --until is a time of day
}


def readings(tree: ast.AST) -> Iterator[ast.Attribute]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield from [node] if node.attr in TIME_OF_DAY.get(node.value.id, ()) else []


def test_nothing_decides_by_the_time_of_day() -> None:
    found = {
        str(path.relative_to(ROOT))
        for package in ("models", "glm_actors", "pipelines", "jobs")
        for path in sorted((ROOT / package).rglob("*.py"))
        for _ in readings(ast.parse(path.read_text()))
    }
    assert found == ALLOWED


def test_the_search_would_find_one() -> None:
    assert [
        node.lineno for node in readings(ast.parse("import time\nleft = end - time.time()"))
    ] == [2]
