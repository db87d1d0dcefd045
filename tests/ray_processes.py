"""The worker processes of this session's Ray cluster, by their titles."""

from __future__ import annotations

import psutil


def ray_processes(title: str) -> list[psutil.Process]:
    """Those that live, such as "ray::Rank"."""
    return [process for process in psutil.Process().children(recursive=True) if _title(process).startswith(title)]


def _title(process: psutil.Process) -> str:
    try:
        return "".join(process.cmdline()[:1])
    except psutil.NoSuchProcess:  # ended meanwhile, or a zombie
        return ""
