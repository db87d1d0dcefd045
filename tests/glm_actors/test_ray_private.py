"""The private names of Ray that one module uses are there, and no other module uses any."""

from __future__ import annotations

import inspect
import re
import tomllib
from importlib import import_module
from importlib.metadata import version

import pytest
import ray
from packaging.requirements import Requirement

from glm_batch.glm_actors import ray_private
from tests.test_imports import FILES, ROOT

POOL = "ray.data._internal.execution.operators.actor_pool_map_operator"
# (where, the name, what of ours ends without it)
NAMES = [
    (f"{POOL}:_ActorPool", "select_actors", "units go to the replica that knows their prefix"),
    (f"{POOL}:_ActorPool", "max_tasks_in_flight_per_actor", "the same"),
    ("ray.data._internal.execution.streaming_executor:StreamingExecutor", "shutdown", "the same"),
    ("ray.data._internal.execution.streaming_executor:StreamingExecutor", "join", "the same"),
    ("ray.serve._private.replica", ray_private.BIND, "replicas that listen on loopback alone"),
    ("ray._private.ray_constants", "ENABLE_RAY_CLUSTERS_ENV_VAR", "a cluster on loopback alone"),
]
# (where, a name in its text, what of ours ends without it)
TEXTS = [
    (f"{POOL}:_ActorPool", f"self.{ray_private.IN_FLIGHT}", NAMES[0][2]),
    (f"{POOL}:ActorPoolMapOperator", f"self.{ray_private.POOL}", NAMES[0][2]),
    ("ray.data._internal.execution.streaming_executor", "self._topology", NAMES[0][2]),
    ("ray.data.context", "custom_execution_callback_classes", NAMES[0][2]),
    ("ray.data:Dataset", f"self.{ray_private.EXECUTOR}", "ending a run early"),
    ("ray._private.worker:init", ray_private.NODE_ADDRESS, "a cluster on loopback alone"),
    ("ray._private.ray_constants", ray_private.ALONE, "a cluster on loopback alone"),
]
PRIVATE = re.compile(
    r"\bray(\.\w+)*\._\w+|(?<!get)_node_ip_address|_system_config|_current_executor|_actor_pool\b"
    r"|_alive_actors|\._topology|RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
)


def found(where: str) -> object:
    module, _, name = where.partition(":")
    return getattr(import_module(module), name) if name else import_module(module)


@pytest.mark.parametrize(("where", "name", "lost"), NAMES)
def test_ray_has_the_private_names(where: str, name: str, lost: str) -> None:
    assert hasattr(found(where), name), f"Ray {ray.__version__}: {where}.{name} is gone: {lost}"


@pytest.mark.parametrize(("where", "text", "lost"), TEXTS)
def test_ray_still_uses_the_names(where: str, text: str, lost: str) -> None:
    source = inspect.getsource(found(where))  # type: ignore[arg-type]
    assert text in source, f"Ray {ray.__version__}: {where} has no {text} any more: {lost}"


def test_ray_data_calls_what_the_callback_has() -> None:
    from ray.data._internal.execution import execution_callback

    for name, theirs in vars(execution_callback.ExecutionCallback).items():
        if not name.startswith("_"):
            ours = getattr(ray_private.ExecutionCallback, name, None)
            assert ours is not None, f"Ray {ray.__version__} calls {name}, which ours has not"
            assert [*inspect.signature(ours).parameters] == [*inspect.signature(theirs).parameters]


def test_one_module_has_all_private_names() -> None:
    users = [str(path) for path in FILES if PRIVATE.search((ROOT / path).read_text())]
    assert users == ["glm_actors/ray_private.py"]


def test_ray_is_bounded_to_the_version_that_was_tried() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (bound,) = (
        each.specifier for each in map(Requirement, project["dependencies"]) if each.name == "ray"
    )
    assert version("ray") in bound
    assert "2.61.0" not in bound
