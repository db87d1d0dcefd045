"""The command line, frozen: commands, their arguments and options, and what each exit code means."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner

from glm_batch.jobs import __main__ as cli
from glm_batch.models.errors import ConfigError, EngineError

COMMANDS = {
    "plan": (["job"], ["--debug", "--set"]),
    "label": (["job"], ["--app", "--debug", "--extend", "--set"]),
    "evaluate": (["sweep"], ["--compare", "--debug", "--set"]),
    "cron": (
        ["job"],
        ["--changed-job", "--debug", "--drop-deleted", "--max-units", "--set", "--until"],
    ),
    "status": (["output"], ["--debug", "--endpoint-url", "--verify"]),
    "report": (["output"], ["--debug", "--endpoint-url", "--pred-probs", "--review", "--to"]),
    "export": (
        ["output"],
        ["--debug", "--endpoint-url", "--file-rows", "--format", "--to", "--with-input"],
    ),
    "retry": (["output"], ["--app", "--code", "--debug", "--endpoint-url", "--set"]),
    "calibrate": (["output"], ["--bias", "--debug", "--endpoint-url", "--to"]),
    "gc": (["output"], ["--debug", "--endpoint-url"]),
    "serve": (["config"], ["--debug", "--insecure"]),
    "inspect": (["model"], ["--debug"]),
    "demo": (["jobs"], ["--debug"]),
    "doctor": ([], ["--debug"]),
}


def command_surface(command: click.Command) -> tuple[list[str], list[str]]:
    arguments = [each.name or "" for each in command.params if each.param_type_name == "argument"]
    options = [
        flag for each in command.params if each.param_type_name == "option" for flag in each.opts
    ]
    return arguments, sorted(options)


def test_commands_arguments_and_options() -> None:
    group = typer.main.get_command(cli.app)
    assert {name: command_surface(command) for name, command in group.commands.items()} == COMMANDS  # type: ignore[attr-defined]


def test_the_console_script() -> None:
    scripts = importlib.metadata.entry_points(group="console_scripts", name="glm-batch")
    assert [script.value for script in scripts] == ["glm_batch.jobs.__main__:main"]


def test_the_exit_codes() -> None:
    assert (cli.EXIT_OK, cli.EXIT_FAILED, cli.EXIT_BAD_CONFIG, cli.EXIT_ROW_ERRORS) == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("error", "code", "first_line"),
    [
        (ConfigError("job.yaml:3: model: wrong"), 2, "glm-batch: bad configuration:"),
        (EngineError("the device is gone"), 1, "glm-batch: the job failed:"),
        (RuntimeError("a bug"), 1, "glm-batch: the job failed: RuntimeError:"),
    ],
)
def test_errors_become_exit_codes_and_short_text(
    error: Exception, code: int, first_line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_, cli.errors_for_people(debug=False):
        raise error
    captured = capsys.readouterr()
    assert exit_.value.code == code
    assert captured.out == ""
    assert captured.err.splitlines()[:2] == [first_line, f"  {error}"]
    assert "Traceback" not in captured.err


def test_a_workers_traceback_is_shortened_and_debug_shows_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = RuntimeError(
        "\n".join(["in the worker", *(f"frame {n}" for n in range(50)), "NameError: x"])
    )
    with pytest.raises(SystemExit), cli.errors_for_people(debug=False):
        raise error
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert lines[1:3] == ["in the worker", "... 47 lines more ..."]
    assert lines[3:] == [
        "frame 47",
        "frame 48",
        "frame 49",
        "NameError: x",
        "(--debug shows the traceback)",
    ]
    with pytest.raises(SystemExit), cli.errors_for_people(debug=True):
        raise error
    assert "frame 20" in capsys.readouterr().err


@pytest.mark.parametrize("code", [0, 3, 130])
def test_label_decides_the_exit_code(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "glm_batch.jobs.commands.label.label", lambda path, overrides, **options: code
    )
    assert CliRunner().invoke(cli.app, ["label", "job.yaml"]).exit_code == code


@pytest.mark.parametrize("arguments", [["labell", "x"], ["label"], ["label", "x", "--sett", "a=b"]])
def test_a_wrong_command_line_is_bad_configuration(arguments: list[str]) -> None:
    assert CliRunner().invoke(cli.app, arguments).exit_code == 2


def test_status_of_nothing_is_bad_configuration(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({}))
    assert CliRunner().invoke(cli.app, ["status", str(tmp_path)]).exit_code == 2
