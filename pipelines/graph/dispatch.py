"""How Ray Data gives units to replicas: by affinity where it can be told to, to the least busy one
where not.

Its pool of actors has no public way to choose, so this reaches into a running execution: the one
place that does. Without the names that it looks for, units go to the least busy replica, as Ray
Data has it.
"""

from __future__ import annotations

from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback

from glm_batch.glm_actors.units.model_actor import ModelActor
from glm_batch.pipelines.tasks.affinity import Affinity, prefix_key

WORKER = ModelActor.__name__  # is part of the name of the operator that runs it


class ByAffinity(ExecutionCallback):
    """Ray Data makes one for each execution of a dataset whose context names the class."""

    def before_execution_starts(self, executor: Any) -> None:
        for operator in getattr(executor, "_topology", None) or ():
            pool = getattr(operator, "_actor_pool", None)
            if WORKER in operator.name and hasattr(pool, "_alive_actors_to_in_flight_tasks_heap"):
                _choose_by_affinity(pool)


def _choose_by_affinity(pool: Any) -> None:
    affinity: Affinity[Any] = Affinity()
    least_busy = pool.select_actors

    def select_actors(bundle: Any = None, actor_locality_enabled: bool = False) -> Any:
        key = prefix_key(getattr(bundle, "schema", None))
        if key is None:
            return least_busy(bundle, actor_locality_enabled)
        units = {
            actor: int(rank) for actor, rank in pool._alive_actors_to_in_flight_tasks_heap.items()
        }
        return affinity.choose(key, units, pool.max_tasks_in_flight_per_actor())

    pool.select_actors = select_actors
