"""Where jobs are run to be killed: a Ray cluster of several nodes on this machine, or the driver's
own local Ray.

Owns finding a stage's workers among this place's processes, by the titles that Ray gives them, and
killing for real: a kill counts only where the process was there to be hit. Touches no process of
any other Ray.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol
from unittest.mock import patch

import psutil

ROOT = Path(__file__).parents[2]
ROLES = {  # by titles like "ray::MapWorker(ReadUnits->MapBatches(Preprocessor)).submit"
    role: re.compile(rf"ray::MapWorker\(.*\({name}\)")
    for role, name in {
        "preprocessor": "Preprocessor",
        "model": "ModelActor",
        "committer": "Committer",
    }.items()
}
NODE_CPUS, OBJECT_STORE = 3, 100 << 20
# Ray's own values take 15 s and more to find a dead node.
QUICK_TO_NOTICE = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 4,
}


class Place(Protocol):
    """Somewhere to start drivers, whose workers can be found."""

    def environment(self) -> dict[str, str]:
        """What a driver must be told to run here."""

    def workers(self, driver: subprocess.Popen[bytes], role: str) -> list[psutil.Process]:
        """The living processes that have this role in a stage, of this driver's job or an earlier
        one's.
        """

    def kill_node(self, driver: subprocess.Popen[bytes], chance: random.Random) -> bool:
        """SIGKILLs a node that has a stage's worker, all its processes, and adds another. False:
        there was none.
        """


class Laptop:
    """The driver starts a Ray of its own and takes it with it when it dies."""

    def environment(self) -> dict[str, str]:
        return _environment(None)

    def workers(self, driver: subprocess.Popen[bytes], role: str) -> list[psutil.Process]:
        return list(_with_title(_family(driver.pid), ROLES[role]))

    def kill_node(self, driver: subprocess.Popen[bytes], chance: random.Random) -> bool:
        raise AssertionError("a laptop's only node is the driver's own")


class Farm:
    """A head node without CPUs, to which drivers connect, and worker nodes that can be killed. A
    context.
    """

    def __init__(self, num_nodes: int = 2, object_store: int = OBJECT_STORE) -> None:
        self._num_nodes, self._object_store = num_nodes, object_store

    def __enter__(self) -> Farm:
        from ray.cluster_utils import Cluster

        # Ray would tell every other `ray.init()` on this machine to join this cluster.
        with patch("ray._private.utils.write_ray_address"):
            head = {"num_cpus": 0, "include_dashboard": False, "_system_config": QUICK_TO_NOTICE}
            self._cluster: Any = Cluster(
                initialize_head=True,
                head_node_args=head | {"object_store_memory": self._object_store},
            )
        for _ in range(self._num_nodes):
            self._add_node()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cluster.shutdown()

    def environment(self) -> dict[str, str]:
        return _environment(self._cluster.address)

    def workers(self, driver: subprocess.Popen[bytes], role: str) -> list[psutil.Process]:
        return [
            each
            for node in self._nodes()
            for each in _with_title(_family(_raylet(node)), ROLES[role])
        ]

    def kill_node(self, driver: subprocess.Popen[bytes], chance: random.Random) -> bool:
        nodes = [
            node
            for node in self._nodes()
            if any(_with_title(_family(_raylet(node)), *ROLES.values()))
        ]
        if not nodes:
            return False
        node = chance.choice(nodes)
        hits = [kill(each) for each in _family(_raylet(node))]
        self._cluster.remove_node(node, allow_graceful=False)
        self._add_node()
        return hits[0]

    def spilled_mib(self) -> int:
        """What has gone through the disk so far because an object store was full, by the words of
        Ray's logs.
        """
        logs = Path(self._cluster.head_node.get_session_dir_path(), "logs").glob("raylet*.out")
        return sum(
            int(spilled)
            for log in logs
            for spilled in re.findall(r"Spilled (\d+) MiB", log.read_text())[-1:]
        )

    def _nodes(self) -> list[Any]:
        return sorted(self._cluster.worker_nodes, key=_raylet)

    def _add_node(self) -> None:
        self._cluster.add_node(num_cpus=NODE_CPUS, object_store_memory=self._object_store)


def kill(process: psutil.Process) -> bool:
    """SIGKILL. False where there was nobody to be hit."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return True


def _raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def _family(pid: int) -> list[psutil.Process]:
    """A process and its descendants, itself first."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _with_title(
    processes: Iterable[psutil.Process], *titles: re.Pattern[str]
) -> Iterator[psutil.Process]:
    for process in processes:
        try:
            title = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if any(known.match(title) for known in titles):
            yield process


def _environment(address: str | None) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "PYTHONFAULTHANDLER": "1"
    }
    return (
        own
        | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
        | ({"RAY_ADDRESS": address} if address else {})
    )


def driver_command(pace: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "tests.faults.driver", pace, *arguments]
