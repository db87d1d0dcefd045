"""The decoding process: encoded media in, patches out, one item after the other, within its own
limits.

Owns the messages between it and its parent and the limits that the kernel keeps for it: memory, and
time, so that it ends even when its parent is gone. Started as `python -m
glm_actors.media.decoder_child FD`. Knows nothing of rows or paths.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_batch.models.checkpoint.media_config import ImageProcessorConfig, VideoProcessorConfig
from glm_batch.models.checkpoint.normalization import MediaKind
from glm_batch.models.errors import RowError
from glm_batch.models.processing.patches import Encoded, MediaPatches

UNREADABLE = ("bad_image", "bad_video")
ORPHAN_GRACE_S = 10.0  # beyond the deadline, at which the parent kills
MAX_HEADER_BYTES = 1 << 24
_STATUS, _PEAK_RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PREFIX = struct.Struct("<I")  # bytes of the header

Decode = Callable[[MediaKind, Encoded, str], MediaPatches]  # kind, media, digest of encoded_digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a decoding process is told once. `num_bytes` is what decoding may take beyond what
    importing took.
    """

    image: ImageProcessorConfig
    video: VideoProcessorConfig
    num_bytes: int
    timeout_s: float


class Channel:
    """One end of a stream socket. A message is a header in JSON and, where the header says so,
    bytes after it.

    JSON and raw bytes, never pickles: a decoder that was taken over by its input must not take over
    its parent.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, option, 1 << 22)

    def send(
        self,
        header: dict[str, Any],
        body: Any = b"",
        *,
        fd: int | None = None,
        deadline: float | None = None,
    ) -> None:
        """Raises ConnectionError where nobody listens, and TimeoutError past the deadline."""
        text = json.dumps(header).encode()
        prefix = _PREFIX.pack(len(text))
        self._wait_at_most(deadline)
        if fd is None:
            self._socket.sendall(prefix + text)
        else:
            socket.send_fds(self._socket, [prefix], [fd])
            self._socket.sendall(text)
        if len(body):
            self._socket.sendall(body)

    def receive(self, deadline: float | None = None) -> tuple[dict[str, Any], int | None]:
        """A header and the file descriptor that came with it. Raises EOFError, and TimeoutError
        past the deadline.
        """
        self._wait_at_most(deadline)
        prefix, fds, _, _ = socket.recv_fds(self._socket, _PREFIX.size, 1)
        if not prefix:
            raise EOFError
        (num_bytes,) = _PREFIX.unpack(
            prefix + self._receive_bytes(_PREFIX.size - len(prefix), deadline)
        )
        if num_bytes > MAX_HEADER_BYTES:
            raise EOFError(f"a header of {num_bytes:,} bytes is none of ours")
        header: dict[str, Any] = json.loads(self._receive_bytes(num_bytes, deadline))
        return header, fds[0] if fds else None

    def receive_into(self, view: memoryview, deadline: float | None = None) -> None:
        """Fills the view with the bytes after a header."""
        while view:
            self._wait_at_most(deadline)
            received = self._socket.recv_into(view)
            if not received:
                raise EOFError
            view = view[received:]

    def close(self) -> None:
        self._socket.close()

    def _receive_bytes(self, num_bytes: int, deadline: float | None) -> bytes:
        data = bytearray(num_bytes)
        self.receive_into(memoryview(data), deadline)
        return bytes(data)

    def _wait_at_most(self, deadline: float | None) -> None:
        if deadline is None:
            return self._socket.settimeout(None)
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)


def serve(connection: socket.socket, make_decode: Callable[[Setup], Decode]) -> None:
    """Answers requests until the parent closes its end; then raises EOFError or ConnectionError."""
    channel = Channel(connection)
    setup = _read_setup(channel)
    decode = make_decode(setup)
    memory = MemoryLimit(setup.num_bytes)
    channel.send({"ready": os.getpid()})
    while True:
        request, fd = channel.receive()
        # The default of SIGALRM ends the process, also inside of a library that never comes back.
        signal.setitimer(signal.ITIMER_REAL, setup.timeout_s + ORPHAN_GRACE_S)
        memory.begin()
        header, body = _answer(channel, decode, request, fd)
        if header.get("error", [""])[0] in UNREADABLE and memory.was_near():
            header = _out_of_memory(header["error"][1])
        channel.send(header, body)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _answer(
    channel: Channel, decode: Decode, request: dict[str, Any], fd: int | None
) -> tuple[dict[str, Any], Any]:
    """The reply to one request: the patches, or why there are none."""
    try:
        if fd is None:
            data = bytearray(request["num_bytes"])
            channel.receive_into(memoryview(data))
            media = decode(request["kind"], memoryview(data), request["digest"])
        else:
            with os.fdopen(fd, "rb") as file:
                media = decode(request["kind"], file, request["digest"])
    except RowError as error:
        return {"error": [error.code, error.message]}, b""
    except MemoryError:
        return _out_of_memory(), b""
    except (
        Exception
    ) as error:  # the border of the process: what nobody foresaw costs this item alone
        if "can't allocate memory" in str(error):  # torch has no exception of its own for it
            return _out_of_memory(), b""
        return {
            "error": ["decoder_crashed", f"the decoder failed with {type(error).__name__}: {error}"]
        }, b""
    header = {
        "shape": media.patches.shape,
        "grid": media.grid,
        "source": media.source,
        "timestamps": media.timestamps,
    }
    return header, media.patches.data


def _out_of_memory(found: str = "out of memory") -> dict[str, Any]:
    return {
        "exhausted": f"decoding takes more memory than decode_bytes allows; shrink it or raise that ({found})"
    }


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
        """Forgets the peak of the item before."""
        with contextlib.suppress(OSError):
            _PEAK_RESET.write_text("5")

    def was_near(self) -> bool:
        """Whether this item took most of it: libraries often call an allocation that failed damaged
        data.
        """
        return _status("VmHWM") - self._at_start > self._num_bytes // 2


def _status(name: str) -> int:
    """Bytes, by the kernel's name for them; 0 where it tells none."""
    if not _STATUS.exists():
        return 0
    found = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(found.split()[1]) * 1024


def make_decode(setup: Setup) -> Decode:
    """The processors, with all that they will need imported: afterwards memory is counted."""
    from glm_batch.models.processing.images import ImageProcessor
    from glm_batch.models.processing.video import VideoProcessor

    if setup.image.resampling == "torch" or setup.video.resampling == "torch":
        import torch

        torch.set_num_threads(1)
    image, video = ImageProcessor(setup.image), VideoProcessor(setup.video)

    def decode(kind: MediaKind, data: Encoded, digest: str) -> MediaPatches:
        return (image if kind == "image" else video).from_bytes(data, digest=digest)

    return decode


def _read_setup(channel: Channel) -> Setup:
    values, _ = channel.receive()
    return Setup(
        image=ImageProcessorConfig(**_with_tuples(values["image"])),
        video=VideoProcessorConfig(**_with_tuples(values["video"])),
        num_bytes=values["num_bytes"],
        timeout_s=values["timeout_s"],
    )


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists only."""
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }


def main(make_decode: Callable[[Setup], Decode] = make_decode) -> None:
    """Serves the socket whose number stands on the command line."""
    # the parent closed its end: there is no more to do
    gone = contextlib.suppress(EOFError, ConnectionError)
    with gone, socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection, make_decode)


if __name__ == "__main__":
    main()
