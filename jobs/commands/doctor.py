"""`glm-batch doctor`: what this machine has, and what is missing.

Owns the list of things worth knowing before a first run. Reads versions and hardware; starts
nothing.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

GIB = 1 << 30
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
MIN_SHM_BYTES = 2 * GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report; `problem` says what to do when something is wrong. Only `fatal` ones
    stop a job.
    """

    name: str
    value: str
    problem: str = ""
    fatal: bool = False


def doctor() -> bool:
    """Prints the findings; False when a job cannot run on this machine."""
    findings = list(all_findings())
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for each in findings:
        table.add_row(each.name, each.value + (f"  ({each.problem})" if each.problem else ""))
    console = Console(highlight=False)
    console.print(table)
    fatal = [each.name for each in findings if each.fatal]
    console.print(f"cannot run a job: see {', '.join(fatal)}" if fatal else "ready to run a job")
    return not fatal


def all_findings() -> Iterator[Finding]:
    """Software first, then hardware."""
    old = sys.version_info < (3, 11)
    problem = "Python 3.11 or newer is needed" if old else ""
    yield Finding(
        name="python",
        value=f"{platform.python_version()} at {sys.executable}",
        problem=problem,
        fatal=old,
    )
    yield from requirement_findings()
    yield torch_finding()
    yield from cpu_findings()
    yield gpu_finding()
    yield from memory_findings()
    yield from disk_findings()


def requirement_findings() -> Iterator[Finding]:
    """The distribution's requirements and extras, as its own metadata lists them."""
    try:
        yield Finding(name="glm-batch", value=importlib.metadata.version("glm-batch"))
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            name="glm-batch", value="not installed", problem="run pip install -e .", fatal=True
        )
        return
    for requirement in importlib.metadata.requires("glm-batch") or []:
        name = re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0]
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        if extra is not None and not extra[1].startswith("vllm"):
            continue
        yield _installed(
            name, requirement.split(";")[0].strip(), None if extra is None else extra[1]
        )


def _installed(name: str, requirement: str, extra: str | None) -> Finding:
    try:
        return Finding(name=name, value=importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        if extra is not None:
            return Finding(name=name, value=f"not installed (optional, extra {extra})")
        return Finding(
            name=name, value="missing", problem=f"run pip install '{requirement}'", fatal=True
        )


def torch_finding() -> Finding:
    """Imports torch: an installation that cannot load its libraries shows here."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding(
            name="torch import", value=f"fails: {error}", problem="reinstall torch", fatal=True
        )
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    usable = (
        f"{torch.cuda.device_count()} usable GPU(s)"
        if torch.cuda.is_available()
        else "no usable GPU"
    )
    return Finding(name="torch build", value=f"{cuda}, {usable}, {torch.get_num_threads()} threads")


def cpu_findings() -> Iterator[Finding]:
    """Model, usable cores, and the instructions that make bfloat16 fast."""
    text = _read(Path("/proc/cpuinfo"))
    model = re.search(r"model name\s*: (.+)", text)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(
        name="cpu", value=f"{model[1] if model else platform.machine()}, {cores} usable cores"
    )
    flags = set((re.search(r"flags\s*: (.+)", text) or ["", ""])[1].split())
    found = [flag for flag in CPU_FLAGS if flag in flags]
    fast = (
        "bfloat16 is fast"
        if {"avx512_bf16", "amx_bf16"} & flags
        else "bfloat16 is slow here: use float32"
    )
    yield Finding(
        name="cpu features",
        value=f"{', '.join(found) or 'none of ' + ', '.join(CPU_FLAGS)}; {fast}",
    )


def gpu_finding() -> Finding:
    """What the driver reports, whether or not torch can use it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Finding(name="gpu", value="none (no nvidia-smi)")
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        return Finding(name="gpu", value="nvidia-smi fails", problem=str(error))
    return Finding(name="gpu", value="; ".join(done.stdout.strip().splitlines()) or "none")


def memory_findings() -> Iterator[Finding]:
    """Memory, the container's limit on it, and /dev/shm, where Ray keeps its objects."""
    memory = psutil.virtual_memory()
    limit = _read(Path("/sys/fs/cgroup/memory.max")).strip()
    note = (
        f", limited to {int(limit) / GIB:.1f} GiB here"
        if limit.isdigit() and int(limit) < memory.total
        else ""
    )
    yield Finding(
        name="memory",
        value=f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} GiB available{note}",
    )
    if Path("/dev/shm").is_dir():
        shm = shutil.disk_usage("/dev/shm")
        small = (
            "small: Ray falls back to slow disk, mount it larger"
            if shm.total < MIN_SHM_BYTES
            else ""
        )
        yield Finding(
            name="/dev/shm",
            value=f"{shm.free / GIB:.1f} of {shm.total / GIB:.1f} GiB free",
            problem=small,
        )


def disk_findings() -> Iterator[Finding]:
    """The working directory (output) and the temporary directory (Ray's session)."""
    for name, path in (("disk here", Path.cwd()), ("disk temporary", Path(tempfile.gettempdir()))):
        usage = shutil.disk_usage(path)
        full = "nearly full: Ray stops writing at 95 %" if usage.free < usage.total * 0.05 else ""
        yield Finding(name=name, value=f"{usage.free / GIB:.1f} GiB free at {path}", problem=full)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
