"""Importing the pipelines, as the driver does for every command, loads neither ray nor torch."""

from __future__ import annotations

import subprocess
import sys


def test_importing_pipelines_loads_no_heavy_library() -> None:
    code = (
        "import pipelines, sys; print([name for name in ('ray', 'torch', 'vllm', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
