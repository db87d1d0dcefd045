"""The optional rooms: which folders each is made of, and the one way in which others reach them.

Any of them can be taken away by deleting its folders; what is left does everything else. Code
outside a room names its modules as text, `rooms.load("pipelines.cron.versions")`, and never in an
import statement.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_batch.models.errors import ConfigError

_HOME = Path(__file__).parents[1]  # the folder of glm_batch, which holds the four packages


@dataclass(frozen=True)
class Room:
    """An optional room: what it is for, its folders, and the rooms without which it cannot work."""

    purpose: str
    folders: tuple[str, ...]
    needs: tuple[str, ...] = ()

    def is_here(self) -> bool:
        return all((_HOME / folder / "__init__.py").is_file() for folder in self.folders)


ROOMS = {
    "vllm": Room("the vLLM engine", ("models/engine/vllm",)),
    "cuda": Room("kernels for CUDA", ("models/engine/cuda",)),
    "shared": Room(
        "jobs on the replicas of a live application",
        ("glm_actors/shared", "pipelines/shared"),
        needs=("serving",),
    ),
    "serving": Room("the HTTP server", ("glm_actors/serving", "jobs/serving"), needs=("shared",)),
    "openai_batch": Room(
        "OpenAI batch files as input",
        ("pipelines/openai_batch", "jobs/openai_batch"),
        needs=("serving",),
    ),
    "evaluation": Room(
        "metrics over gold answers and sweeps",
        ("pipelines/evaluation", "pipelines/sweep", "jobs/sweep"),
    ),
    "report": Room("reports", ("pipelines/report", "jobs/report"), needs=("evaluation",)),
    "export": Room(
        "outputs as table files", ("pipelines/export", "jobs/export"), needs=("report",)
    ),
    "calibration": Room(
        "probabilities fitted to gold answers",
        ("pipelines/calibration", "jobs/calibration"),
        needs=("evaluation", "report"),
    ),
    "cron": Room("dated versions of an output", ("pipelines/cron", "jobs/cron")),
    "demo": Room("the demo", ("jobs/demo",)),
}


def is_here(name: str) -> bool:
    """Whether the room `name`, and every room that it needs, is in this installation."""
    return not _missing(name)


def require(name: str) -> None:
    """Raises ConfigError if the room `name`, or one that it needs, is not here."""
    missing = _missing(name)
    if missing:
        gone = " and ".join(
            f"{ROOMS[each].purpose} ({', '.join(ROOMS[each].folders)})" for each in missing
        )
        raise ConfigError(
            f"this installation has no {gone}: leave out what asks for it, or install all of "
            "glm-batch"
        )


def load(module: str) -> Any:
    """The module glm_batch.`module` of an optional room; ConfigError if that room is not here."""
    require(room_of(module))
    return importlib.import_module(f"glm_batch.{module}")


def room_of(module: str) -> str:
    """The optional room that holds a module, named without `glm_batch.`; KeyError if none does."""
    place = module.replace(".", "/") + "/"
    for name, room in ROOMS.items():
        if any(place.startswith(f"{folder}/") for folder in room.folders):
            return name
    raise KeyError(f"{module} lies in no optional room")


def _missing(name: str) -> list[str]:
    """The rooms that are not here, of `name` and all that it needs."""
    wanted = [name]
    for each in wanted:  # grows on the way
        wanted += [other for other in ROOMS[each].needs if other not in wanted]
    return [each for each in wanted if not ROOMS[each].is_here()]
