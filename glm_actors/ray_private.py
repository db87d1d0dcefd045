"""Every use of Ray's private names, for what Ray has no public way to do. Written for Ray 2.60.

tests/glm_actors/test_ray_private.py says which of them another version of Ray has changed. Ray is
imported inside functions only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

# An environment variable: Ray puts a loopback address aside for one that other machines reach,
# unless it is told with "0" that there are no others.
ALONE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
NODE_ADDRESS = "_node_ip_address"  # an option of ray.init: where the cluster's processes listen
POOL = "_actor_pool"
IN_FLIGHT = "_alive_actors_to_in_flight_tasks_heap"
EXECUTOR = "_current_executor"
BIND = "add_port_to_grpc_server"
# Of a table's schema, the units at work by actor, and the most that one may have: the actor, None
# for none now; NotImplemented leaves the choice to Ray.
Choose = Callable[[Any, Mapping[Any, int], int], Any]


class ExecutionCallback:
    """What Ray Data calls of each class in a context's `custom_execution_callback_classes`."""

    def before_execution_starts(self, executor: Any) -> None: ...
    def on_execution_step(self, executor: Any) -> None: ...
    def after_execution_succeeds(self, executor: Any) -> None: ...
    def after_execution_fails(self, executor: Any, error: Exception) -> None: ...


def choose_actors(executor: Any, worker: str, choose: Callable[[], Choose]) -> None:
    """Lets one `choose()` for each pool of `worker`s say which actor gets a block.

    Ray Data gives blocks to the least busy one, as it goes on doing where these names are gone.
    """
    for operator in getattr(executor, "_topology", None) or ():
        pool = getattr(operator, POOL, None)
        if worker in operator.name and hasattr(pool, IN_FLIGHT):
            _choose_from(pool, choose())


def _choose_from(pool: Any, choose: Choose) -> None:
    least_busy = pool.select_actors

    def select_actors(bundle: Any = None, actor_locality_enabled: bool = False) -> Any:
        units = {actor: int(rank) for actor, rank in getattr(pool, IN_FLIGHT).items()}
        most = pool.max_tasks_in_flight_per_actor()
        chosen = choose(getattr(bundle, "schema", None), units, most)
        if chosen is NotImplemented:
            return least_busy(bundle, actor_locality_enabled)
        return chosen

    pool.select_actors = select_actors


def end_execution(dataset: Any, timeout_s: float) -> None:
    """Frees the actors of a dataset that is read no further: a cluster that outlives us must not
    go on with it.
    """
    executor = getattr(dataset, EXECUTOR, None)
    if executor is not None:
        executor.shutdown(force=True)
        # Ray waits for its thread for 2 s only; one that is still in Ray's core when that ends
        # aborts the process.
        executor.join(timeout=timeout_s)


def bind_replicas_to(address: str) -> None:
    """Ray Serve has each replica listen on all interfaces; those of this process, whose port is
    bound after the constructor, then listen on `address` alone.
    """
    from ray.serve._private import replica

    bind = vars(replica)[BIND]
    vars(replica)[BIND] = lambda server, _: bind(server, f"{address}:0")
