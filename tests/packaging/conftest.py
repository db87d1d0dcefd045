"""A copy of the product's files, and environments in which it is installed from there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("models", "glm_actors", "pipelines", "jobs")
CLUSTER = """
import logging, sys, ray
ray.init(
    address="local", num_cpus=6, object_store_memory=160 << 20, include_dashboard=False,
    log_to_driver=False, logging_level=logging.ERROR,
)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
CLUSTER_ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
# Names that a user may have beside a script; each of them once hid one of our packages.
USERS_FILES = {
    "models.py": "mine = True\n",
    "pipelines/__init__.py": "mine = True\n",
    "jobs.py": "mine = True\n",
    "glm_actors/weights.txt": "none\n",
}


def copy_product(target: Path, without: Sequence[str] = ()) -> Path:
    """The product's files below `target`, without some folders of them."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    shutil.copytree(ROOT / "src", target / "src", symlinks=True, ignore=_built)
    for folder in (*PACKAGES, "examples"):
        shutil.copytree(ROOT / folder, target / folder, ignore=_built)
    for folder in without:
        shutil.rmtree(target / folder)
    return target


def _built(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if name == "__pycache__" or name.endswith(".egg-info")}


def clean_environment() -> dict[str, str]:
    """This process's, without what leads to this checkout or to a Ray cluster."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    kept.pop("RAY_ADDRESS", None)
    return kept | {"PYTHONDONTWRITEBYTECODE": "1"}


def run(
    python: str | Path, *arguments: str, cwd: Path, timeout: float = 120, **environment: str
) -> str:
    """What a Python process with an environment of its own prints; it must end well."""
    done = subprocess.run(
        [str(python), *arguments],
        cwd=cwd,
        env=clean_environment() | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def product(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the product's files."""
    return copy_product(tmp_path_factory.mktemp("product"))


def build(product: Path, kind: str, target: Path) -> Path:
    """The wheel that a build frontend would get: `kind` is "wheel" or "editable"."""
    code = f"import setuptools.build_meta as b; print(b.build_{kind}({str(target)!r}))"
    name = run(sys.executable, "-c", code, cwd=product).splitlines()[-1]
    return target / name


@pytest.fixture(scope="session")
def wheel(product: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(product, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session", params=["wheel", "editable"])
def python(request: pytest.FixtureRequest, product: Path, wheel: Path) -> Path:
    """A Python that has glm-batch installed, and sees this one's libraries."""
    folder = wheel.parent / request.param
    venv.create(folder, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    # Path files in the folder that is named here are not read: this environment's own glm-batch
    # stays out.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    built = wheel if request.param == "wheel" else build(product, "editable", folder)
    zipfile.ZipFile(built).extractall(site)
    return folder / "bin" / "python"


@pytest.fixture
def users_folder(tmp_path: Path) -> Path:
    """A folder of a user's, whose files have the names of our packages."""
    for name, text in USERS_FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture(scope="session")
def ray_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray cluster that is there already and has no code of ours."""
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        cwd=tmp_path_factory.mktemp("cluster"),
        env=clean_environment() | CLUSTER_ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate("")
