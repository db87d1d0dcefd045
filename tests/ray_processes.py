"""The processes of this test session's Ray cluster, by the title that Ray gives them."""

from __future__ import annotations

import psutil


def ray_processes(title: str) -> list[psutil.Process]:
    """Those that live, such as "ray::Rank"."""
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if _title(process).startswith(title)
    ]


class NewProcesses:
    """Those that live and were not there when this object was made: the session's server has ranks,
    too.
    """

    def __init__(self, title: str) -> None:
        self._title, self._known = title, set(ray_processes(title))

    def __call__(self) -> list[psutil.Process]:
        return [process for process in ray_processes(self._title) if process not in self._known]


def _title(process: psutil.Process) -> str:
    try:
        return "".join(process.cmdline()[:1])
    except psutil.NoSuchProcess:  # ended meanwhile, or a zombie
        return ""
