"""The cluster that is killed, the seed, and the table of what the kills came to.

Tests with the mark `faults` take long: they run where `-m faults` asks for them, as `make
test-faults` does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from rich.console import Console
from rich.table import Table

from tests.faults.campaign import HEADINGS, Tally
from tests.faults.places import Farm

SEED_VARIABLE = "GLM_BATCH_FAULTS_SEED"
TALLIES = pytest.StashKey[list[Tally]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "faults" in config.getoption("markexpr"):
        return
    long = [item for item in items if item.get_closest_marker("faults")]
    items[:] = [item for item in items if item not in long]
    config.hook.pytest_deselected(items=long)


def pytest_terminal_summary(config: pytest.Config) -> None:
    tallies = config.stash.get(TALLIES, [])
    if not tallies:
        return
    kills = sum(tally.kills.total() for tally in tallies)
    table = Table(*HEADINGS, title=f"{kills} kills that hit, {SEED_VARIABLE}={seed_in_use()}")
    for tally in tallies:
        table.add_row(*tally.cells())
    console = Console(width=150)
    console.print()
    console.print(table)


def seed_in_use() -> int:
    return int(os.environ.get(SEED_VARIABLE, "1"))


@pytest.fixture(scope="session")
def seed() -> int:
    return seed_in_use()


@pytest.fixture(scope="session")
def farm() -> Iterator[Farm]:
    with Farm() as farm:
        yield farm


@pytest.fixture
def small_farm() -> Iterator[Farm]:
    """One node beside the head."""
    with Farm(num_nodes=1) as farm:
        yield farm


@pytest.fixture
def tallies(request: pytest.FixtureRequest) -> list[Tally]:
    """To be added to: what is printed at the end."""
    return request.config.stash.setdefault(TALLIES, [])
