"""A `glm-batch` driver whose workers take their time and count the rows they finish; all else is
the real thing.

Run as: python -m tests.faults.driver PACE ARGUMENT ..., where PACE is a Pace as JSON and the rest
is for glm-batch. Owns how slow the workers are. What this module defines travels to them by value,
as it is the main module.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

COMPLETED, HURRY = "completed", "hurry"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds that the workers sleep: for each unit, and for each step of the engine, which takes
    `step_rows` rows.

    In `folder` a byte is added to COMPLETED for each row that an engine has finished. Where there
    is HURRY, nobody sleeps any more.
    """

    folder: str
    render_s: float = 0.0
    step_s: float = 0.0
    step_rows: int = 1 << 20
    commit_s: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @property
    def hurries(self) -> bool:
        return os.path.exists(os.path.join(self.folder, HURRY))

    def wait(self, seconds: float) -> None:
        if seconds and not self.hurries:
            time.sleep(seconds)

    def note(self, num_rows: int) -> None:
        file = os.open(os.path.join(self.folder, COMPLETED), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, b"." * num_rows)
        os.close(file)


def completed_rows(folder: Path) -> int:
    """How many rows engines have finished, each time that they did."""
    return (folder / COMPLETED).stat().st_size if (folder / COMPLETED).exists() else 0


class Paced:
    """An engine that is given some rows at each step only."""

    def __init__(self, engine: Any, pace: Pace) -> None:
        self._engine, self._pace = engine, pace
        self._queue: deque[Any] = deque()

    def submit(self, requests: list[Any]) -> None:
        self._queue.extend(requests)

    def step(self) -> list[Any]:
        self._pace.wait(self._pace.step_s)
        most = len(self._queue) if self._pace.hurries else self._pace.step_rows
        if taken := [self._queue.popleft() for _ in range(min(most, len(self._queue)))]:
            self._engine.submit(taken)
        completions = self._engine.step()
        self._pace.note(len(completions))
        return completions  # type: ignore[no-any-return]

    def has_work(self) -> bool:
        return bool(self._queue or self._engine.has_work())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def paced_workers(pace: Pace) -> dict[str, type]:
    """Stand-ins for the classes of the same names in pipelines.graph.stages."""
    from glm_batch.glm_actors.units import model_actor as model
    from glm_batch.pipelines.graph import stages

    build_engine = model.build_engine

    def build(*args: Any, **kwargs: Any) -> Any:
        return Paced(build_engine(*args, **kwargs), pace)

    class ModelActor(model.ModelActor):
        def __init__(self, *args: Any) -> None:
            sys.modules[
                "glm_batch.glm_actors.units.model_actor"
            ].build_engine = build  # in the worker, where it is another module object
            super().__init__(*args)

    class Preprocessor(stages.Preprocessor):
        def __call__(self, table: Any) -> Any:
            pace.wait(pace.render_s)
            return super().__call__(table)

    class Committer(stages.Committer):
        def __call__(self, table: Any) -> Any:
            pace.wait(pace.commit_s)
            return super().__call__(table)

    return {each.__name__: each for each in (ModelActor, Preprocessor, Committer)}


def main() -> None:
    from glm_batch.glm_actors.faults.suspects import Patience
    from glm_batch.jobs.__main__ import app
    from glm_batch.pipelines.graph import stages

    pace = Pace(**json.loads(sys.argv.pop(1)))
    for name, worker in paced_workers(pace).items():
        setattr(stages, name, worker)
    stages.PATIENCE = Patience(backoff_s=0.1)
    app()


if __name__ == "__main__":
    main()
