"""Videos against recorded outputs and a plain decoding loop, and what becomes of damaged and
hostile ones.
"""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from transformers.models.glm4v.video_processing_glm4v import Glm4vVideoProcessor
from transformers.video_utils import VideoMetadata

from glm_batch.models.checkpoint.media_config import VideoProcessorConfig
from glm_batch.models.errors import RowError
from glm_batch.models.processing import video
from glm_batch.models.processing.budget import group_timestamps, sample_frames
from glm_batch.models.processing.patches import encoded_digest, pixel_values
from glm_batch.models.processing.video import VideoProcessor, decode_frames, scan_video
from tests.models.processing.golden import CASES, DATA, budget, check_values

CONFIG = VideoProcessorConfig()
SMALL = VideoProcessorConfig(min_pixels=1000, max_pixels=400_000)
LIMIT = CONFIG.max_source_pixels

# (container, encoder, its options); the x264 ones have B-frames, which are stored after frames
# shown later.
ENCODINGS = {
    "mp4": ("mp4", "libx264", {"bf": "2", "g": "12", "sc_threshold": "0"}),
    "open gop": ("mp4", "libx264", {"bf": "3", "g": "10", "x264-params": "open-gop=1:scenecut=0"}),
    "one keyframe": ("mp4", "libx264", {"bf": "2", "g": "1000"}),
    "fragmented": ("mp4", "libx264", {"bf": "2", "g": "12"}),
    "hevc": ("mp4", "libx265", {"x265-params": "keyint=12:bframes=3:log-level=none"}),
    "matroska": ("matroska", "libx264", {"bf": "2", "g": "12"}),
    "webm": (
        "webm",
        "libvpx-vp9",
        {"g": "12", "lag-in-frames": "10", "auto-alt-ref": "1", "cpu-used": "8"},
    ),
    "webm vp8": (
        "webm",
        "libvpx",
        {"g": "12", "lag-in-frames": "10", "auto-alt-ref": "1", "cpu-used": "8"},
    ),
    "avi": ("avi", "mpeg4", {"g": "12"}),
    "avi b-frames": ("avi", "mpeg4", {"g": "12", "bf": "2"}),
    "transport stream": ("mpegts", "libx264", {"bf": "2", "g": "12"}),
    "mpeg-2": ("mpegts", "mpeg2video", {"bf": "2", "g": "12"}),
}


def moving_square(number: int, height: int, width: int) -> np.ndarray:
    """A frame that tells its number: a square wanders over a ground that becomes brighter."""
    frame = np.full((height, width, 3), 20 + number * 3 % 200, np.uint8)
    left, top = number * 5 % (width - 16), number * 3 % (height - 16)
    frame[top : top + 16, left : left + 16] = (230, 40, 90)
    return frame


@cache
def clip(
    num_frames: int = 40,
    fps: int = 10,
    size: tuple[int, int] = (64, 96),
    encoding: str = "mp4",
    step: int = 0,
) -> bytes:
    """An encoded moving_square; `step` widens the gap between the later frames, in tenths of a
    frame's time.
    """
    container_format, codec, options = ENCODINGS[encoding]
    buffer = io.BytesIO()
    flags = {"movflags": "frag_keyframe+empty_moov"} if encoding == "fragmented" else {}
    with av.open(buffer, "w", format=container_format, options=flags) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.options = options
        parts = 10 if step else 1
        stream.codec_context.time_base = Fraction(1, fps * parts)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(moving_square(number, *size), format="rgb24")
            frame.pts = parts * number + step * max(0, number - num_frames // 2)
            frame.time_base = Fraction(1, fps * parts)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


@cache
def audio(container_format: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container_format) as container:
        stream = container.add_stream(
            "pcm_s16le" if container_format == "wav" else "aac", rate=16000
        )
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 16000), np.int16), format="s16", layout="mono"
        )
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def decoded(data: bytes) -> list[np.ndarray]:
    """Every frame of a clip, by PyAV's own plain loop."""
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def error_of(data: bytes, config: VideoProcessorConfig = SMALL) -> RowError:
    with pytest.raises(RowError) as caught:
        VideoProcessor(config).from_bytes(data)
    return caught.value


# ---- sampling ----


@pytest.mark.parametrize(
    ("total", "fps", "duration", "expected"),
    [
        (300, 30, 10, list(range(0, 300, 15))),
        (8, 4, None, [0, 2, 4, 6, 7, 7]),
        (1, 30, None, [0, 0]),
        (3, 2, 1.5, [0, 1, 2, 2]),
        (15, 15, 1, [0, 8]),
        (9000, 30, 300, list(range(0, 9000, 15))),
    ],
)
def test_sampling_vectors(
    total: int, fps: float, duration: float | None, expected: list[int]
) -> None:
    assert sample_frames(total, fps, CONFIG, duration_s=duration) == expected


def test_sampling_vectors_by_their_ends() -> None:
    tail = sample_frames(240, 24, CONFIG)
    assert (len(tail), tail[-3:]) == (22, [228, 239, 239])
    long = sample_frames(9030, 30, CONFIG, duration_s=301)
    assert (long[:3], long[-2:]) == ([0, 16, 31], [9015, 9029])
    longer = sample_frames(18000, 30, CONFIG, duration_s=600)
    assert (longer[:3], longer[-1]) == ([0, 31, 61], 17999)
    assert sample_frames(300, 30, replace(CONFIG, fps=1), duration_s=10) == list(range(0, 300, 30))


def test_sampling_equals_transformers() -> None:
    chance = random.Random(0)
    for _ in range(800):
        total = chance.choice([chance.randint(1, 40), chance.randint(1, 40_000)])
        fps = chance.choice([1, 2, 4, 23.976, 25, 29.97, 30, 59.94, chance.uniform(0.5, 240)])
        target = chance.choice([2, 2, 1, 0.5, 4, 30])
        duration = chance.choice([None, total / fps])
        oracle = SimpleNamespace(fps=target, max_duration=300)
        metadata = VideoMetadata(total_num_frames=total, fps=fps, duration=duration)
        expected = Glm4vVideoProcessor.sample_frames(oracle, metadata).tolist()
        assert (
            sample_frames(total, fps, replace(CONFIG, fps=target), duration_s=duration) == expected
        )


def test_a_rate_of_almost_nothing_still_takes_a_frame() -> None:
    assert sample_frames(90_000, 30, replace(CONFIG, fps=0.001)) == [0, 0]


def test_timestamps_are_those_of_each_pair() -> None:
    indices = sample_frames(24, 8, CONFIG, duration_s=3)
    assert indices == [0, 4, 8, 12, 16, 20]
    assert group_timestamps(indices, 8, CONFIG) == [0, 1, 2]
    assert group_timestamps(sample_frames(8, 4, CONFIG), 4, CONFIG) == [0, 1, 1.75]


# ---- equal to the published processor ----


@pytest.mark.parametrize("case", CASES["videos"], ids=lambda case: case["values"])
def test_recorded_outputs(case: dict[str, Any]) -> None:
    first = DATA[f"video{case['video']}_frame0"].astype(np.int16)
    frames = [
        np.clip(np.roll(first, i, axis=1) + i % 7, 0, 255).astype(np.uint8)
        for i in range(case["frames"])
    ]
    config = VideoProcessorConfig(**budget(case))
    assert (
        sample_frames(len(frames), case["fps"], config, duration_s=case["duration"])
        == case["frames_indices"]
    )
    media = VideoProcessor(config).from_frames(frames, case["fps"], duration_s=case["duration"])
    assert list(media.grid) == case["grid_thw"]
    assert len(media.timestamps) == media.grid[0]
    check_values(pixel_values(torch.from_numpy(media.patches), config), case, case["values"])


# ---- decoding ----


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("fps", [2, 0.4], ids=["often", "seldom"])
def test_bytes_equal_their_frames(encoding: str, fps: float) -> None:
    data = clip(encoding=encoding)
    config = replace(SMALL, fps=fps)
    expected = VideoProcessor(config).from_frames(decoded(data), 10, duration_s=4)
    media = VideoProcessor(config).from_bytes(data)
    assert media.timestamps == expected.timestamps
    assert np.array_equal(media.patches, expected.patches)
    assert media.grid == expected.grid


def test_only_what_the_sampled_frames_depend_on_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 frames with a keyframe every 12, the frames 0 and 25 need the first and two from the
    keyframe 24 on.
    """
    seen: list[int] = []
    plain = video._decoded

    def counting(*args: Any) -> Iterator[Any]:
        for frame in plain(*args):
            seen.append(frame.pts)
            yield frame

    monkeypatch.setattr(video, "_decoded", counting)
    data = clip()
    info = scan_video(data, max_source_pixels=LIMIT)
    frames = dict(decode_frames(data, info, [0, 25], max_source_pixels=LIMIT))
    everything = decoded(data)
    assert np.array_equal(frames[0], everything[0])
    assert np.array_equal(frames[25], everything[25])
    assert len(seen) <= 6


def test_a_file_is_read_as_its_bytes_are(tmp_path: Path) -> None:
    (tmp_path / "clip").write_bytes(clip())
    expected = VideoProcessor(SMALL).from_bytes(clip())
    with (tmp_path / "clip").open("rb") as file:
        media = VideoProcessor(SMALL).from_bytes(file)
    assert np.array_equal(media.patches, expected.patches)
    assert media.digest == expected.digest


def test_the_digest_of_a_clip_names_its_bytes_and_the_configuration() -> None:
    digests = [
        VideoProcessor(SMALL).from_bytes(clip()).digest,
        VideoProcessor(SMALL).from_bytes(clip(39)).digest,
        VideoProcessor(SMALL).from_frames(decoded(clip()), 10, duration_s=4).digest,
        VideoProcessor(replace(SMALL, fps=1)).from_bytes(clip()).digest,
        encoded_digest("image", clip(), SMALL),
    ]
    assert len(set(digests)) == 5
    assert VideoProcessor(SMALL).from_bytes(bytes(bytearray(clip()))).digest == digests[0]
    assert encoded_digest("video", clip(), SMALL) == digests[0]


def test_memory_holds_the_sampled_frames_and_not_the_clip() -> None:
    """600 frames of 320x240 are 138 MB; a source frame, its conversion and the budget are below 5
    MB.
    """
    data = clip(600, 30, (240, 320))
    config = replace(SMALL, max_pixels=1_000_000)
    VideoProcessor(config).from_bytes(clip())  # imports and caches
    tracemalloc.start()
    media = VideoProcessor(config).from_bytes(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert media.grid[0] == 20
    assert peak < 12e6


@pytest.mark.parametrize(
    ("num_frames", "groups"), [(1, 1), (2, 1), (5, 1), (7, 1), (16, 2), (40, 4)]
)
def test_odd_and_small_numbers_of_frames(num_frames: int, groups: int) -> None:
    media = VideoProcessor(SMALL).from_bytes(clip(num_frames))
    assert media.grid[0] == groups
    assert len(media.timestamps) == groups
    assert media.patches.shape == (np.prod(media.grid), 2 * 3 * 14 * 14)


def test_one_frame_fills_both_halves_of_its_patches() -> None:
    patches = VideoProcessor(SMALL).from_bytes(clip(1)).patches.reshape(-1, 3, 2, 196)
    assert np.array_equal(patches[:, :, 0], patches[:, :, 1])


def _with_matrix(data: bytes, *matrix: int) -> bytes:
    """The MP4 with another display matrix (a, b, c, d) in its track header."""
    start = data.index(b"tkhd") + 44
    values = [
        matrix[0] << 16,
        matrix[1] << 16,
        0,
        matrix[2] << 16,
        matrix[3] << 16,
        0,
        0,
        0,
        1 << 30,
    ]
    return data[:start] + struct.pack(">9i", *values) + data[start + 36 :]


@pytest.mark.parametrize(
    ("matrix", "clockwise"),
    [((1, 0, 0, 1), 0), ((0, 1, -1, 0), 1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 3)],
)
def test_rotation(matrix: tuple[int, ...], clockwise: int) -> None:
    data = clip(10)
    turned = [np.rot90(frame, -clockwise) for frame in decoded(data)]
    expected = VideoProcessor(SMALL).from_frames(turned, 10, duration_s=1)
    media = VideoProcessor(SMALL).from_bytes(_with_matrix(data, *matrix))
    assert media.grid == expected.grid
    assert np.array_equal(media.patches, expected.patches)


def test_variable_frame_rate_counts_frames_at_the_average_rate() -> None:
    data = clip(40, 10, step=30)  # 2 s of 10 frames a second, then 8 s of 2.5
    info = scan_video(data, max_source_pixels=LIMIT)
    assert info.num_frames == 40
    assert info.fps == pytest.approx(4, rel=0.1)
    media = VideoProcessor(SMALL).from_bytes(data)
    expected = VideoProcessor(SMALL).from_frames(decoded(data), info.fps, duration_s=40 / info.fps)
    assert np.array_equal(media.patches, expected.patches)


@pytest.mark.parametrize("seconds", [1, 86_400])
def test_the_containers_duration_is_not_believed(seconds: int) -> None:
    data = bytearray(clip(40))
    scale_at = data.index(b"mvhd") + 16
    (scale,) = struct.unpack(">I", data[scale_at : scale_at + 4])
    data[scale_at + 4 : scale_at + 8] = struct.pack(">I", seconds * scale)
    media, plain = (VideoProcessor(SMALL).from_bytes(source) for source in (bytes(data), clip(40)))
    assert np.array_equal(media.patches, plain.patches)
    assert media.timestamps == plain.timestamps


def test_a_day_of_video_costs_its_sampled_frames() -> None:
    """A frame every five minutes makes 288 frames a day; the budget, not the length, sets the size
    of the patches.
    """
    data = clip(288, 1, encoding="one keyframe")
    slow = bytearray(data)
    for name in (b"mvhd", b"mdhd"):  # a time scale 300 times as coarse
        at = slow.index(name) + 16
        (scale,) = struct.unpack(">I", slow[at : at + 4])
        slow[at : at + 4] = struct.pack(">I", max(scale // 300, 1))
    info = scan_video(bytes(slow), max_source_pixels=LIMIT)
    assert info.num_frames / info.fps > 80_000
    media = VideoProcessor(SMALL).from_bytes(bytes(slow))
    assert media.grid[0] == 144
    assert media.timestamps[-1] > 80_000
    assert media.patches.nbytes <= 3 * 400_000


# ---- files that cannot be read ----


@pytest.mark.parametrize(
    ("make", "says"),
    [
        pytest.param(lambda: b"", "zero bytes", id="zero bytes"),
        pytest.param(lambda: b"just some text\n" * 99, "damaged", id="text"),
        pytest.param(lambda: bytes(5000), "damaged", id="zeros"),
        pytest.param(lambda: clip()[: len(clip()) // 2], "", id="cut before its index"),
        pytest.param(lambda: clip(0), "", id="zero frames"),
        pytest.param(lambda: audio("wav"), "damaged", id="wav"),
        pytest.param(lambda: audio("adts"), "damaged", id="aac"),
        pytest.param(lambda: audio("mp4"), "no video stream", id="sound in mp4"),
        pytest.param(lambda: audio("matroska"), "no video stream", id="sound in matroska"),
        pytest.param(lambda: clip(encoding="matroska")[:700], "", id="matroska without frames"),
    ],
)
def test_unreadable_files_are_row_errors(make: Callable[[], bytes], says: str) -> None:
    error = error_of(make())
    assert error.code == "bad_video"
    assert says in error.message


@pytest.mark.parametrize("part", [0.4, 0.7, 0.9, 0.99])
def test_a_cut_off_mp4_whose_index_comes_first(part: float, tmp_path: Path) -> None:
    """The index is whole, so that the file opens; the loss shows in the entries that point past its
    end.
    """
    plain, path = clip(), tmp_path / "first.mp4"
    with (
        av.open(io.BytesIO(plain)) as source,
        av.open(str(path), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    whole = path.read_bytes()
    assert whole.index(b"moov") < whole.index(b"mdat")
    first, last = (VideoProcessor(SMALL).from_bytes(source).patches for source in (whole, plain))
    assert np.array_equal(first, last)
    data_begins = whole.index(b"mdat")
    error = error_of(whole[: data_begins + int((len(whole) - data_begins) * part)])
    assert (error.code, "cut off" in error.message) == ("bad_video", True)


def test_a_sound_files_cover_is_not_a_video() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=16000)
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 16000), np.int16), format="s16", layout="mono"
        )
        frame.sample_rate = 16000
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
        container.mux(
            cover.encode(
                av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            )
        )
        container.mux(cover.encode())
    assert "no video stream" in error_of(buffer.getvalue()).message


def test_damaged_bytes_give_patches_or_a_row_error() -> None:
    chance = random.Random(2)
    outcomes = set()
    for encoding in ("mp4", "webm", "avi", "transport stream", "fragmented"):
        good = clip(12, encoding=encoding)
        for _ in range(25):
            data = bytearray(good)
            for _ in range(chance.randint(1, 12)):
                data[chance.randrange(min(len(data), chance.choice([200, len(data)])))] = (
                    chance.randrange(256)
                )
            try:
                outcomes.add(VideoProcessor(SMALL).from_bytes(bytes(data)).patches.dtype)
            except RowError as error:
                outcomes.add(error.code)
    assert "bad_video" in outcomes
    assert outcomes <= {np.dtype(np.uint8), "bad_video", "media_too_large", "media_aspect_ratio"}


def test_a_huge_frame_is_refused_from_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "_decoded", lambda *args: pytest.fail("frames were decoded"))
    error = error_of(clip(), replace(SMALL, max_source_pixels=64 * 96 - 1))
    assert error.code == "media_too_large"
    assert "96x64" in error.message


def _playlist(kind: str, target: str) -> bytes:
    if kind == "hls":
        return (
            f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9.0,\n{target}\n#EXT-X-ENDLIST\n".encode()
        )
    return f"ffconcat version 1.0\nfile '{target}'\n".encode()


@pytest.mark.parametrize("kind", ["hls", "concat"])
@pytest.mark.parametrize("target", ["file", "http://127.0.0.1:9/other.ts"])
def test_a_playlist_is_no_video(kind: str, target: str, tmp_path: Path) -> None:
    other = tmp_path / "other.ts"
    other.write_bytes(clip(encoding="transport stream"))
    assert error_of(_playlist(kind, str(other) if target == "file" else target)).code == "bad_video"


def test_no_file_could_be_opened_were_playlists_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.ts"
    other.write_bytes(clip(encoding="transport stream"))
    playlist = _playlist("concat", str(other))
    options = {"safe": "0"}  # of the concat reader: take any path
    monkeypatch.setattr(video, "OPEN_OPTIONS", options)
    assert VideoProcessor(SMALL).from_bytes(playlist).grid[0] == 4  # so the playlist is a good one
    monkeypatch.setattr(video, "OPEN_OPTIONS", {**options, "protocol_whitelist": ""})
    assert error_of(playlist).code == "bad_video"


def test_no_frames_to_sample() -> None:
    with pytest.raises(RowError, match="no frames"):
        VideoProcessor(SMALL).from_frames([], 10)
