"""ModelActor: owns one engine; tables of requests in, tables of completions out.

Built on a worker from a frozen EngineConfig. Runs as the callable class of a Ray Data stage whose calls arrive on
several threads: that is how many units are in flight at once. Knows nothing of prompts, tasks or files.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from functools import partial
from typing import NoReturn

import pyarrow as pa

from glm_actors.batches import to_requests, with_completions
from glm_actors.loop import EngineLoop
from models.engine import EngineConfig, build_engine
from models.errors import ConfigError, EngineError

DEAD_ENGINE_EXIT_CODE = 70
# Read by torch's CPU libraries when they are loaded; a user's own values stay.
CPU_SETTINGS = {
    # Threads that wait for each other spin for microseconds, not milliseconds: preprocessors want these cores too.
    "GOMP_SPINCOUNT": "1000",
    # Both libraries keep 1,024 prepared matrix products, one for each shape, a quarter of a megabyte each.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "LRU_CACHE_CAPACITY": "128",
}
SECONDS = "engine_seconds"  # column: how long the unit was in the engine, from submission to its last completion


class ModelActor:
    """One engine, fed by an EngineLoop. `num_threads` is the share of the machine's cores for its matrix products."""

    def __init__(self, config: EngineConfig, num_threads: int) -> None:
        # Ray limits a worker to as many threads as its logical CPUs; this must be set before torch is imported.
        os.environ["OMP_NUM_THREADS"] = str(num_threads)
        for name, value in CPU_SETTINGS.items():
            os.environ.setdefault(name, value)
        self._loop: EngineLoop | None = None
        self._has_worked = False
        self._refusal: ConfigError | None = None
        try:
            self._loop = EngineLoop(partial(build_engine, config))
        except ConfigError as error:
            # Raised from the first call instead: Ray would wrap it here into the death of an actor.
            self._refusal = error

    def __call__(self, table: pa.Table) -> pa.Table:
        """Completes a unit's requests: see glm_actors.batches for both tables, to which this adds SECONDS."""
        if self._loop is None:
            assert self._refusal is not None
            raise self._refusal
        begun = time.monotonic()
        try:
            completions = self._loop.submit(to_requests(table)).result()
        except EngineError as error:
            if _was_restarted() and not self._has_worked:
                raise  # one restart has not helped: another would not either, and the job's user should see why
            _exit_dead(error)
        self._has_worked = True
        seconds = pa.array([time.monotonic() - begun] * table.num_rows, pa.float64())
        return with_completions(table, completions).append_column(SECONDS, seconds)


def _was_restarted() -> bool:
    """Whether Ray has started this process in the place of one that died."""
    import ray

    return ray.is_initialized() and bool(ray.get_runtime_context().was_current_actor_reconstructed)


def _exit_dead(error: EngineError) -> NoReturn:
    """Ends this process, so that Ray starts a new one and retries its units there.

    An exception would send the retry to the same dead engine, and ray.actor.exit_actor is not retried at all.
    """
    traceback.print_exception(error, file=sys.stderr)
    print(f"The engine is dead, its process ends and will be restarted: {error}", file=sys.stderr, flush=True)
    os._exit(DEAD_ENGINE_EXIT_CODE)
