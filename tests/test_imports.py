"""Who may import whom, read from the source, and what importing the driver side loads, seen in a fresh process."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ["models", "glm_actors", "pipelines", "jobs"]  # each may import itself and what stands before it
FILES = sorted(path.relative_to(ROOT) for package in ORDER for path in (ROOT / package).rglob("*.py"))
ALLOWED: dict[str, tuple[str, ...]] = {
    "ray": ("glm_actors/", "pipelines/", "jobs/"),
    "vllm": ("models/engine/vllm_",),
    "transformers": (),
    "pydantic": ("jobs/", "glm_actors/serving/"),
    "fastapi": ("glm_actors/serving/",),
    "starlette": ("glm_actors/serving/",),
    "uvicorn": ("glm_actors/serving/",),
    "prometheus_client": ("glm_actors/serving/",),
    "sklearn": ("pipelines/evaluation/",),
    "scipy": ("pipelines/evaluation/",),
    "typer": ("jobs/",),
    "rich": ("jobs/",),
    "pyarrow": ("glm_actors/", "pipelines/", "jobs/"),
}
# No torch, not even through another module.
TORCH_FREE = [
    "models", "models.config", "models.config_reader", "models.errors", "models.engine", "models.engine.request",
    "models.engine.interface",
    "models.engine.scheduler", "models.engine.block_manager", "models.engine.echo", "models.processing.tokenizer",
    "models.processing.chat", "models.processing.media_config", "models.processing.budget",
    "models.processing.positions", "models.processing.images", "models.processing.video",
    "models.normalization", "models.engine.media", "models.engine.sequence", "models.processing.messages",
    "models.processing.prompt", "models.engine.vllm_limits", "glm_actors.batches",
]  # fmt: skip
DRIVER = sorted(
    ".".join(path.with_suffix("").parts) for path in FILES if path.parts[0] == "jobs" and path.name != "__init__.py"
)


def imported_names(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever in the file it stands."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield node.module or ""


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way_and_libraries_stay_where_they_belong(path: Path) -> None:
    later = ORDER[ORDER.index(path.parts[0]) + 1 :]
    for name in imported_names(path):
        top = name.partition(".")[0]
        assert top not in later, f"{path} imports {name}"
        assert top not in ("tests", "examples", "benchmarks"), f"{path} imports {name}"
        if top in ALLOWED:
            assert path.as_posix().startswith(ALLOWED[top]), f"{path} imports {name}"


def loaded_by(modules: list[str]) -> set[str]:
    """The top-level modules that are loaded after importing `modules` in a fresh process."""
    code = (
        f"import sys\nfor name in {modules!r}: __import__(name)\nprint(*{{m.partition('.')[0] for m in sys.modules}})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.split())


def test_the_driver_stays_light() -> None:
    assert "jobs.label" in DRIVER
    loaded = loaded_by([*DRIVER, "pipelines"])
    assert not loaded & {"torch", "ray", "vllm", "transformers", "sklearn", "scipy"}
    assert {"pydantic", "pyarrow"} <= loaded  # the process did import what it was told to


def test_planning_and_processing_need_no_torch() -> None:
    assert "torch" not in loaded_by(TORCH_FREE)
