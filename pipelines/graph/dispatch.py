"""How Ray Data gives units to replicas: by affinity where it can be told to, to the least busy one
where not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glm_batch.glm_actors import ray_private
from glm_batch.glm_actors.units.model_actor import ModelActor
from glm_batch.pipelines.tasks.affinity import Affinity, prefix_key


class ByAffinity(ray_private.ExecutionCallback):
    """Ray Data makes one for each execution of a dataset whose context names the class."""

    def before_execution_starts(self, executor: Any) -> None:
        # the class' name is part of the name of the operator that runs it
        ray_private.choose_actors(executor, ModelActor.__name__, _affine)


def _affine() -> ray_private.Choose:
    affinity: Affinity[Any] = Affinity()

    def choose(schema: Any, units: Mapping[Any, int], most: int) -> Any:
        key = prefix_key(schema)
        return NotImplemented if key is None else affinity.choose(key, units, most)

    return choose
