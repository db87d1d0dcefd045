"""`glm-batch demo`: the shipped checkpoint labels the shipped tickets, pictures and clips.

The files lie in `examples`, the repository's folder, and come with the wheel as package data.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

from glm_batch.jobs.commands.label import EXIT_OK, label
from glm_batch.models.errors import ConfigError

JOBS = ("route", "extract", "reply", "shape", "colour", "count", "motion")
EXAMPLES, OUTPUTS = Path("examples"), Path("out/demo")
PROOF = "tiny_glm/config.json"  # what our folder of examples has and another has not


def demo(names: Sequence[str]) -> int:
    """Runs the jobs with these names, all without any, on one Ray; the exit code is the first that
    is not 0.

    Job files name what they read from the current directory: it gets the examples if it has none.
    Raises ConfigError for an unknown name, and where `examples` is somebody else's.
    """
    if unknown := set(names) - set(JOBS):
        raise ConfigError(
            f"no demo is called {', '.join(sorted(unknown))}; known: {', '.join(JOBS)}"
        )
    if not (EXAMPLES / PROOF).is_file():
        _lay_out()
    shutil.rmtree(OUTPUTS, ignore_errors=True)
    from glm_batch.pipelines.cluster.cluster import cluster

    with cluster():
        for name in names or JOBS:
            code = label(f"{EXAMPLES}/{name}.yaml", [f"output={OUTPUTS}/{name}"])
            if code != EXIT_OK:
                return code
            print()
    print(f"The labelled rows lie below {OUTPUTS}; glm-batch report {OUTPUTS}/{name} shows them.")
    return EXIT_OK


def _lay_out() -> None:
    if EXAMPLES.exists():
        raise ConfigError(
            f"{EXAMPLES.absolute()} is not glm-batch's: run the demo in another folder"
        )
    with as_file(files("glm_batch") / "examples") as shipped:
        shutil.copytree(shipped, EXAMPLES)
    print(f"The job files and what they read lie in {EXAMPLES.absolute()}: change and run them.\n")
