"""The Ray cluster a job runs on: an existing one, or a small quiet one on this machine.

Owns every setting of Ray itself, and says what machines there are: pipelines.cluster.shares deals
them out. Imports ray inside functions only.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil

import glm_batch
from glm_batch.glm_actors.faults.startup import loading
from glm_batch.glm_actors.ray_private import ALONE, NODE_ADDRESS
from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.cluster.shares import Node, Workers, share_out
from glm_batch.pipelines.job import Job

LOOPBACK = "127.0.0.1"
TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
MIN_LOGICAL_CPUS = 2
FOUND_HERE = "auto"  # the Ray that this machine has
NO_OPTIONS: dict[str, Any] = {}
OBJECT_STORE_SHARE = 0.1
MIN_OBJECT_STORE_BYTES, MAX_OBJECT_STORE_BYTES = 200 << 20, 2 << 30


@contextmanager
def cluster(*, found: bool = False) -> Iterator[None]:
    """Ray for the duration of a job. Only a cluster that this call started ends with it.

    With `found` none is started: raises ConfigError where none runs.
    """
    address = os.environ.get("RAY_ADDRESS") or (FOUND_HERE if found else None)
    inside = address is None or address == FOUND_HERE or address.startswith(LOOPBACK)
    with loading(), enclosed() if inside else nullcontext(NO_OPTIONS) as enclosure:
        import ray

        running = ray.is_initialized()
        if not running:
            _start(address, enclosure)
    if running:
        yield
        return
    try:
        yield
    finally:
        ray.shutdown()


def job_workers(job: Job, *, beside_app: bool = False) -> Workers:
    """How many processes each stage gets, and what each asks for. Raises ConfigError."""
    if not beside_app:
        return share_out(job, cluster_nodes())
    import ray

    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return share_out(job, cluster_nodes(), beside_app=free.get("CPU", 0.0))


def cluster_nodes() -> tuple[Node, ...]:
    """The cluster's machines. Ray may have been told of more CPUs than this one has cores."""
    import ray

    here, cores = ray.get_runtime_context().get_node_id(), os.cpu_count() or 1
    found = []
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        resources = node["Resources"]
        cpus = float(resources.get("CPU", 0))
        if node["Alive"] and cpus:
            own = min(cores, int(cpus)) if node["NodeID"] == here else int(cpus)
            found.append(Node(cores=max(1, own), cpus=cpus, gpus=int(resources.get("GPU", 0))))
    return tuple(found)


@contextmanager
def enclosed() -> Iterator[dict[str, Any]]:
    """Options for `ray.init`, which belongs inside: a cluster of our own listens on this machine
    alone, and answers nobody but this user. Ray reads the environment as it is imported, so enter
    it before.

    Ray itself turns tokens on for a cluster that `ray.init` starts, unless RAY_AUTH_MODE says
    otherwise.
    """
    _have_token()
    before = os.environ.get(ALONE)
    # Ray's processes inherit it; whatever else this process starts must not
    os.environ[ALONE] = "0"
    try:
        yield {NODE_ADDRESS: LOOPBACK}
    finally:
        del os.environ[ALONE]
        if before is not None:
            os.environ[ALONE] = before


def _have_token() -> None:
    """A token where Ray looks for it, readable by this user alone."""
    if any(name in os.environ for name in TOKEN_VARIABLES):
        return
    try:
        path = Path.home() / ".ray" / "auth_token"
        if not path.exists():
            _write_once(path, secrets.token_hex(32))
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except (OSError, RuntimeError):
        # no home, or none to write to: this cluster has a token that no file holds
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _write_once(path: Path, text: str) -> None:
    """The whole file or none, and the first of several writers wins."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(dir=path.parent)  # mode 600
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        os.unlink(draft)


def _start(address: str | None, enclosure: Mapping[str, Any]) -> None:
    """Joins the cluster at `address`, or else starts one of its own.

    Raises ConfigError where there is none to join.
    """
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's core warns on the terminal about the very way in which Ray Data starts its actors.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    _quiet()
    if address:
        try:
            ray.init(
                address=address,
                logging_level=logging.ERROR,
                log_to_driver=False,
                runtime_env=_shipped_code(),
            )
        except ConnectionError as error:
            where = "on this machine" if address == FOUND_HERE else f"at RAY_ADDRESS={address}"
            raise ConfigError(f"no Ray cluster answers {where}: {error}") from error
        return
    memory = int(psutil.virtual_memory().total * OBJECT_STORE_SHARE)
    with _without_lines(b"RAY_BACKEND_LOG_LEVEL"):
        ray.init(
            address="local",
            num_cpus=max(MIN_LOGICAL_CPUS, os.cpu_count() or 1),
            object_store_memory=min(max(memory, MIN_OBJECT_STORE_BYTES), MAX_OBJECT_STORE_BYTES),
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            **enclosure,
        )


def _quiet() -> None:
    """Keeps Ray Data's steps off the terminal; its file in Ray's session has them."""
    import ray.data

    assert ray.data is not None  # importing it is what sets its handlers up
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)


@contextmanager
def _without_lines(marker: bytes) -> Iterator[None]:
    """Passes on what is written to file descriptor 2, but for lines with `marker`.

    Ray's core announces its log level there, out of reach of Python's logging.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            os.write(2, b"".join(line for line in held if marker not in line))


def _shipped_code() -> dict[str, object]:
    """A remote worker gets this very code, whatever version it may have installed."""
    # By path: Ray copies what it merges into a submitted job's own environment, and modules cannot
    # be copied.
    return {"py_modules": [glm_batch.__path__[0]]}
