"""A Ray of our own: whose token it asks for, and that nothing of this stays in the process'
environment.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from glm_batch.glm_actors.ray_private import ALONE
from glm_batch.pipelines.cluster.cluster import TOKEN_VARIABLES, enclosed


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in (*TOKEN_VARIABLES, ALONE):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_token_is_made_once_for_its_owner_alone(home: Path) -> None:
    path = home / ".ray" / "auth_token"
    with enclosed() as options:
        assert os.environ[ALONE] == "0"
        token = path.read_text()
    assert options == {"_node_ip_address": "127.0.0.1"}
    assert ALONE not in os.environ
    assert len(token) == 64
    with enclosed():
        pass
    assert path.read_text() == token
    assert mode(path) == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["auth_token"]


def test_an_open_token_is_closed_and_kept(home: Path) -> None:
    (home / ".ray").mkdir(parents=True)
    path = home / ".ray" / "auth_token"
    path.write_text("x" * 64)
    path.chmod(0o644)
    with enclosed():
        pass
    assert (path.read_text(), mode(path)) == ("x" * 64, 0o600)


def test_a_token_of_the_users_choice_is_left_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "y" * 64)
    with enclosed():
        assert os.environ["RAY_AUTH_TOKEN"] == "y" * 64
    assert not home.exists()


def test_without_a_home_the_token_is_in_no_file(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.write_text("not a directory")
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with enclosed():
        assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_what_was_said_before_holds_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALONE, "1")
    with enclosed():
        assert os.environ[ALONE] == "0"
    assert os.environ[ALONE] == "1"
