"""Campaigns: jobs whose processes are killed at seeded random moments, and rerun until they are
finished.

Owns the schedule of the kills, the reruns, and the figures that come of them. What is expected of
the outputs lies in tests.faults.checks, how processes are found and killed in tests.faults.places.
"""

from __future__ import annotations

import itertools
import random
import signal
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import psutil
import yaml

from tests.faults.checks import Workload, check_output
from tests.faults.driver import HURRY, completed_rows
from tests.faults.places import ROLES, ROOT, Place, driver_command, kill

POLL_S = 0.05
MAX_DELAY_S = 1.5
STALLED_S = 150.0  # without a commit or the driver's end: a job that hangs
# A worker's death is held against the rows it had in flight. So that no row is ever held guilty of
# ours, no role dies more often than this before the suspects of earlier deaths can have been
# cleared: when CALM more units are committed.
BURST, CALM = 2, 12
GIVEN_UP = 2  # drivers of a campaign that may end of themselves

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """A kill to come: of what, how long after it can be met; `early` ones may hit a driver before
    its first commit.
    """

    target: str
    delay_s: float
    early: bool


@dataclass(slots=True, kw_only=True)
class Tally:
    """What a campaign has come to. `recovered_s` are the seconds from each kill to the next commit
    after it.
    """

    name: str
    kills: Counter[str] = field(default_factory=Counter)
    jobs: int = 0
    reruns: int = 0
    given_up: int = 0
    rows_again: int = 0
    recovered_s: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def cells(self) -> list[str]:
        hits, times = self.kills.total(), self.recovered_s or [0.0]
        return [
            self.name, str(hits), " ".join(f"{target} {count}" for target, count in sorted(self.kills.items())),
            str(self.jobs), str(self.reruns), str(self.given_up),
            f"{self.rows_again / max(hits, 1):.1f}",
            f"{statistics.median(times):.1f}", f"{max(times):.1f}", f"{self.seconds:.0f}",
        ]  # fmt: skip


HEADINGS = [
    "campaign", "kills", "of what", "jobs", "reruns", "own ends", "rows again/kill", "to next commit s", "at most s",
    "took s",
]  # fmt: skip


def schedule(seed: int, name: str, targets: Sequence[str]) -> Iterator[Aim]:
    """The same aims for the same seed, for ever: all targets equally often, in a random order."""
    chance = random.Random(f"{seed} {name}")
    while True:
        for target in chance.sample(targets, len(targets)):
            yield Aim(
                target=target,
                delay_s=chance.uniform(0.0, MAX_DELAY_S),
                early=chance.random() < 0.25,
            )


def run_campaign(
    name: str,
    place: Place,
    workload: Workload,
    targets: Sequence[str],
    wanted: int,
    seed: int,
    folder: Path,
) -> Tally:
    """Runs jobs to their ends, each on an output of its own, until so many kills have hit; checks
    every output.
    """
    tally, begun = Tally(name=name), time.monotonic()
    aims = schedule(seed, name, targets)
    chance = random.Random(f"{seed} {name} nodes")
    for number in itertools.count():
        before = tally.kills.total()
        if before >= wanted:
            break
        Siege(place, workload, aims, chance, folder / f"{name}-{number}").run(tally, wanted)
        assert tally.kills.total() > before, (
            f"nothing was hit in a whole job; next was to be {targets}"
        )
    tally.seconds = time.monotonic() - begun
    return tally


class Siege:
    """One job, run and rerun under fire until its driver exits with 0."""

    def __init__(
        self,
        place: Place,
        workload: Workload,
        aims: Iterator[Aim],
        chance: random.Random,
        folder: Path,
    ) -> None:
        folder.mkdir(parents=True)
        self.place, self.workload, self.chance, self.folder = place, workload, chance, folder
        self.output = folder / "out"
        self.aims, self.aim = aims, next(aims)

    def run(self, tally: Tally, wanted: int) -> None:
        """Until the job is finished; no more kills once the tally has as many as are wanted. Checks
        the output.
        """
        command, killed_at = self._command(), list[float]()
        while (code := self._drive(command, killed_at, tally, wanted)) != 0:
            # A cluster that has lost much may give the job up: that is no loss of rows, but it must
            # stay rare.
            tally.given_up += code == 1
            assert code == -signal.SIGKILL or (code == 1 and tally.given_up <= GIVEN_UP), (
                f"exit code {code} of itself:\n{self.log()}"
            )
            tally.reruns += 1
        tally.jobs += 1
        check_output(self.output, self.workload)
        tally.rows_again += completed_rows(self.folder) - self.workload.rows_for_engine
        tally.recovered_s += _recovery(killed_at, self.output)

    def commits(self) -> int:
        return sum(1 for _ in (self.output / "commits").glob("*.json"))

    def log(self) -> str:
        return (self.folder / "driver.log").read_text()[-4000:]

    def _command(self) -> list[str]:
        job = self.folder / "job.yaml"
        job.write_text(yaml.safe_dump(self.workload.job | {"output": str(self.output)}))
        return driver_command(
            replace(self.workload.pace, folder=str(self.folder)).to_json(), "label", str(job)
        )

    def _drive(self, command: list[str], killed_at: list[float], tally: Tally, wanted: int) -> int:
        """One driver's life; its exit code."""
        with (self.folder / "driver.log").open("ab") as log:
            driver = subprocess.Popen(
                command, cwd=ROOT, env=self.place.environment(), stdout=log, stderr=log
            )
        fire = _Fire(self, driver)
        try:
            while driver.poll() is None:
                if tally.kills.total() >= wanted:
                    (self.folder / HURRY).touch()
                    fire.cease()
                elif fire.take(self.aim):
                    killed_at.append(time.time())
                    tally.kills[self.aim.target] += 1
                    self.aim = next(self.aims)
            return driver.returncode
        finally:
            driver.kill()
            driver.wait()


class _Fire:
    """Kills one driver, or the workers of its job."""

    def __init__(self, siege: Siege, driver: subprocess.Popen[bytes]) -> None:
        self._siege, self._place, self._driver = siege, siege.place, driver
        # Workers of a driver that was killed just now live on for a moment.
        self._not_ours = {each for role in ROLES for each in self._place.workers(driver, role)}
        self._commits_before = siege.commits()
        self._recent: Counter[str] = Counter()

    def take(self, aim: Aim) -> bool:
        """Waits for the target, then for the aim's delay. Whether the kill has hit."""
        if aim.target == "driver":
            return self._kill_driver(aim)
        self._calm_down(aim.target)
        hit = self._kill_node(aim) if aim.target == "node" else self._kill_worker(aim)
        self._recent[aim.target] += hit
        return hit

    def cease(self) -> None:
        """Waits for the driver's end."""
        self._until(lambda: False)

    def _kill_driver(self, aim: Aim) -> bool:
        if not aim.early:
            self._until(lambda: self._siege.commits() > self._commits_before)
        self._pause(aim.delay_s)
        self._driver.kill()
        return self._driver.wait() == -signal.SIGKILL

    def _kill_worker(self, aim: Aim) -> bool:
        victims = self._until(lambda: self._workers(aim.target))
        self._pause(aim.delay_s)
        victim = next((each for each in victims or [] if each in self._workers(aim.target)), None)
        if victim is None or not kill(victim):
            return False
        self._not_ours.add(victim)
        gone, _ = psutil.wait_procs([victim], timeout=10)
        return bool(gone)

    def _kill_node(self, aim: Aim) -> bool:
        self._until(lambda: self._workers("model"))
        self._pause(aim.delay_s)
        return self._driver.poll() is None and self._place.kill_node(
            self._driver, self._siege.chance
        )

    def _workers(self, role: str) -> list[psutil.Process]:
        return [
            each for each in self._place.workers(self._driver, role) if each not in self._not_ours
        ]

    def _calm_down(self, target: str) -> None:
        if self._recent[target] + self._recent["node"] < BURST:
            return
        aimed = self._siege.commits() + CALM
        self._until(lambda: self._siege.commits() >= aimed)
        self._recent.clear()

    def _pause(self, seconds: float) -> None:
        self._until(lambda: False, seconds)

    def _until(self, condition: Callable[[], T], at_most_s: float | None = None) -> T | None:
        """What the condition gives once it is true; None when the driver has ended before, or the
        time is over.
        """
        begun = moved = time.monotonic()
        commits = self._siege.commits()
        while self._driver.poll() is None:
            if result := condition():
                return result
            now = time.monotonic()
            if at_most_s is not None and now - begun >= at_most_s:
                return None
            if self._siege.commits() != commits:
                commits, moved = self._siege.commits(), now
            assert now - moved < STALLED_S, (
                f"nothing was committed for {STALLED_S:.0f} s:\n{self._siege.log()}"
            )
            time.sleep(POLL_S)
        return None


def _recovery(killed_at: Sequence[float], output: Path) -> list[float]:
    """Seconds from each kill to the next commit; none for a kill after the last one."""
    commits = sorted(path.stat().st_mtime for path in (output / "commits").glob("*.json"))
    later = [next((at for at in commits if at > kill_at), None) for kill_at in killed_at]
    return [at - kill_at for at, kill_at in zip(later, killed_at, strict=True) if at is not None]
