"""SIGKILL at random moments, of everything that a job consists of: nothing is lost, nothing comes
twice.

The kills follow from a seed: GLM_BATCH_FAULTS_SEED. Where exactly they hit depends on the machine.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.campaign import Tally, run_campaign
from tests.faults.checks import Workload
from tests.faults.places import Farm, Laptop
from tests.faults.workloads import (
    ECHO_PACE,
    TINY_PACE,
    echo_job,
    tiny_choose_job,
    tiny_generate_job,
    undisturbed,
    undisturbed_here,
)

WORKERS = ["preprocessor", "model", "committer"]
EVERYTHING = ["driver", *WORKERS, "node"]
LONG = [pytest.mark.faults, pytest.mark.timeout(1200)]


@pytest.fixture(scope="session")
def echo_workload(
    echo_checkpoint: Path, farm: Farm, tmp_path_factory: pytest.TempPathFactory
) -> Workload:
    folder = tmp_path_factory.mktemp("echo")
    return undisturbed(echo_job(echo_checkpoint, folder, 2500), ECHO_PACE, farm, folder)


@pytest.mark.usefixtures("ray_cluster")
def test_a_few_kills_of_everything_change_no_record(
    echo_checkpoint: Path, small_farm: Farm, tallies: list[Tally], seed: int, tmp_path: Path
) -> None:
    job = echo_job(echo_checkpoint, tmp_path, 800, unit_rows=8, every_seconds=0.2)
    workload = undisturbed_here(job, tmp_path / "undisturbed")
    tallies.append(run_campaign("a few", small_farm, workload, EVERYTHING, 10, seed, tmp_path))


@pytest.mark.parametrize(
    ("name", "targets", "wanted"),
    [
        pytest.param(name, targets, wanted, marks=LONG, id=name.replace(" ", "-"))
        for name, targets, wanted in [
            ("driver", ["driver"], 40),
            ("preprocessor", ["preprocessor"], 35),
            ("model actor", ["model"], 35),
            ("committer", ["committer"], 35),
            ("node", ["node"], 12),
            ("everything", EVERYTHING, 40),
        ]
    ],
)
def test_kills_on_a_cluster(
    name: str, targets: list[str], wanted: int, farm: Farm, echo_workload: Workload, tallies: list[Tally], seed: int,
    tmp_path: Path,
) -> None:  # fmt: skip
    tallies.append(run_campaign(name, farm, echo_workload, targets, wanted, seed, tmp_path))


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_kills_in_long_units(
    echo_checkpoint: Path, farm: Farm, tallies: list[Tally], seed: int, tmp_path: Path
) -> None:
    """Units that are in the engine for longer than commit.every_seconds, so that the journal has
    its part in it.
    """
    job = echo_job(echo_checkpoint, tmp_path, 2500, unit_rows=25, every_seconds=0.3)
    workload = undisturbed(job, ECHO_PACE, farm, tmp_path / "undisturbed")
    tallies.append(run_campaign("long units", farm, workload, EVERYTHING, 20, seed, tmp_path))


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_kills_on_a_laptop(
    echo_workload: Workload, tallies: list[Tally], seed: int, tmp_path: Path
) -> None:
    targets = ["driver", *WORKERS]
    tallies.append(run_campaign("laptop", Laptop(), echo_workload, targets, 16, seed, tmp_path))


@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["choose", "generate"])
def test_kills_with_real_weights(
    kind: str, farm: Farm, tallies: list[Tally], seed: int, tmp_path: Path
) -> None:
    """Greedy choices, and texts that are sampled with a seed."""
    job = tiny_choose_job() if kind == "choose" else tiny_generate_job()
    workload = undisturbed(job, TINY_PACE, farm, tmp_path / "undisturbed")
    tallies.append(run_campaign(f"tiny {kind}", farm, workload, EVERYTHING, 12, seed, tmp_path))
