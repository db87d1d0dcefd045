"""Rooms: who may import whom, read from the source, and what importing the driver side loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAME = "glm_batch"
PACKAGES = ["models", "glm_actors", "pipelines", "jobs"]
# Every room, in the order in which they may be imported: each may import itself and those above it.
# A package's own name stands for the modules right in its folder.
ORDER = """
    models models/checkpoint models/network/layers models/network models/processing
    models/engine/api models/engine/scheduling models/engine/decoding models/engine/works
    models/engine/execution models/engine/cuda models/engine models/engine/vllm
    glm_actors glm_actors/faults glm_actors/engines glm_actors/media glm_actors/shared glm_actors/units
    glm_actors/serving/openai glm_actors/serving/http glm_actors/serving/replicas pipelines
    pipelines/storage pipelines/input pipelines/evaluation pipelines/calibration
    pipelines/metrics pipelines/tasks pipelines/planning pipelines/output pipelines/cluster
    pipelines/openai_batch pipelines/shared pipelines/graph pipelines/runs pipelines/cron
    pipelines/sweep pipelines/report pipelines/export jobs/files jobs/checks jobs/display
    jobs/plans jobs/openai_batch jobs/commands jobs/report jobs/export jobs/calibration jobs/cron
    jobs/sweep jobs/serving
    jobs/demo jobs
""".split()  # noqa: SIM905
# Folders that hold rooms and no modules of their own.
HALLS = {"glm_actors/serving"}
# Arrows against the order that are still to be turned.
PENDING: set[tuple[str, str]] = set()
ALLOWED: dict[str, tuple[str, ...]] = {
    "ray": ("glm_actors/", "pipelines/", "jobs/"),
    "vllm": ("models/engine/vllm/",),
    "triton": ("models/engine/cuda/",),
    "transformers": (),
    "pydantic": ("jobs/", "glm_actors/serving/"),
    "fastapi": ("glm_actors/serving/",),
    "starlette": ("glm_actors/serving/",),
    "uvicorn": ("glm_actors/serving/",),
    "prometheus_client": ("glm_actors/serving/",),
    "sklearn": ("pipelines/evaluation/", "pipelines/calibration/"),
    "scipy": ("pipelines/evaluation/", "pipelines/calibration/"),
    "duckdb": ("pipelines/report/",),
    "typer": ("jobs/",),
    "rich": ("jobs/",),
    "pyarrow": ("glm_actors/", "pipelines/", "jobs/"),
}
# No torch, not even through another module.
TORCH_FREE = [
    "glm_batch",
    "glm_batch.models",
    "glm_batch.models.checkpoint.model_config",
    "glm_batch.models.checkpoint.config_reader",
    "glm_batch.models.checkpoint.headers",
    "glm_batch.models.checkpoint.media_config",
    "glm_batch.models.engine",
    "glm_batch.models.engine.api.request",
    "glm_batch.models.engine.api.interface",
    "glm_batch.models.engine.scheduling.scheduler",
    "glm_batch.models.engine.scheduling.block_manager",
    "glm_batch.models.engine.scheduling.placeholders",
    "glm_batch.models.engine.scheduling.sequence",
    "glm_batch.models.engine.echo",
    "glm_batch.models.engine.vllm.vllm_limits",
    "glm_batch.models.processing.tokenizer",
    "glm_batch.models.processing.chat",
    "glm_batch.models.processing.budget",
    "glm_batch.models.processing.positions",
    "glm_batch.models.processing.images",
    "glm_batch.models.processing.video",
    "glm_batch.models.processing.messages",
    "glm_batch.models.processing.prompt",
    "glm_batch.glm_actors.units.batches",
]
MOST_MODULES = 15
FILES = sorted(
    path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")
)
MODULES = {
    ".".join((NAME, *path.with_suffix("").parts)).removesuffix(".__init__"): path for path in FILES
}
DRIVER = sorted(
    name for name, path in MODULES.items() if path.parts[0] == "jobs" and path.name != "__init__.py"
)


def room(path: Path) -> str:
    return path.parent.as_posix()


def imported_names(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever in the file it stands."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            module = node.module or ""
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                yield whole if whole in MODULES else module


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way_and_libraries_stay_where_they_belong(path: Path) -> None:
    place = room(path)
    is_door = path.name == "__init__.py" and place in PACKAGES  # shows names of its rooms
    for name in imported_names(path):
        top = name.partition(".")[0]
        assert top not in (*PACKAGES, "tests", "examples", "benchmarks"), f"{path} imports {name}"
        if top in ALLOWED:
            assert path.as_posix().startswith(ALLOWED[top]), f"{path} imports {name}"
        if name == NAME or top != NAME or is_door:
            continue
        other = room(MODULES[name])
        if other not in HALLS and (place, other) not in PENDING:
            assert ORDER.index(other) <= ORDER.index(place), f"{path} imports {name}: an arrow back"


def test_every_module_lies_in_a_room_that_says_what_belongs_there() -> None:
    rooms = {room(path) for path in FILES}
    assert rooms == {*ORDER, *HALLS}
    counts = Counter(room(path) for path in FILES if path.name != "__init__.py")
    for place in rooms:
        docstring = ast.get_docstring(ast.parse((ROOT / place / "__init__.py").read_text())) or ""
        assert place in HALLS or "Read" in docstring, (
            f"{place}: say what belongs here, and in which order to read it"
        )
        assert counts[place] <= MOST_MODULES, f"{place} has {counts[place]} modules"


def test_a_file_name_tells_one_file() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = [Path(line) for line in tracked.stdout.splitlines() if not line.startswith("tests/")]
    names = Counter(path.name for path in files if not path.name.startswith("__"))
    assert [name for name, count in names.items() if count > 1] == []


def loaded_by(modules: list[str]) -> set[str]:
    """The top-level modules that are loaded after importing `modules` in a fresh process."""
    code = f"import sys\nfor name in {modules!r}: __import__(name)\n"
    code += "print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return set(done.stdout.split())


def test_the_driver_stays_light() -> None:
    assert "glm_batch.jobs.commands.label" in DRIVER
    loaded = loaded_by([*DRIVER, "glm_batch.pipelines"])
    assert not loaded & {"torch", "ray", "vllm", "transformers", "sklearn", "scipy", "duckdb"}
    assert {"pydantic", "pyarrow"} <= loaded  # the process did import what it was told to


def test_importing_the_pipelines_loads_no_heavy_library() -> None:
    loaded = loaded_by(["glm_batch.pipelines"])
    assert not loaded & {"ray", "torch", "vllm", "pydantic"}


def test_planning_and_processing_need_no_torch() -> None:
    assert "torch" not in loaded_by(TORCH_FREE)
