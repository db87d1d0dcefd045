"""Decoder: media decoded in a process of their own, so that a crash, a hang or a bomb costs one
item.

Owns that process: its start, deadline, death and successor. Knows nothing of rows, paths, URLs or
caches; imports no decoder itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

import glm_batch
from glm_batch.glm_actors.media.decoder_child import Channel, Setup
from glm_batch.models.checkpoint.normalization import MediaKind
from glm_batch.models.errors import EngineError, RowError
from glm_batch.models.processing.patches import Encoded, MediaPatches

# Longer media travel as a file that both processes see: a copy in memory would count against the
# decoder's limit.
INLINE_BYTES = 1 << 20
START_TIMEOUT_S = 120.0
DYING_S = 5.0  # how long a process may take to end once its socket is closed
# Not the worker's whole environment: it may hold credentials, and decoders read hostile bytes.
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
_SOURCE_ROOT = str(Path(glm_batch.__path__[0]).parent)


class _Exhausted(RowError):
    """The process had not enough memory left."""


class Decoder:
    """Decodes one item at a time; several threads may call it. `module` is what the process runs."""

    def __init__(
        self, setup: Setup, *, module: str = "glm_batch.glm_actors.media.decoder_child"
    ) -> None:
        self._setup = setup
        self._module = module
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._ready = False
        self._num_asked = 0  # items that this process was given

    @property
    def pid(self) -> int | None:
        """The process that decodes, if one was started."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Begins to start the process; the first item waits for it."""
        with self._lock:
            self._start()

    def decode(self, kind: MediaKind, data: Encoded, digest: str) -> MediaPatches:
        """The patches of encoded media whose encoded_digest is `digest`. Raises RowError.

        Raises EngineError when no decoding process can be started at all.
        """
        with self._lock:
            answer = self._ask(kind, data, digest)
            if isinstance(answer, _Exhausted) and self._num_asked > 1:
                self._restart()  # what earlier items left behind must not decide about this one
                answer = self._ask(kind, data, digest)
        if isinstance(answer, RowError):
            raise answer
        return answer

    def close(self) -> None:
        """Ends the process; a later decode starts another."""
        with self._lock:
            self._stop()

    def _ask(self, kind: MediaKind, data: Encoded, digest: str) -> MediaPatches | RowError:
        """What the process answers; where it gives no answer, RowError is raised and the next
        process starts.
        """
        channel = self._start()
        self._wait_until_ready(channel)
        self._num_asked += 1
        deadline = time.monotonic() + self._setup.timeout_s
        try:
            self._send(channel, kind, data, digest, deadline)
            return self._receive(channel, kind, digest, deadline)
        except TimeoutError:
            self._restart()
            limit = f"{self._setup.timeout_s:g} s"
            text = f"decoding this {kind} took longer than {limit}; shorten it or raise media.decode_timeout_s"
            raise RowError("media_timeout", text) from None
        except (EOFError, ConnectionError, ValueError) as error:  # ValueError: no message of ours
            how = self._stop(DYING_S)
            self._start()
            raise RowError(
                "decoder_crashed", f"the decoder {how} at this {kind}; it was started anew"
            ) from error
        except BaseException:
            # its answer may still come, and would be taken for that to the next item
            self._restart()
            raise

    def _restart(self) -> None:
        self._stop()
        self._start()

    def _start(self) -> Channel:
        if self._process is not None and self._process.poll() is not None:
            self._stop()  # it died between two items
        if self._channel is not None:
            return self._channel
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = self._run(theirs.fileno())
        self._channel, self._ready, self._num_asked = Channel(ours), False, 0
        with contextlib.suppress(ConnectionError):  # dead already: the first item's wait will tell
            self._channel.send(asdict(self._setup))
        return self._channel

    def _run(self, fd: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-W", "ignore", "-m", self._module, str(fd)]
        nothing = subprocess.DEVNULL
        try:
            return subprocess.Popen(
                command, stdin=nothing, stdout=nothing, env=_environment(), pass_fds=[fd]
            )
        except OSError as error:
            raise EngineError(f"no decoding process can be started: {error}") from error

    def _wait_until_ready(self, channel: Channel) -> None:
        if self._ready:
            return
        try:
            channel.receive(time.monotonic() + START_TIMEOUT_S)
        except (EOFError, ConnectionError, TimeoutError) as error:
            raise EngineError(
                f"the decoding process did not start: it {self._stop(DYING_S)}; see its own message above"
            ) from error
        self._ready = True

    def _send(
        self, channel: Channel, kind: MediaKind, data: Encoded, digest: str, deadline: float
    ) -> None:
        header: dict[str, Any] = {"kind": kind, "digest": digest}
        if isinstance(data, bytes | memoryview) and len(data) <= INLINE_BYTES:
            return channel.send({**header, "num_bytes": len(data)}, data, deadline=deadline)
        with contextlib.ExitStack() as stack:
            file = (
                stack.enter_context(_file_of(data))
                if isinstance(data, bytes | memoryview)
                else data
            )
            file.seek(0)  # the position goes along with the descriptor
            channel.send(header, fd=file.fileno(), deadline=deadline)

    def _receive(
        self, channel: Channel, kind: MediaKind, digest: str, deadline: float
    ) -> MediaPatches | RowError:
        reply, _ = channel.receive(deadline)
        if "exhausted" in reply:
            return _Exhausted("media_too_large", reply["exhausted"])
        if "error" in reply:
            return RowError(*reply["error"])
        patches = np.empty(reply["shape"], np.uint8)
        channel.receive_into(patches.data.cast("B"), deadline)
        return MediaPatches(
            kind=kind,
            patches=patches,
            grid=tuple(reply["grid"]),
            digest=digest,
            source=tuple(reply["source"]),
            timestamps=tuple(reply["timestamps"]),
        )

    def _stop(self, patience_s: float = 0.0) -> str:
        """Ends the process if it does not end by itself in that time, and tells how it ended."""
        process, channel = self._process, self._channel
        self._process, self._channel = None, None
        if process is None or channel is None:
            return "was not running"
        channel.close()
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            process.kill()
        status = process.wait()
        return (
            f"exited with status {status}"
            if status >= 0
            else f"died of {signal.Signals(-status).name}"
        )


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    path = os.pathsep.join([_SOURCE_ROOT, *filter(None, sys.path)])
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def _file_of(data: bytes | memoryview) -> BinaryIO:
    """A file without a name, in memory where the system can do so."""
    if sys.platform == "linux":
        file: BinaryIO = os.fdopen(os.memfd_create("media"), "w+b")
    else:
        file = tempfile.TemporaryFile()  # noqa: SIM115
    file.write(data)
    file.flush()
    return file
