"""What stages get of clusters, most of which are not here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.cluster.shares import Load, Node, placed, share_out
from glm_batch.pipelines.job import EngineSection, Job, PreprocessSection, TaskConfig

LAPTOP = (Node(cores=2, cpus=2.0, gpus=0),)
GPU_NODE = Node(cores=64, cpus=64.0, gpus=8)


def job(image: str | None = None, **engine: Any) -> Job:
    task = TaskConfig(kind="choose", prompt="{text}", labels=["a", "b"], image=image)
    return Job(model="model", input=["in"], output="out", task=task, engine=EngineSection(**engine))


def test_everything_fits_on_a_small_machine_at_once() -> None:
    workers = share_out(job(), LAPTOP)
    processes = workers.preprocessors + workers.committers + workers.replicas
    assert (processes + 1) * workers.cpus_each <= 2
    assert (workers.gpus_per_replica, workers.threads_per_rank) == (0, 2)


def test_ranks_and_replicas_share_the_cores() -> None:
    assert (
        share_out(
            job(tensor_parallel_size=2), (Node(cores=16, cpus=16.0, gpus=0),)
        ).threads_per_rank
        == 8
    )
    assert (
        share_out(
            job(tensor_parallel_size=2, replicas=4), (Node(cores=16, cpus=16.0, gpus=0),)
        ).threads_per_rank
        == 2
    )
    assert (
        share_out(job(replicas=2), (Node(cores=16, cpus=16.0, gpus=0),) * 2).threads_per_rank == 16
    )


@pytest.mark.parametrize(
    ("ranks", "replicas", "loads"),
    [(1, 16, [8, 8]), (4, 4, [2, 2]), (4, 3, [2, 1]), (8, 2, [1, 1]), (3, 4, [2, 2])],
)
def test_replicas_lie_whole_on_their_nodes(ranks: int, replicas: int, loads: list[int]) -> None:
    nodes = (GPU_NODE, GPU_NODE)
    workers = share_out(job(image="picture", tensor_parallel_size=ranks, replicas=replicas), nodes)
    found = placed(workers, nodes)
    assert [load.replicas for load in found] == loads
    assert all(load.replicas * workers.gpus_per_replica <= GPU_NODE.gpus for load in found)
    # All cores but two for each replica prepare images, on both nodes alike.
    assert workers.preprocessors == 128 - 2 * replicas
    assert [load.preprocessors for load in found] == [64 - replicas] * 2
    # A node that is lost takes none of the others' room.
    all_cpus = (workers.preprocessors + workers.committers + 1) * workers.cpus_each
    assert all_cpus <= GPU_NODE.cpus


def test_a_node_too_small_for_a_replica_gets_none() -> None:
    nodes = (Node(cores=8, cpus=8.0, gpus=2), Node(cores=8, cpus=8.0, gpus=4))
    workers = share_out(job(tensor_parallel_size=4), nodes)
    assert placed(workers, nodes) == [
        Load(replicas=0, preprocessors=2),
        Load(replicas=1, preprocessors=2),
    ]


def test_a_range_of_replicas_ends_where_the_gpus_do() -> None:
    workers = share_out(job(tensor_parallel_size=4, replicas=(2, 100)), (GPU_NODE, GPU_NODE))
    assert (workers.min_replicas, workers.replicas) == (2, 4)
    workers = share_out(job(replicas=(1, 3)), LAPTOP)
    assert (workers.min_replicas, workers.replicas) == (1, 3)


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        (
            {"replicas": 17},
            "17 replicas of 1 GPU on one machine each are asked for, but the cluster has room for 16",
        ),
        (
            {"tensor_parallel_size": 16},
            "1 replica of 16 GPUs on one machine .* room for 0 .GPUs of its machines: 8, 8",
        ),
    ],
)
def test_what_does_not_fit_is_refused(engine: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        share_out(job(**engine), (GPU_NODE, GPU_NODE))


def test_gpus_are_left_alone_where_they_are_not_wanted() -> None:
    for engine in ({"device": "cpu"}, {"kind": "echo"}):
        assert share_out(job(**engine), (GPU_NODE,)).gpus_per_replica == 0
    with pytest.raises(ConfigError, match="room for 0"):
        share_out(job(device="cuda"), LAPTOP)


def test_a_number_of_workers_is_taken_as_it_is() -> None:
    asked = replace(job(image="picture"), preprocess=PreprocessSection(workers=5))
    assert share_out(asked, (GPU_NODE, GPU_NODE)).preprocessors == 5


def test_one_worker_feeds_an_application() -> None:
    """Several blamed each other's rows for the replicas that one of them had lost."""
    workers = share_out(job(replicas=(2, 3)), LAPTOP, beside_app=2.0)
    assert (workers.min_replicas, workers.replicas, workers.gpus_per_replica) == (1, 1, 0)
