"""Optional rooms: the table is true, the core imports none of them, and what is gone is said."""

from __future__ import annotations

import ast
import importlib.util
from collections import defaultdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from glm_batch.models import rooms
from glm_batch.models.errors import ConfigError
from tests.test_imports import FILES, MODULES, ROOT, imported_names


def owner(path: Path) -> str:
    """The optional room that a file lies in, or `core`."""
    try:
        return rooms.room_of(path.with_suffix("").as_posix())
    except KeyError:
        return "core"


def loaded_by_name(path: Path) -> list[str]:
    """What a file says to `rooms.load`, in a text or by the name of one."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    named = {
        ast.unparse(node.targets[0]): node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
    }
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "rooms.load"
    ]
    told = [call.args[0] for call in calls]
    return [ast.literal_eval(named.get(ast.unparse(each), each)) for each in told]


def test_optional_rooms_are_imported_by_those_alone_that_need_them() -> None:
    arrows: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in FILES:
        for name in imported_names(path):
            if name in MODULES and owner(path) != (other := owner(MODULES[name])) != "core":
                arrows[owner(path), other].append(f"{path} imports {name}")
    for (one, other), places in arrows.items():
        needed = one != "core" and other in rooms.ROOMS[one].needs
        assert needed, places


def test_every_folder_of_an_optional_room_is_there_and_every_name_leads_to_a_module() -> None:
    for name, room in rooms.ROOMS.items():
        assert rooms.is_here(name)
        assert all((ROOT / folder).is_dir() for folder in room.folders)
    for module in [module for path in FILES for module in loaded_by_name(path)]:
        assert rooms.room_of(module) in rooms.ROOMS
        assert importlib.util.find_spec(f"glm_batch.{module}"), module


def test_what_was_taken_away_is_said_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glm_batch.jobs.__main__ import app

    monkeypatch.setattr(rooms, "_HOME", tmp_path)
    assert not rooms.is_here("calibration")
    with pytest.raises(ConfigError, match=r"no probabilities fitted .* and metrics .* and reports"):
        rooms.load("pipelines.calibration.calibration")
    told = CliRunner().invoke(app, ["cron", "job.yaml"])
    assert told.exit_code == 2
    assert "this installation has no dated versions of an output (pipelines/cron, jobs/cron)" in (
        told.output + told.stderr
    )
