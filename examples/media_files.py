"""Pictures and clips as files in memory: JPEG, PNG, WEBP and MP4, whole or broken.

Owns the encoders' settings and the kinds of damage. Knows nothing of shapes, gold answers or
tables.
"""

from __future__ import annotations

import io
import math
import random
import struct
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image

BROKEN_IMAGES = ("truncated JPEG", "text", "zero bytes", "null", "bomb")
BROKEN_CLIPS = ("truncated MP4", "index cut off", "audio only", "text", "zero bytes", "null")

_EXIF_ORIENTATION = 0x0112
_TURNS = {
    3: Image.Transpose.ROTATE_180,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}
_PNG_PIXELS = 200 * 200  # larger ones would fill the shards
_BOMB_SIDE = 30_000


def encode_image(picture: Image.Image, rng: random.Random) -> bytes:
    """A JPEG, PNG or WEBP file of the picture; every fourth JPEG is stored turned, with the EXIF
    tag that says so.
    """
    kind = rng.choice(
        ("JPEG", "JPEG", "WEBP", "PNG" if math.prod(picture.size) <= _PNG_PIXELS else "WEBP")
    )
    quality = rng.randrange(60, 96)
    if kind == "PNG":
        return _save(picture.convert("RGBA") if rng.random() < 0.3 else picture, kind)
    if kind == "WEBP":
        return _save(picture, kind, quality=quality)
    if rng.random() < 0.25:
        orientation = rng.choice(list(_TURNS))
        exif = Image.Exif()
        exif[_EXIF_ORIENTATION] = orientation
        return _save(picture.transpose(_TURNS[orientation]), kind, quality=quality, exif=exif)
    return _save(picture, kind, quality=quality)


def encode_clip(frames: Sequence[Image.Image], fps: int, *, index_first: bool = False) -> bytes:
    """An H.264 file of frames with even sides; `index_first` puts the packets' index before."""
    # a file in memory cannot be opened again to move its index
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        with av.open(
            path, "w", options={"movflags": "faststart"} if index_first else {}
        ) as container:
            stream = container.add_stream(
                "libx264", rate=fps, options={"crf": "27", "preset": "fast", "threads": "1"}
            )
            stream.pix_fmt = "yuv420p"
            stream.width, stream.height = frames[0].size
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))
            container.mux(stream.encode(None))
        return path.read_bytes()


def broken_image(kind: str, picture: Image.Image) -> bytes | None:
    """The bytes of one of BROKEN_IMAGES; `picture` is what a cut-off file would have shown."""
    if kind == "truncated JPEG":
        data = _save(picture, "JPEG", quality=90)
        return data[: len(data) // 2]
    return png_bomb() if kind == "bomb" else _no_media(kind)


def broken_clip(kind: str, frames: Sequence[Image.Image], fps: int) -> bytes | None:
    """The bytes of one of BROKEN_CLIPS; `frames` are what a cut-off file would have shown."""
    if kind in ("truncated MP4", "index cut off"):
        data = encode_clip(frames, fps, index_first=kind == "truncated MP4")
        return data[: len(data) // 2]
    return _audio_only() if kind == "audio only" else _no_media(kind)


def png_bomb() -> bytes:
    """A PNG of a hundred bytes whose header claims 900 million pixels."""
    header = struct.pack(">IIBBBBB", _BOMB_SIDE, _BOMB_SIDE, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def _no_media(kind: str) -> bytes | None:
    return {"text": b"This file was once a picture.\n", "zero bytes": b"", "null": None}[kind]


def _audio_only() -> bytes:
    """Half a second of silence in an MP4 container."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16_000)
        silence = av.AudioFrame.from_ndarray(
            np.zeros((1, 8000), np.float32), format="fltp", layout="mono"
        )
        silence.sample_rate = 16_000
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _save(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()
