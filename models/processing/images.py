"""Image bytes to patches: decoded by Pillow, upright, in RGB."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

from glm_batch.models.checkpoint.media_config import ImageProcessorConfig
from glm_batch.models.errors import RowError
from glm_batch.models.processing.budget import image_grid
from glm_batch.models.processing.patches import (
    Encoded,
    Frame,
    MediaPatches,
    PatchWriter,
    as_file,
    encoded_digest,
)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# What Pillow's readers raise on damaged files, beside the OSError that they mean to.
DECODE_FAILURES = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError,
    AttributeError, struct.error, zlib.error,
)  # fmt: skip

WEBP_HEADER_BYTES = 30
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPPED = (5, 6, 7, 8)


class ImageProcessor:
    """Turns images into patches under one configuration."""

    def __init__(self, config: ImageProcessorConfig) -> None:
        self.config = config

    def from_bytes(self, data: Encoded, *, digest: str | None = None) -> MediaPatches:
        """The patches of an encoded image. Raises RowError for what is unreadable or too large.

        `digest` is that of encoded_digest, for callers who know it already.
        """
        frame = decode_image(data, max_source_pixels=self.config.max_source_pixels)
        return self._patches(frame, digest or encoded_digest("image", data, self.config))

    def from_array(self, frame: Frame) -> MediaPatches:
        """The patches of uint8 [height, width, 3] in RGB. Raises RowError for any other array."""
        check_frame(frame, "bad_image")
        return self._patches(frame, None)

    def _patches(self, frame: Frame, digest: str | None) -> MediaPatches:
        grid = image_grid(frame.shape[0], frame.shape[1], self.config)
        writer = PatchWriter("image", (1, frame.shape[0], frame.shape[1]), grid, self.config)
        writer.write(0, frame)
        return writer.finish(digest=digest)


def decode_image(data: Encoded, *, max_source_pixels: int) -> Frame:
    """uint8 [height, width, 3] in RGB, upright as its EXIF says; an animation's first picture.

    Transparency is dropped, the colours under it stay; 16 bits per value become the upper 8. Raises
    RowError.
    """
    with _open(data, max_source_pixels) as image:
        turn = _UPRIGHT.get(_orientation(image))
        image.load()
        if image.mode.startswith("I;16"):  # Pillow would clip at 255
            grey = (np.asarray(image) >> 8).astype(np.uint8)
            image = Image.fromarray(grey)
        image = image if image.mode == "RGB" else image.convert("RGB")
        return np.array(image if turn is None else image.transpose(turn))


def read_image_size(data: Encoded, *, max_source_pixels: int) -> tuple[int, int]:
    """(height, width) of the upright image, from its header alone. Raises RowError."""
    with _open(data, max_source_pixels) as image:
        width, height = image.size
        return (width, height) if _orientation(image) in _SWAPPED else (height, width)


def check_frame(frame: Frame, code: str) -> None:
    """Raises RowError for anything but uint8 [height, width, 3]."""
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or not frame.size:
        raise RowError(
            code,
            f"the array is {frame.dtype} {list(frame.shape)}; it must be uint8 [height, width, 3]",
        )


@contextmanager
def _open(data: Encoded, max_source_pixels: int) -> Iterator[Image.Image]:
    """The image, its header checked, its pixels not yet decoded; failures become RowErrors."""
    file, size = as_file(data)
    if not size:
        raise RowError("bad_image", "the image has zero bytes")
    try:
        _check_pixels(*_webp_canvas(file.read(WEBP_HEADER_BYTES)), max_source_pixels)
        file.seek(0)
        with Image.open(file, formats=FORMATS) as image:
            _check_pixels(*image.size, max_source_pixels)
            yield image
    except UnidentifiedImageError as error:
        allowed = ", ".join(FORMATS)
        raise RowError("bad_image", f"these {size:,} bytes are no image in {allowed}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RowError(
            "media_too_large", f"the header says more than {max_source_pixels:,} pixels; shrink it"
        ) from error
    except DECODE_FAILURES as error:
        raise RowError("bad_image", f"the image is damaged or cut off: {error}") from error


def _check_pixels(width: int, height: int, limit: int) -> None:
    if width * height > limit:
        raise RowError(
            "media_too_large",
            f"the header says {width}x{height} pixels, more than {limit:,}; shrink it",
        )


def _webp_canvas(data: bytes) -> tuple[int, int]:
    """(width, height) of a WEBP, whose canvas Pillow sets up as it opens; (0, 0) of others."""
    if len(data) < WEBP_HEADER_BYTES or data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return 0, 0
    if data[12:16] == b"VP8X":  # extended: 24 bits each, less one
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if data[12:16] == b"VP8L":  # lossless: 14 bits each, less one
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(
        data[28:30], "little"
    ) & 0x3FFF


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1, upright, where the metadata is damaged: the pixels may still be fine."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except DECODE_FAILURES:
        return 1
    return value if isinstance(value, int) else 1
