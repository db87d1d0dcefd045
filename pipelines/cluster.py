"""The Ray cluster a job runs on: an existing one, or a small quiet one on this machine; and each stage's share of it.

Owns every setting of Ray itself. Imports ray inside functions only. Knows nothing of rows.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil

from pipelines.job import Job

if TYPE_CHECKING:
    from pipelines.stages import Workers

MIN_LOGICAL_CPUS = 2
OBJECT_STORE_SHARE = 0.1
MIN_OBJECT_STORE_BYTES, MAX_OBJECT_STORE_BYTES = 200 << 20, 2 << 30
PREPROCESSORS_PER_CORE = 0.25


@contextmanager
def cluster() -> Iterator[None]:
    """Ray for the duration of a job. A cluster that this call started ends with it; another one is left alone."""
    import ray

    if ray.is_initialized():
        yield
        return
    _start()
    try:
        yield
    finally:
        ray.shutdown()


def job_workers(job: Job) -> Workers:
    """How many processes each stage gets on this cluster."""
    import ray

    from pipelines.stages import Workers

    cores = os.cpu_count() or 1
    replicas = job.engine.replicas
    auto = max(1, int(cores * PREPROCESSORS_PER_CORE))
    wants_gpu = job.engine.device.startswith("cuda") or job.engine.device == "auto"
    has_gpus = ray.cluster_resources().get("GPU", 0) >= replicas * job.engine.tensor_parallel_size
    gpus = job.engine.tensor_parallel_size if wants_gpu and has_gpus and job.engine.kind != "echo" else 0
    return Workers(
        preprocessors=auto if job.preprocess.workers == "auto" else job.preprocess.workers,
        replicas=replicas,
        gpus_per_replica=gpus,
        threads_per_replica=max(1, cores // replicas),
    )


def _start() -> None:
    import ray

    # The package versions that a worker imports are the driver's; usage reports and progress bars are not wanted.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    _quiet()
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, runtime_env=_shipped_code())
        return
    memory = int(psutil.virtual_memory().total * OBJECT_STORE_SHARE)
    ray.init(
        num_cpus=max(MIN_LOGICAL_CPUS, os.cpu_count() or 1),
        object_store_memory=min(max(memory, MIN_OBJECT_STORE_BYTES), MAX_OBJECT_STORE_BYTES),
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )


def _quiet() -> None:
    """Ray Data tells of every step at INFO; the job's own display says what a user wants to know."""
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _shipped_code() -> dict[str, object]:
    """A remote worker gets this very code, whatever it may have under the same generic names."""
    import glm_actors
    import models
    import pipelines

    return {"py_modules": [models, glm_actors, pipelines]}
