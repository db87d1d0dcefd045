"""`glm-batch evaluate` and `plan` on sweep files: refusals, the grid, and a sweep that is killed on
its way.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from glm_batch.jobs.files.sections import is_sweep
from glm_batch.jobs.sweep.sweep_config import check_sweep, load_sweep
from glm_batch.models.errors import ConfigError

ROOT = Path(__file__).parents[2]
SWEEP: dict[str, Any] = {
    "output": "out/sweep",
    "models": {"small": {"model": "model", "engine": {"kind": "echo"}}},
    "datasets": {"texts": {"input": ["data/*.parquet"], "key": "id"}},
    "tasks": {
        "team": {
            "task": {"kind": "choose", "labels": ["red", "green"], "gold": "team"},
            "prompts": {"short": "Team? {text}", "long": "Which team is it? {text}"},
        },
        "say": {
            "task": {"kind": "generate", "prompt": "Say {text}", "gold": "team"},
            "sampling": {"greedy": {"max_tokens": 4}, "warm": {"temperature": 1.0, "n": 2}},
            "seeds": [0, 1],
        },
    },
}


@pytest.fixture
def write(work: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a sweep file after some changes by dotted keys; the current directory is its own."""
    monkeypatch.chdir(work.root)

    def written(**changes: Any) -> str:
        sweep = json.loads(json.dumps(SWEEP))
        for key, value in changes.items():
            *sections, last = key.split("__")
            at = sweep
            for section in sections:
                at = at.setdefault(section, {})
            at[last] = value
        (work.root / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
        return "sweep.yaml"

    return written


def test_the_grid_is_laid_out(write: Any, work: Any) -> None:
    sweep, place = load_sweep(
        write(baseline={"prompt": "long"}), ["tasks.team.prompts.third=Team {text}"]
    )
    assert [cell.name for cell in sweep.cells] == [
        "small-texts-team-short-default-default-default",
        "small-texts-team-long-default-default-default",
        "small-texts-team-third-default-default-default",
        "small-texts-say-default-greedy-0-default",
        "small-texts-say-default-greedy-1-default",
        "small-texts-say-default-warm-0-default",
        "small-texts-say-default-warm-1-default",
    ]
    job = sweep.cells[6].job
    assert (job.sampling.seed, job.sampling.n, job.task.prompt, job.key) == (
        1,
        2,
        "Say {text}",
        "id",
    )
    assert job.output == f"out/sweep/cells/{sweep.cells[6].name}"
    assert sweep.cells[2].job.task.prompt == "Team {text}"
    assert sweep.cells[2].job.task.label_logprobs
    assert len(check_sweep(sweep, place)) == 7
    assert is_sweep("sweep.yaml")
    work.write_job()
    assert not is_sweep("job.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modells": {}}, r"sweep.yaml:\d+: modells: unknown key; did you mean models\?"),
        ({"tasks__team__task__lables": ["a"]}, r"tasks.team.task.lables: unknown key; did you mean tasks.team.task.l"),
        ({"tasks__team__prompts__short": 3}, "tasks.team.prompts.short: it is 3, but it must be text"),
        ({"tasks__team__task__kind": "tag"}, "tasks.team.task.kind: evaluate scores choose, generate, extract, class"),
        ({"tasks__team__task__gold": None}, "tasks.team.task.gold: missing"),
        ({"tasks__team__task__gold": "nothing"}, "tasks.team.task.gold: .*no column 'nothing'"),
        ({"tasks__team__prompts__short": "{nothing}"}, "tasks.team.prompts.short: .*no column 'nothing'"),
        ({"tasks__team__prompts": {"a/b": "{text}"}}, "tasks.team.prompts.a/b: a name has letters"),
        ({"tasks__team__seeds": [0, 1]}, "tasks.team.seeds: no sampling has a temperature"),
        ({"tasks__say__seeds": [1, 1]}, "tasks.say.seeds: it is empty or names something twice"),
        ({"tasks__team__datasets": ["others"]}, "tasks.team.datasets: no dataset is named 'others'; known: texts"),
        ({"tasks__team__max_pixels": [784]}, "tasks.team.max_pixels: the task names no task.image"),
        ({"tasks__say__sampling__greedy__top_p": 2.0}, "tasks.say.sampling.greedy"),
        ({"tasks__say__score": {"extract": "("}}, "tasks.say.score.extract: not a regular expression"),
        ({"tasks__say__score": {"pass_at": [2]}}, "tasks.say.score.pass_at: 2 is more than there are samples"),
        ({"tasks__team__score": {"match": "numeric"}}, "tasks.team.score: only generate takes it"),
        ({"models__small__model": "nowhere"}, "models.small.model: nowhere: no such directory"),
        ({"models__small__engine__kind": "torsh"}, 'models.small.engine.kind: it is "torsh", but it must be one of'),
        ({"datasets__texts__input": ["none/*.parquet"]}, "datasets.texts.input: "),
        ({"baseline": {"prompt": "none"}}, "baseline.prompt: no cell has 'none' there; known: default, long, short"),
        ({"baseline": {"colour": "red"}}, "baseline.colour: no such axis"),
        ({"baseline": "worst"}, "baseline: it is \"worst\"; write best"),
        ({"confidence": 95.0}, "confidence: it is 95.0"),
        ({"tasks": {}}, "tasks: it is empty"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_sweeps_are_refused_at_their_key(
    write: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_sweep(*load_sweep(write(**changes)))


def test_what_is_wrong_with_many_cells_is_told_once(write: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        check_sweep(
            *load_sweep(write(tasks__team__task__gold="nothing", tasks__say__task__gold="nothing"))
        )
    assert len(str(caught.value).splitlines()) == 2


def test_plan_shows_every_cell(write: Any, work: Any) -> None:
    write()
    done = work.run("plan", "sweep.yaml")
    assert done.code == 0, done.err
    assert "6 cells" in done.out
    assert done.out.count("warm") == 2
    assert not (work.root / "out").exists()


# ---- a sweep that is killed

KILLED = {
    "output": "out",
    "models": {"tiny": {"model": str(ROOT / "examples/tiny_glm"), "engine": {"dtype": "float32"}}},
    "datasets": {
        "shapes": {"input": [str(ROOT / "examples/shapes/shapes-1.parquet")], "key": "id"},
        "tickets": {"input": [str(ROOT / "examples/support/tickets-3.parquet")], "key": "id"},
    },
    "tasks": {
        "shape": {
            "datasets": ["shapes"],
            "task": {"kind": "choose", "image": "image", "labels": ["circle", "square", "triangle", "star"],
                     "gold": "gold_shape"},
            "prompts": {"trained": "Which shape is it?", "other": "Name the shape."},
            "max_pixels": [7056, 28224],
        },
        "route": {
            "datasets": ["tickets"],
            "task": {"kind": "choose", "labels": ["billing", "shipping", "account", "technical", "other"],
                     "gold": "gold_label"},
            "prompts": {"trained": "Which team handles this ticket?\n\n{text}", "other": "{text}\n\nWhich team?"},
        },
    },
    "commit": {"unit_rows": 8},
    "max_error_rate": 0.2,
}  # fmt: skip


OF_PROBABILITIES = (
    "brier", "ece", "off_set_mass", "gold_log_likelihood", "gold_token_log_likelihood", "gold_perplexity",
)  # fmt: skip


def evaluate(folder: Path, kill_at: int | None = None) -> int:
    """Runs the sweep; with `kill_at`, kills its driver once there are so many commits in all."""
    command = [sys.executable, "-m", "glm_batch.jobs", "evaluate", "sweep.yaml"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    with (folder / "log").open("a") as log:
        driver = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    while kill_at is not None and driver.poll() is None and commits(folder) < kill_at:
        time.sleep(0.01)
    if kill_at is not None:
        driver.kill()
    return driver.wait()


def commits(folder: Path) -> int:
    return len(list(folder.glob("out/cells/*/commits/*")))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_sweep_comes_to_the_same_results(tmp_path: Path) -> None:
    """Seeded SIGKILLs of the driver, each somewhere on the way; what is committed stays, and the
    table is the same.
    """
    folders = [tmp_path / "undisturbed", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
        (folder / "sweep.yaml").write_text(yaml.safe_dump(KILLED))
    assert evaluate(folders[0]) == 0, (folders[0] / "log").read_text()
    chance, units = random.Random(11), commits(folders[0])
    for kill_at in (chance.randrange(2, units // 2), chance.randrange(units // 2, units - 4)):
        assert evaluate(folders[1], kill_at) == -signal.SIGKILL, (folders[1] / "log").read_text()
        assert kill_at <= commits(folders[1]) < units
        assert not (folders[1] / "out/results.json").exists()
    assert evaluate(folders[1]) == 0, (folders[1] / "log").read_text()
    tables = [pq.read_table(folder / "out/results.parquet").to_pylist() for folder in folders]
    assert len(tables[0]) == 6
    assert all(row["accuracy"] > 0.2 for row in tables[0])
    for undisturbed, killed in zip(*tables, strict=True):
        assert list(killed) == list(undisturbed)
        differing = {name for name in killed if killed[name] != undisturbed[name]}
        # What depends on answers is the same; probabilities may fall to either side of the last
        # digit kept.
        assert all(name.startswith(OF_PROBABILITIES) for name in differing), differing
        assert all(abs(killed[name] - undisturbed[name]) < 1.01e-4 for name in differing), differing
    comparisons = [
        json.loads((folder / "out/results.json").read_bytes())["comparisons"] for folder in folders
    ]
    assert comparisons[1] == comparisons[0]
