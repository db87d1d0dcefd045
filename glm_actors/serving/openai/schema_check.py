"""SchemaChecker: whether decoding can follow a schema or grammar, found out in a process of its
own, in bounded time.

A schema may make its compiler search for ages, in native code that no thread can end. A schema that
has passed here is compiled by the engine as fast. Knows nothing of requests.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path
from typing import IO

import glm_batch
from glm_batch.models.errors import EngineError

START_S = 120.0
REMEMBERED = 256
MEMORY_BYTES = 2 << 30
_SOURCE_ROOT = str(Path(glm_batch.__path__[0]).parent)
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "VIRTUAL_ENV")


class SchemaChecker:
    """Checks one schema at a time; several threads may call it. What was found is remembered."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._problem = lru_cache(REMEMBERED)(self._find_problem)

    def problem(self, text: str, kind: str = "json_schema") -> str:
        """What is wrong with a schema (JSON text), or a grammar (kind lark); empty when it can be
        followed.
        """
        with self._lock:
            return self._problem(text, kind)

    def close(self) -> None:
        """Ends the process, whatever it is at."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None

    def _find_problem(self, text: str, kind: str) -> str:
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps([kind, text]).encode() + b"\n")
            process.stdin.flush()
            answer = _line(process.stdout, self._timeout_s)
        except BrokenPipeError:
            answer = b""
        if answer is None:
            self.close()
            return f"it takes longer than {self._timeout_s:g} s to compile; make it simpler"
        if not answer:  # the process has ended: it ran out of memory or crashed
            self.close()
            return "its compiler ran out of memory; make it simpler"
        return str(json.loads(answer))

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join([_SOURCE_ROOT, *filter(None, sys.path)])
        command = [
            sys.executable,
            "-m",
            "glm_batch.glm_actors.serving.openai.schema_child",
            str(MEMORY_BYTES),
        ]
        self._process = process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        assert process.stdout is not None
        if not _line(process.stdout, START_S):
            self.close()
            raise EngineError("no process starts to check schemas in")
        return process


def _line(pipe: IO[bytes], timeout_s: float) -> bytes | None:
    """The next line, empty at the end; None when it does not begin to come in time."""
    ready, _, _ = select.select([pipe], [], [], timeout_s)
    return pipe.readline() if ready else None
