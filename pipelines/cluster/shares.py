"""What each stage of a job gets of a cluster: how many processes, what each asks Ray for, and where
they come to lie.

Pure arithmetic on a description of the cluster, so that a plan can be made for one that is not
there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.tasks.job_media import reads_media

PREPROCESSORS_PER_CORE = 0.25
# beside an engine on the same cores; beside one on a GPU, all cores but
MEDIA_PREPROCESSORS_PER_CORE = 0.5
CORES_PER_GPU_REPLICA = 2
COMMITTERS_PER_CORE = 0.125
MAX_CPUS_EACH = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine: the cores that it has, what Ray counts as CPUs on it, its GPUs."""

    cores: int
    cpus: float
    gpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """How many processes a stage gets, and what each of them may use.

    A replica asks for the GPUs of all its ranks at once, so that they lie on one machine.
    `cpus_each` are logical CPUs, which only tell Ray that all processes fit, also when a machine is
    lost: it spreads them evenly, and their numbers are such that they share the real cores.
    """

    preprocessors: int
    committers: int
    min_replicas: int
    replicas: int  # the most
    cpus_each: float
    gpus_per_replica: int
    threads_per_rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What lies on one machine."""

    replicas: int
    preprocessors: int


def share_out(job: Job, nodes: tuple[Node, ...], *, beside_app: float | None = None) -> Workers:
    """Raises ConfigError where the fewest replicas do not fit.

    `beside_app` are the logical CPUs that a live application leaves; its replicas do the models'
    work, and ours only feed them.
    """
    cores, cpus = sum(node.cores for node in nodes), sum(node.cpus for node in nodes)
    ranks, on_gpus = job.engine.tensor_parallel_size, uses_gpus(job, nodes)
    if beside_app is not None:
        cpus, on_gpus = beside_app, False
    # One worker feeds an application: two would not know which of them lost it a replica.
    fewest, most = _replicas(job, nodes, on_gpus) if beside_app is None else (1, 1)
    committers = max(1, int(cores * COMMITTERS_PER_CORE))
    preprocessors = _preprocessors(job, cores, most, on_gpus)
    on_one_node = -(-most // len(nodes))
    return Workers(
        preprocessors=preprocessors,
        committers=committers,
        min_replicas=fewest,
        replicas=most,
        # All of them must fit at once: a stage that finds no CPU left would stall the others.
        cpus_each=min(
            MAX_CPUS_EACH, math.floor(1000 * cpus / (preprocessors + committers + most + 1)) / 1000
        ),
        gpus_per_replica=ranks if on_gpus else 0,
        threads_per_rank=max(1, min(node.cores for node in nodes) // (on_one_node * ranks)),
    )


def uses_gpus(job: Job, nodes: tuple[Node, ...]) -> bool:
    """Whether the engine runs on GPUs of the cluster. "auto" takes them where there are any."""
    if job.engine.kind == "echo" or job.engine.device == "cpu":
        return False
    return job.engine.device != "auto" or any(node.gpus for node in nodes)


def placed(workers: Workers, nodes: tuple[Node, ...]) -> list[Load]:
    """Where Ray puts replicas and preprocessing workers: where are fewest and there is room."""
    gpus = [node.gpus for node in nodes]
    replicas, preprocessors = [0] * len(nodes), [0] * len(nodes)
    for _ in range(workers.replicas):
        place = min(
            (i for i in range(len(nodes)) if gpus[i] >= workers.gpus_per_replica),
            key=lambda i: replicas[i],
        )
        replicas[place] += 1
        gpus[place] -= workers.gpus_per_replica
    for _ in range(workers.preprocessors):
        preprocessors[preprocessors.index(min(preprocessors))] += 1
    return [Load(replicas=r, preprocessors=p) for r, p in zip(replicas, preprocessors, strict=True)]


def _replicas(job: Job, nodes: tuple[Node, ...], on_gpus: bool) -> tuple[int, int]:
    fewest, most = job.engine.replica_range
    if not on_gpus:
        return fewest, most
    ranks = job.engine.tensor_parallel_size
    room = sum(node.gpus // ranks for node in nodes)
    if room < fewest:
        raise ConfigError(
            f"engine.replicas: {_counted(fewest, 'replica')} of {_counted(ranks, 'GPU')} on one "
            f"machine each are asked for, but the cluster has room for {room} (GPUs of its "
            f"machines: {', '.join(str(node.gpus) for node in nodes)}); lower engine.replicas or "
            "engine.tensor_parallel_size, or set engine.device: cpu"
        )
    return fewest, min(most, room)


def _preprocessors(job: Job, cores: int, replicas: int, on_gpus: bool) -> int:
    if job.preprocess.workers != "auto":
        return job.preprocess.workers
    if not reads_media(job, job.model):
        return max(1, int(cores * PREPROCESSORS_PER_CORE))
    free = (
        cores - CORES_PER_GPU_REPLICA * replicas
        if on_gpus
        else int(cores * MEDIA_PREPROCESSORS_PER_CORE)
    )
    return max(1, free)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
