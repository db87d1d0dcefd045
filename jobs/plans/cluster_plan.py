"""What `glm-batch plan` says of the cluster: where replicas, their ranks and preprocessing workers
would lie.

For the machines of the `cluster:` section, which need not be there, or for this one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import groupby

from glm_batch.jobs.checks.engine_checks import num_gpus
from glm_batch.pipelines.cluster.shares import Load, Node, Workers, placed, share_out
from glm_batch.pipelines.job import Job


def described_nodes(job: Job) -> tuple[Node, ...]:
    """The machines of the `cluster:` section; what it leaves open is as on this machine."""
    section = job.cluster
    cores = (os.cpu_count() or 1) if section.cpus == "auto" else section.cpus
    gpus = num_gpus() if section.gpus == "auto" else section.gpus
    return (Node(cores=cores, cpus=float(cores), gpus=gpus),) * (
        1 if section.nodes == "auto" else section.nodes
    )


def cluster_lines(job: Job) -> Iterator[tuple[str, str]]:
    """Name and text of each line. Raises ConfigError where the job does not fit."""
    nodes = described_nodes(job)
    workers = share_out(job, nodes)
    node = nodes[0]
    section = job.cluster
    where = "this machine: " if section.nodes == section.cpus == section.gpus == "auto" else ""
    yield (
        "cluster",
        (
            f"{where}{_count(len(nodes), 'node')} of {_count(node.cores, 'core')} and "
            f"{_count(node.gpus, 'GPU')}"
        ),
    )
    yield "replicas", _replica_text(job, workers, nodes)
    # Nodes with the same load stand together.
    loads = list(enumerate(placed(workers, nodes), start=1))
    if len(nodes) > 1:
        for load, group in groupby(loads, key=lambda numbered: numbered[1]):
            numbers = [number for number, _ in group]
            name = (
                f"node {numbers[0]}"
                if len(numbers) == 1
                else f"nodes {numbers[0]} to {numbers[-1]}"
            )
            yield f"  {name}", _load_text(load, workers, node)


def _replica_text(job: Job, workers: Workers, nodes: tuple[Node, ...]) -> str:
    ranks = job.engine.tensor_parallel_size
    fewest, most = workers.min_replicas, workers.replicas
    count = _count(most, "replica") if fewest == most else f"{fewest} to {most} replicas"
    each = f"{_count(ranks, 'rank')}, " if ranks > 1 else ""
    device = f"{_count(ranks, 'GPU')} on one node" if workers.gpus_per_replica else "no GPU"
    idle = sum(node.gpus for node in nodes) - most * workers.gpus_per_replica
    rest = f"; {_count(idle, 'GPU')} left over" if idle and workers.gpus_per_replica else ""
    threads = (
        f"{each}{device}, "
        f"{_count(workers.threads_per_rank, 'thread')}{' a rank' if ranks > 1 else ''}"
    )
    return f"{count} of {threads}{rest}; {_processes(workers)}"


def _processes(workers: Workers) -> str:
    return (
        f"{workers.preprocessors} preprocessing and {workers.committers} committing workers "
        f"({workers.cpus_each:g} logical CPUs each)"
    )


def _load_text(load: Load, workers: Workers, node: Node) -> str:
    gpus = (
        f" on {load.replicas * workers.gpus_per_replica} of {node.gpus} GPUs"
        if workers.gpus_per_replica
        else ""
    )
    return f"{_count(load.replicas, 'replica')}{gpus}, {load.preprocessors} preprocessing workers"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
