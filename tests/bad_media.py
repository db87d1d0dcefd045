"""Images and videos of every bad and odd kind, each with the error code it must end in, or "ok"."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from tests.models.processing.test_images import SVG, encoded, picture
from tests.models.processing.test_video import _playlist, _with_matrix, audio, clip


def _png(mode: str, **options: Any) -> bytes:
    return encoded(Image.fromarray(picture(60, 80)).convert(mode), "PNG", **options)


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(40, 80), "JPEG", exif=exif)


def _animated() -> bytes:
    return encoded(
        Image.new("RGB", (40, 30), "red"),
        "GIF",
        save_all=True,
        append_images=[Image.new("RGB", (40, 30), "blue")],
    )


def _half(kind: str) -> bytes:
    data = encoded(picture(120, 160), kind)
    return data[: len(data) // 2]


def _claiming(width: int, height: int) -> bytes:
    data = bytearray(encoded(picture(20, 20), "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


IMAGES: list[tuple[str, Callable[[], object], str]] = [
    ("null", lambda: None, "null_media"),
    ("number", lambda: 7, "wrong_type"),
    ("zero bytes", lambda: b"", "bad_image"),
    ("truncated jpeg", lambda: _half("JPEG"), "bad_image"),
    ("truncated png", lambda: _half("PNG"), "bad_image"),
    ("truncated webp", lambda: _half("WEBP"), "bad_image"),
    ("png bomb", lambda: encoded(Image.new("1", (10000, 9000)), "PNG"), "media_too_large"),
    ("bmp bomb", lambda: _claiming(30000, 30000), "media_too_large"),
    (
        "tiff bomb",
        lambda: encoded(Image.new("1", (20000, 20000)), "TIFF", compression="group4"),
        "bad_image",
    ),
    ("jpeg 2000", lambda: encoded(picture(60, 80), "JPEG2000"), "bad_image"),
    ("svg", lambda: SVG, "bad_image"),
    ("text", lambda: b"just text\n" * 9, "bad_image"),
    ("a clip", clip, "bad_image"),
    ("15000x10", lambda: encoded(np.zeros((10, 15000, 3), np.uint8), "PNG"), "media_aspect_ratio"),
    ("1x1", lambda: encoded(np.zeros((1, 1, 3), np.uint8), "PNG"), "ok"),
    ("cmyk", lambda: encoded(Image.fromarray(picture(60, 80)).convert("CMYK"), "JPEG"), "ok"),
    ("16 bits", lambda: encoded(np.full((60, 80), 40000, np.uint16), "PNG"), "ok"),
    ("palette", lambda: _png("P"), "ok"),
    ("alpha", lambda: _png("RGBA"), "ok"),
    ("animated", _animated, "ok"),
    ("exif-rotated", _turned, "ok"),
]
VIDEOS: list[tuple[str, Callable[[], object], str]] = [
    ("null", lambda: None, "null_media"),
    ("zero bytes", lambda: b"", "bad_video"),
    ("truncated mp4", lambda: clip()[: len(clip()) // 2], "bad_video"),
    ("no video stream", lambda: audio("mp4"), "bad_video"),
    ("zero frames", lambda: clip(0), "bad_video"),
    ("an audio file", lambda: audio("wav"), "bad_video"),
    ("an image", lambda: encoded(picture(60, 80), "JPEG"), "bad_video"),
    ("text", lambda: b"just text\n" * 99, "bad_video"),
    ("hls playlist", lambda: _playlist("hls", "/etc/passwd"), "bad_video"),
    ("concat playlist", lambda: _playlist("concat", "http://127.0.0.1:9/x.ts"), "bad_video"),
    ("one frame", lambda: clip(1), "ok"),
    ("odd counts", lambda: clip(7), "ok"),
    ("variable frame rate", lambda: clip(40, 10, step=30), "ok"),
    ("rotated", lambda: _with_matrix(clip(10), 0, 1, -1, 0), "ok"),
]
