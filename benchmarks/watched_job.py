"""A `glm-batch label` job in processes of its own, watched from outside: memory and CPU seconds by
kind of process.

Owns the sampling and what counts as which kind. Knows nothing of what the job does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from benchmarks import ROOT
from benchmarks.machine import end_tree

SAMPLE_EVERY_S = 0.25
MIB = 2**20
# Ray names a worker's process after what it runs; the decoder is a Python process of ours; the rest
# are Ray's daemons.
KINDS = {
    "(ModelActor": "engine",
    "(Preprocessor": "preprocessors",
    "(Committer": "committers",
    "decoder": "decoders",
    "ray::": "other workers",
}
WORKERS = ("engine", "preprocessors", "committers", "decoders", "other workers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One look at the job: seconds since its start, committed units, and by kind of process bytes
    and CPU seconds.

    A process's bytes are its resident ones without those it shares with others (the object store,
    libraries).
    """

    at_s: float
    units: int
    memory: dict[str, int]
    cpu_s: dict[str, float]

    @property
    def workers(self) -> int:
        """Bytes of all workers."""
        return sum(self.memory.get(kind, 0) for kind in WORKERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchedJob:
    """A finished job: samples, seconds from process start to exit, plan and rows."""

    samples: list[Sample]
    total_s: float
    num_units: int
    num_rows: int

    @property
    def working(self) -> list[Sample]:
        """The samples from the first one with a committed unit to the first one with the last."""
        committed = [sample for sample in self.samples if sample.units > 0]
        return [sample for sample in committed if sample.units < committed[-1].units] + [
            next(sample for sample in committed if sample.units == committed[-1].units)
        ]

    @property
    def steady_rows_per_s(self) -> float | None:
        """Rows per second from the first committed unit seen to the last."""
        first, last = self.working[0], self.working[-1]
        seconds = last.at_s - first.at_s
        return (
            self.num_rows * (last.units - first.units) / self.num_units / seconds
            if seconds > 0
            else None
        )

    def at(self, share: float) -> Sample:
        """The first sample with this share of the units committed."""
        return next(
            (s for s in self.working if s.units >= share * self.num_units), self.working[-1]
        )

    def peak(self, kinds: Sequence[str]) -> int:
        """The most bytes that processes of these kinds had together."""
        return max(sum(sample.memory.get(kind, 0) for kind in kinds) for sample in self.samples)


def run_watched(job_path: Path, output: Path, timeout: float) -> WatchedJob:
    """Runs the job to its end. Raises SystemExit where it fails or takes too long; its words are in
    label.log.
    """
    log_path = job_path.parent / "label.log"
    samples: list[Sample] = []
    cpu_of_process: dict[int, tuple[str, float]] = {}
    with log_path.open("w") as log:
        begin = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "glm_batch.jobs", "label", str(job_path)],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            text=True,
        )
        try:
            while process.poll() is None:
                at_s = time.perf_counter() - begin
                if at_s > timeout:
                    raise SystemExit(f"the job took more than {timeout:.0f} s, see {log_path}")
                samples.append(_sample(process.pid, at_s, output / "commits", cpu_of_process))
                time.sleep(SAMPLE_EVERY_S)
            total_s = time.perf_counter() - begin
        finally:
            end_tree(process)
    if process.returncode not in (0, 3):
        raise SystemExit(
            f"glm-batch label ended with exit status {process.returncode}, see {log_path}"
        )
    plan = json.loads((output / "plan.json").read_text())
    return WatchedJob(
        samples=samples, total_s=total_s, num_units=plan["units"], num_rows=committed_rows(output)
    )


def committed_rows(output: Path) -> int:
    """The rows of the parts that the manifest names."""
    manifest: dict[str, Any] = json.loads((output / "manifest.json").read_text())
    return sum(int(pq.read_metadata(output / part["part"]).num_rows) for part in manifest["parts"])


def _sample(
    pid: int, at_s: float, commits: Path, cpu_of_process: dict[int, tuple[str, float]]
) -> Sample:
    """`cpu_of_process` remembers what each process had used when it was last seen alive."""
    memory: Counter[str] = Counter()
    try:
        family = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    for process in [psutil.Process(pid), *family]:
        try:
            own, cpu = process.memory_info(), process.cpu_times()
            # a process that is ending has no command line any more
            known = cpu_of_process.get(process.pid)
            kind = (
                "driver"
                if process.pid == pid
                else _kind(process.cmdline(), known[0] if known else "daemons")
            )
        except psutil.NoSuchProcess:
            continue
        memory[kind] += own.rss - own.shared
        cpu_of_process[process.pid] = kind, cpu.user + cpu.system
    seconds: Counter[str] = Counter()
    for kind, used in cpu_of_process.values():
        seconds[kind] += used  # type: ignore[assignment]
    units = len(os.listdir(commits)) if commits.is_dir() else 0
    return Sample(at_s=at_s, units=units, memory=dict(memory), cpu_s=dict(seconds))


def _kind(command: list[str], known: str) -> str:
    title = " ".join(command)
    return next((kind for mark, kind in KINDS.items() if mark in title), known)
