"""Wheel and editable install: what lies in site-packages, and one import name whatever lies beside
a command, a script or a notebook.
"""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest
from jupyter_client import KernelManager
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from tests.packaging.conftest import PACKAGES, ROOT, clean_environment, run

WHERE = "import glm_batch.models.errors as m; import models; print(m.__file__, models.mine)"


def test_the_wheel_puts_one_name_into_site_packages(wheel: Path, product: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"glm_batch"}
    modules = {
        f"glm_batch/{path.relative_to(product)}"
        for package in PACKAGES
        for path in (product / package).rglob("*.py")
    }
    assert modules <= set(names)
    assets = {path.name for path in (ROOT / "pipelines/report/assets").iterdir()}
    kept = {name for name in names if not name.endswith(".py") and "dist-info" not in name}
    assert kept >= {
        "glm_batch/py.typed",
        "glm_batch/examples/tiny_glm/model.safetensors",
        *(f"glm_batch/pipelines/report/assets/{name}" for name in assets),
    }


def test_a_users_files_of_the_same_names_do_no_harm(python: Path, users_folder: Path) -> None:
    """A command, a script beside them, and the command line in that folder."""
    (users_folder / "script.py").write_text(WHERE)
    for arguments in (["-c", WHERE], ["script.py"]):
        place, mine = run(python, *arguments, cwd=users_folder).split()
        assert Path(place).parts[-3:] == ("glm_batch", "models", "errors.py")
        assert mine == "True"
    model = str(ROOT / "examples" / "tiny_glm")
    told = run(python, "-m", "glm_batch.jobs", "inspect", model, cwd=users_folder)
    assert "tokenizer.vocab_size" in told


def test_an_editable_install_is_the_repository(python: Path, product: Path) -> None:
    where = run(python, "-c", "import glm_batch.jobs; print(glm_batch.jobs.__file__)", cwd=product)
    is_here = Path(where.strip()).resolve() == product / "jobs" / "__init__.py"
    assert is_here == (python.parents[1].name == "editable")


def test_a_notebook_beside_such_files_loads_a_model(python: Path, users_folder: Path) -> None:
    model = str(ROOT / "examples" / "tiny_glm")
    cells = [
        "import models\nfrom glm_batch import load\nmodels.mine",
        f"llm = load({model!r}, kv_cache_tokens=1024)",
        "llm.choose('The kettle leaks.', ['a', 'b']).label in 'ab'",
    ]
    notebook = new_notebook(cells=[new_code_cell(cell) for cell in cells])
    manager = KernelManager()
    manager.kernel_spec.argv[0] = str(python)
    client = NotebookClient(notebook, km=manager, timeout=120)
    client.execute(cwd=str(users_folder), env=clean_environment())
    results = [cell.outputs[-1]["data"]["text/plain"] for cell in notebook.cells[::2]]
    assert results == ["True", "True"]


def test_the_import_costs_nothing() -> None:
    """Names are loaded when they are asked for."""
    code = (
        "import sys, time; before = set(sys.modules); begun = time.process_time();"
        "import glm_batch; seconds = time.process_time() - begun;"
        "import json; print(json.dumps([seconds, sorted(set(sys.modules) - before)]))"
    )
    seconds, loaded = json.loads(
        run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=str(ROOT / "src"))
    )
    assert seconds < 0.1
    assert [name for name in loaded if name.partition(".")[0] == "glm_batch"] == ["glm_batch"]
    assert not {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names - {"glm_batch"}


def test_the_public_names_are_frozen() -> None:
    import glm_batch

    assert glm_batch.__all__ == [
        "Job",
        "Request",
        "SamplingParams",
        "__version__",
        "build_dataset",
        "build_engine",
        "load",
        "run",
    ]
    assert all(getattr(glm_batch, name) is not None for name in glm_batch.__all__)
    assert set(glm_batch.__all__) <= set(dir(glm_batch))
    with pytest.raises(AttributeError, match="no attribute 'Jobs'"):
        _ = glm_batch.Jobs
