"""Describes the machine a measurement was made on; watches the memory of a process and its
children, and ends them.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import threading
from types import TracebackType
from typing import Any

import psutil


def describe() -> dict[str, Any]:
    """CPU, cores, memory, load and operating system, for the head of a report."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": len(psutil.Process().cpu_affinity()),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_before": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


class MemoryWatch:
    """Samples the resident memory of a process tree while the context is open; `peak` is in bytes.

    Pages that processes share are counted once for each of them.
    """

    def __init__(self, pid: int, every_s: float = 0.5) -> None:
        self.peak = 0
        self._peaks: dict[int, int] = {}
        self._names: dict[int, str] = {}
        self._pid = pid
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._every_s):
            sizes = tree_rss(self._pid)
            self.peak = max(self.peak, sum(sizes.values()))
            for pid, size in sizes.items():
                self._peaks[pid] = max(self._peaks.get(pid, 0), size)
                with contextlib.suppress(psutil.NoSuchProcess):
                    self._names[pid] = _title(psutil.Process(pid))

    def process_peaks(self) -> dict[str, int]:
        """The peak of each process by what it calls itself (as it last did) and its number."""
        return {f"{self._names.get(pid, '')} [{pid}]": peak for pid, peak in self._peaks.items()}


def _title(process: psutil.Process) -> str:
    """What a process is: the title that Ray and vLLM give themselves, or the program and what it
    runs.
    """
    words = process.cmdline()
    if not words or "python" not in os.path.basename(words[0]):
        return os.path.basename(words[0]) if words else process.name()
    return " ".join(os.path.basename(word) for word in words[:3])


def tree_rss(pid: int) -> dict[int, int]:
    """Resident bytes of a process and all its descendants, by process id; those that end meanwhile
    are left out.
    """
    sizes: dict[int, int] = {}
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return sizes
    for process in family:
        try:
            sizes[process.pid] = process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return sizes


def end_tree(process: subprocess.Popen[str]) -> None:
    """Kills a process and all its descendants: engines keep processes of their own, which outlive a
    killed parent.

    Does nothing to one that has ended by itself: its number may be another process's by now.
    """
    if process.poll() is not None:
        return
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.kill()
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()
