"""Video bytes to patches: decoded by PyAV, frame by frame; only sampled ones are kept.

A clip is read twice: first its packets, to count the frames, then the frames that are wanted.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from glm_batch.models.checkpoint.media_config import VideoProcessorConfig
from glm_batch.models.errors import RowError
from glm_batch.models.processing.budget import group_timestamps, sample_frames, video_grid
from glm_batch.models.processing.images import check_frame
from glm_batch.models.processing.patches import (
    Encoded,
    Frame,
    MediaPatches,
    PatchWriter,
    as_file,
    encoded_digest,
)

# Containers that hold their own data; playlists, image sequences and devices are not among them.
CONTAINERS = "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif"
# nothing beyond the bytes can be opened
OPEN_OPTIONS = {"format_whitelist": CONTAINERS, "protocol_whitelist": ""}
FPS_OF_A_STILL = 24.0  # one frame may come without a rate; it is shown at second 0 at any

# a packet's flags; an edit list hides what is decoded only because later frames need it
_KEY, _HIDDEN = 1, 2
_UNKNOWN = -(1 << 63)

Run = tuple[int, int]  # packets [first, last], in the order in which they are stored


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInfo:
    """A clip as its packets tell it; it lasts num_frames / fps, whatever is claimed.

    `shown` [frames, 2] holds each frame's timestamp and packet, in the order of showing, and
    `keyframes` the same of the packets at which decoding can begin, in the order of storing. Both
    are None where timestamps are missing or repeated.
    """

    num_frames: int
    fps: float
    shown: npt.NDArray[np.int64] | None = None
    keyframes: npt.NDArray[np.int64] | None = None


class VideoProcessor:
    """Turns clips into patches under one configuration. Decodes on the calling thread."""

    def __init__(self, config: VideoProcessorConfig) -> None:
        self.config = config

    def from_bytes(self, data: Encoded, *, digest: str | None = None) -> MediaPatches:
        """The patches of an encoded clip, upright. Raises RowError for what is unreadable.

        Of a file, no more is read into memory than a few packets. `digest` is that of
        encoded_digest, for callers who know it already.
        """
        digest = digest or encoded_digest("video", data, self.config)
        info = scan_video(data, max_source_pixels=self.config.max_source_pixels)
        patches = self._decode(data, info, digest)
        # packets and frames do not go one to one, or do not begin where they claim
        if patches is None:
            info = count_frames(data, info, max_source_pixels=self.config.max_source_pixels)
            patches = self._decode(data, info, digest)
        if patches is None:
            raise RowError(
                "bad_video", "the clip's frames cannot all be decoded: it is damaged or cut off"
            )
        return patches

    def from_frames(
        self, frames: Sequence[Frame], fps: float, *, duration_s: float | None = None
    ) -> MediaPatches:
        """The patches of a clip of uint8 [height, width, 3], sampled as any. Raises RowError.

        Without `duration_s` the length is estimated as the published processor does.
        """
        if not frames:
            raise RowError("bad_video", "the clip has no frames")
        for frame in frames:
            check_frame(frame, "bad_video")
        indices = sample_frames(len(frames), fps, self.config, duration_s=duration_s)
        patches = self._write(
            indices, fps, ((index, frames[index]) for index in dict.fromkeys(indices)), None
        )
        assert patches is not None  # every index is below len(frames)
        return patches

    def _decode(self, data: Encoded, info: VideoInfo, digest: str) -> MediaPatches | None:
        """The sampled frames' patches, or None when the decoder did not give some of them."""
        indices = sample_frames(
            info.num_frames, info.fps, self.config, duration_s=info.num_frames / info.fps
        )
        wanted = sorted(set(indices))
        frames = decode_frames(data, info, wanted, max_source_pixels=self.config.max_source_pixels)
        return self._write(indices, info.fps, frames, digest)

    def _write(
        self,
        indices: list[int],
        fps: float,
        frames: Iterable[tuple[int, Frame]],
        digest: str | None,
    ) -> MediaPatches | None:
        positions: dict[int, list[int]] = {}
        for position, index in enumerate(indices):
            positions.setdefault(index, []).append(position)
        writer: PatchWriter | None = None
        for index, frame in frames:
            if writer is None:
                source = len(indices), frame.shape[0], frame.shape[1]
                writer = PatchWriter("video", source, video_grid(*source, self.config), self.config)
            for position in positions.pop(index):
                writer.write(position, frame)
        if positions or writer is None:
            return None
        return writer.finish(
            digest=digest, timestamps=tuple(group_timestamps(indices, fps, self.config))
        )


def scan_video(data: Encoded, *, max_source_pixels: int) -> VideoInfo:
    """Counts the frames without decoding any. Raises RowError for what is unreadable."""
    times, flags = array("q"), bytearray()
    _, size = as_file(data)
    with _open(data, max_source_pixels) as (container, stream):
        for packet in _packets(container, stream):
            times.append(_UNKNOWN if packet.pts is None else packet.pts)
            flags.append(_KEY * packet.is_keyframe | _HIDDEN * packet.is_discard)
        if _cut_off(container, stream, size):
            raise RowError("bad_video", "the video is cut off: its index points past its end")
        rate = stream.average_rate or stream.guessed_rate
    return _info(np.array(times, np.int64), np.frombuffer(flags, np.uint8), float(rate or 0))


def _cut_off(container: InputContainer, stream: VideoStream, size: int) -> bool:
    """Whether an MP4 or MOV file lacks the end of what its index lists."""
    return "mp4" in container.format.name and any(
        entry.pos + entry.size > size for entry in stream.index_entries
    )


def _info(times: npt.NDArray[np.int64], flags: npt.NDArray[np.uint8], fps: float) -> VideoInfo:
    """The clip of packets with these timestamps and flags."""
    packets = np.stack([times, np.arange(len(times))], axis=1)
    shown = packets[flags & _HIDDEN == 0]
    shown = shown[np.argsort(shown[:, 0], kind="stable")]
    if not len(shown):
        raise RowError("bad_video", "the video holds no frames: it is empty or cut off")
    if not fps > 0:
        if len(shown) > 1:
            raise RowError("bad_video", "the video does not tell its frame rate")
        fps = FPS_OF_A_STILL
    if np.any(times == _UNKNOWN) or not np.all(np.diff(shown[:, 0])):
        return VideoInfo(num_frames=len(shown), fps=fps)
    return VideoInfo(
        num_frames=len(shown), fps=fps, shown=shown, keyframes=packets[flags & _KEY != 0]
    )


def count_frames(data: Encoded, info: VideoInfo, *, max_source_pixels: int) -> VideoInfo:
    """The same clip with its frames counted by decoding all of them. Raises RowError."""
    with _open(data, max_source_pixels) as (container, stream):
        num_frames = sum(1 for _ in _decoded(container, stream, None))
    if not num_frames:
        raise RowError(
            "bad_video", "no frame of the video can be decoded: it is damaged or cut off"
        )
    return VideoInfo(num_frames=num_frames, fps=info.fps)


def decode_frames(
    data: Encoded, info: VideoInfo, wanted: Sequence[int], *, max_source_pixels: int
) -> Iterator[tuple[int, Frame]]:
    """(number, frame) of the frames `wanted`, in ascending order, that can be found.

    Frames are uint8 [height, width, 3] in RGB, turned as the container says. Raises RowError for
    damaged data.
    """
    runs = _runs(info, wanted)
    by_time = (
        {}
        if info.shown is None
        else dict(zip(info.shown[list(wanted), 0].tolist(), wanted, strict=True))
    )
    left = set(wanted)
    to_rgb = VideoReformatter()
    with _open(data, max_source_pixels) as (container, stream):
        for number, frame in enumerate(_decoded(container, stream, runs)):
            index = by_time.get(frame.pts) if runs else number
            if index is None or index not in left:
                continue
            left.remove(index)
            yield index, _upright(to_rgb.reformat(frame, format="rgb24", threads=1), frame.rotation)
            if not left:
                return


def _runs(info: VideoInfo, wanted: Sequence[int]) -> list[Run] | None:
    """The packets that `wanted` depend on, from a keyframe shown no later to its own.

    None when that is not known for all of them: then every packet must be decoded and every frame
    counted.
    """
    if info.shown is None or info.keyframes is None:
        return None
    runs: list[Run] = []
    for time, last in info.shown[list(wanted)].tolist():
        before = info.keyframes[: np.searchsorted(info.keyframes[:, 1], last, side="right")]
        starts = before[before[:, 0] <= time, 1]
        if not len(starts):
            return None
        first = int(starts[-1])
        if runs and first <= runs[-1][1] + 1:
            runs[-1] = (min(first, runs[-1][0]), max(last, runs[-1][1]))
        else:
            runs.append((first, last))
    return runs


@contextmanager
def _open(data: Encoded, max_source_pixels: int) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first real video stream; failures inside become RowErrors."""
    file, size = as_file(data)
    if not size:
        raise RowError("bad_video", "the video has zero bytes")
    try:
        with av.open(
            file, "r", container_options=OPEN_OPTIONS, metadata_errors="replace"
        ) as container:
            yield container, _video_stream(container, max_source_pixels)
    except MemoryError:  # FFmpeg's is an FFmpegError too
        raise
    except av.FFmpegError as error:
        text = error.strerror or str(error)
        raise RowError(
            "bad_video", f"the video is damaged, cut off, or in no known container: {text}"
        ) from error


def _video_stream(container: InputContainer, max_source_pixels: int) -> VideoStream:
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise RowError("bad_video", f"this {container.format.name} file holds no video stream")
    stream = streams[0]
    context = stream.codec_context
    if context is None:
        raise RowError("bad_video", "the video's codec is not supported")
    if context.width * context.height > max_source_pixels:
        raise RowError(
            "media_too_large",
            f"the header says {context.width}x{context.height} pixels a frame, more than "
            f"{max_source_pixels:,}; shrink the clip",
        )
    context.thread_count = 1  # the caller spreads clips over cores
    # the frames may be larger than the header says
    context.options = {"max_pixels": str(max_source_pixels)}
    return stream


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise RowError("bad_video", "the video is damaged or cut off within a frame")
        if packet.size:  # the last one is empty and only asks the decoder for what it holds back
            yield packet


def _decoded(
    container: InputContainer, stream: VideoStream, runs: Sequence[Run] | None
) -> Iterator[VideoFrame]:
    """The frames of the packets in `runs`, or of all, in the order of showing within each run."""
    context = stream.codec_context
    left = iter(runs or [(0, -1)])
    first, last = next(left)
    for number, packet in enumerate(_packets(container, stream)):
        if number >= first:
            yield from context.decode(packet)
        if number == last:
            yield from context.decode(None)
            following = next(left, None)
            if following is None:
                return
            context.flush_buffers()
            first, last = following
    yield from context.decode(None)


def _upright(frame: VideoFrame, rotation: int) -> Frame:
    """`rotation` is in degrees counter-clockwise; only quarter turns occur in practice."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(), round(rotation / 90)))
