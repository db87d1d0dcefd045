"""A process apart for work that may crash, hang or take all memory: both of its ends, and the
messages between them.

The parent's end is a `Child`. The module that it names ends with `serve(build)` and answers one
request after the other, within limits that the kernel keeps.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import glm_batch
from glm_batch.models.errors import EngineError

Json = dict[str, Any]
Data = bytes | memoryview | BinaryIO
# What a child does: a request's header and data to a reply's header and bytes.
Answer = Callable[[Json, memoryview | BinaryIO], tuple[Json, Any]]

# Longer data travel as a file that both processes see: a copy in memory would count against the
# child's limit.
INLINE_BYTES = 1 << 20
START_TIMEOUT_S = 120.0
DYING_S = 5.0  # how long a process may take to end once its socket is closed
ORPHAN_GRACE_S = 10.0  # beyond the deadline, at which the parent kills
MAX_HEADER_BYTES = 1 << 24
MAX_BODY_BYTES = 1 << 34
# Not the parent's whole environment: it may hold credentials, and children read hostile bytes.
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
_SOURCE_ROOT = str(Path(glm_batch.__path__[0]).parent)
_STATUS, _PEAK_RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PREFIX = struct.Struct("<IQ")  # bytes of the header and of the body


class ChildError(Exception):
    """A request was not answered: the child took too long, needed too much memory, or crashed."""

    def __init__(self, why: Literal["time", "memory", "crash"], how: str) -> None:
        """`how` goes on after the child as a subject, or tells what was out of memory."""
        super().__init__(how)
        self.why, self.how = why, how


class Channel:
    """One end of a stream socket. A message is a header in JSON and any number of bytes.

    JSON and raw bytes, never pickles: a child that was taken over by its input must not take over
    its parent.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, option, 1 << 22)

    def send(
        self, header: Json, body: Any = b"", *, fd: int = -1, deadline: float | None = None
    ) -> None:
        """Raises ConnectionError where nobody listens, and TimeoutError past the deadline."""
        text = json.dumps(header).encode()
        prefix = _PREFIX.pack(len(text), len(body))
        self._wait_at_most(deadline)
        if fd < 0:
            self._socket.sendall(prefix + text)
        else:
            socket.send_fds(self._socket, [prefix], [fd])
            self._socket.sendall(text)
        if len(body):
            self._socket.sendall(body)

    def receive(self, deadline: float | None = None) -> tuple[Json, bytearray, int | None]:
        """A header, its body, and the file descriptor that came with it.

        Raises EOFError, also for what is no message, and TimeoutError past the deadline.
        """
        self._wait_at_most(deadline)
        prefix, fds, _, _ = socket.recv_fds(self._socket, _PREFIX.size, 1)
        if not prefix:
            raise EOFError
        prefix += self._receive_bytes(_PREFIX.size - len(prefix), deadline)
        header_bytes, body_bytes = _PREFIX.unpack(prefix)
        if header_bytes > MAX_HEADER_BYTES or body_bytes > MAX_BODY_BYTES:
            raise EOFError(f"{header_bytes:,} and {body_bytes:,} bytes are no message of ours")
        header: Json = json.loads(self._receive_bytes(header_bytes, deadline))
        return header, self._receive_bytes(body_bytes, deadline), fds[0] if fds else None

    def close(self) -> None:
        self._socket.close()

    def _receive_bytes(self, num_bytes: int, deadline: float | None) -> bytearray:
        data = bytearray(num_bytes)
        view = memoryview(data)
        while view:
            self._wait_at_most(deadline)
            received = self._socket.recv_into(view)
            if not received:
                raise EOFError
            view = view[received:]
        return data

    def _wait_at_most(self, deadline: float | None) -> None:
        if deadline is None:
            return self._socket.settimeout(None)
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)


class Child:
    """Answers one request at a time; several threads may ask.

    `num_bytes` is what a request may take beyond what the child's imports took. After a deadline or
    a death the next process starts.
    """

    def __init__(
        self,
        module: str,
        setup: Mapping[str, Any],
        *,
        num_bytes: int,
        timeout_s: float,
        quiet: bool = False,
    ) -> None:
        """`setup` is JSON that the module's `build` gets. `quiet`: its stderr is thrown away."""
        self._module, self._timeout_s, self._quiet = module, timeout_s, quiet
        self._setup = {"num_bytes": num_bytes, "timeout_s": timeout_s, "setup": setup}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._ready = False
        self._num_asked = 0  # of this process

    @property
    def pid(self) -> int | None:
        """The process, if one was started."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Begins to start the process; the first request waits for it."""
        with self._lock:
            self._start()

    def close(self) -> None:
        """Ends the process; a later request starts another."""
        with self._lock:
            self._stop()

    def ask(self, header: Json, data: Data = b"") -> tuple[Json, bytearray]:
        """The reply's header and bytes. Raises ChildError.

        Raises EngineError when no process can be started at all.
        """
        with self._lock:
            try:
                return self._ask(header, data)
            except ChildError as error:
                if error.why != "memory" or self._num_asked < 2:
                    raise
                self._restart()  # what earlier requests left behind must not decide about this one
                return self._ask(header, data)

    def _ask(self, header: Json, data: Data) -> tuple[Json, bytearray]:
        channel = self._start()
        self._wait_until_ready(channel)
        self._num_asked += 1
        deadline = time.monotonic() + self._timeout_s
        try:
            self._send(channel, header, data, deadline)
            reply, body, _ = channel.receive(deadline)
        except TimeoutError:
            self._restart()
            raise ChildError("time", f"took longer than {self._timeout_s:g} s") from None
        except (EOFError, ConnectionError, ValueError) as error:  # ValueError: no message of ours
            how = self._stop(DYING_S)
            self._start()
            raise ChildError("crash", how) from error
        except BaseException:
            # its answer may still come, and would be taken for that to the next request
            self._restart()
            raise
        if "failed" in reply:
            raise ChildError(*reply["failed"])
        return reply, body

    def _send(self, channel: Channel, header: Json, data: Data, deadline: float) -> None:
        if isinstance(data, bytes | memoryview) and len(data) <= INLINE_BYTES:
            return channel.send(header, data, deadline=deadline)
        with contextlib.ExitStack() as stack:
            if isinstance(data, bytes | memoryview):
                data = stack.enter_context(_file_of(data))
            data.seek(0)  # the position goes along with the descriptor
            channel.send(header, fd=data.fileno(), deadline=deadline)

    def _restart(self) -> None:
        self._stop()
        self._start()

    def _start(self) -> Channel:
        if self._process is not None and self._process.poll() is not None:
            self._stop()  # it died between two requests
        if self._channel is not None:
            return self._channel
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-P", "-W", "ignore", "-m", self._module]
            try:
                self._process = subprocess.Popen(
                    [*command, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL if self._quiet else None,
                    env=_environment(),
                    pass_fds=[theirs.fileno()],
                )
            except OSError as error:
                ours.close()
                raise EngineError(f"{self._module} cannot be started: {error}") from error
        self._channel, self._ready, self._num_asked = Channel(ours), False, 0
        with contextlib.suppress(ConnectionError):  # dead already: the first request will tell
            self._channel.send(self._setup)
        return self._channel

    def _wait_until_ready(self, channel: Channel) -> None:
        if self._ready:
            return
        try:
            channel.receive(time.monotonic() + START_TIMEOUT_S)
        except (EOFError, ConnectionError, TimeoutError) as error:
            how = self._stop(DYING_S)
            raise EngineError(
                f"the process of {self._module} did not start: it {how}; see its own message above"
            ) from error
        self._ready = True

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
        if status >= 0:
            return f"exited with status {status}"
        return f"died of {signal.Signals(-status).name}"


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    path = os.pathsep.join([_SOURCE_ROOT, *filter(None, sys.path)])
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def _file_of(data: bytes | memoryview) -> BinaryIO:
    """A file without a name, in memory where the system can do so."""
    if sys.platform == "linux":
        file: BinaryIO = os.fdopen(os.memfd_create("data"), "w+b")
    else:
        file = tempfile.TemporaryFile()  # noqa: SIM115
    file.write(data)
    file.flush()
    return file


def serve(build: Callable[[Any], Answer], unsure: Collection[str] = ()) -> None:
    """The child: answers requests at the socket whose number stands on the command line, until the
    parent closes its end.

    `build` gets the setup and imports all that answers need: afterwards memory is counted. A reply
    whose header has one of the codes `unsure` as `error` is taken for a lack of memory where most
    of it was used: libraries often call an allocation that failed damaged data.
    """
    # the parent closed its end: there is no more to do
    gone = contextlib.suppress(EOFError, ConnectionError)
    with gone, socket.socket(fileno=int(sys.argv[1])) as connection:
        channel = Channel(connection)
        setup, _, _ = channel.receive()
        answer = build(setup["setup"])
        memory = MemoryLimit(setup["num_bytes"])
        channel.send({"ready": os.getpid()})
        while True:
            request, body, fd = channel.receive()
            # The default of SIGALRM ends the process, also inside of a library that never comes
            # back.
            signal.setitimer(signal.ITIMER_REAL, setup["timeout_s"] + ORPHAN_GRACE_S)
            memory.begin()
            with memoryview(body) if fd is None else os.fdopen(fd, "rb") as data:
                header, found = _answered(answer, request, data)
                error = header.get("error")
                if error and error[0] in unsure and memory.was_near():
                    header, found = {"failed": ["memory", error[1]]}, b""
                channel.send(header, found)
            signal.setitimer(signal.ITIMER_REAL, 0)


def _answered(answer: Answer, request: Json, data: memoryview | BinaryIO) -> tuple[Json, Any]:
    try:
        return answer(request, data)
    except MemoryError:
        return {"failed": ["memory", "out of memory"]}, b""
    except Exception as error:  # a process's border: what nobody foresaw costs this request alone
        if "can't allocate memory" in str(error):  # torch has no exception of its own for it
            return {"failed": ["memory", "out of memory"]}, b""
        return {"failed": ["crash", f"failed with {type(error).__name__}: {error}"]}, b""


class MemoryLimit:
    """Bounds what this process may allocate from now on. Only Linux counts all of it and tells what
    is taken.
    """

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._at_start = _status("VmRSS")
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = _status("VmData") + num_bytes
        if _STATUS.exists():
            resource.setrlimit(
                resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard)
            )

    def begin(self) -> None:
        """Forgets the peak of the request before."""
        with contextlib.suppress(OSError):
            _PEAK_RESET.write_text("5")

    def was_near(self) -> bool:
        """Whether this request took most of it."""
        return _status("VmHWM") - self._at_start > self._num_bytes // 2


def _status(name: str) -> int:
    """Bytes, by the kernel's name for them; 0 where it tells none."""
    if not _STATUS.exists():
        return 0
    found = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(found.split()[1]) * 1024
