"""Photo-like JPEGs for the image benchmarks: smooth shapes with fine grain, every one different,
seeded.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

QUALITY = 85


def photos(count: int, width: int, height: int, seed: int = 0) -> Iterator[bytes]:
    """`count` different JPEGs of that size."""
    rng = np.random.default_rng(seed)
    scenes = [_scene(rng, width, height) for _ in range(16)]
    for number in range(count):
        scene = np.roll(
            scenes[number % len(scenes)], rng.integers(0, (height, width)).tolist(), axis=(0, 1)
        )
        scene = np.ascontiguousarray(scene[:, :, rng.permutation(3)])
        scene[: height // 8, : width // 8] = rng.integers(0, 256, 3)
        buffer = io.BytesIO()
        Image.fromarray(scene).save(buffer, "JPEG", quality=QUALITY)
        yield buffer.getvalue()


def _scene(rng: np.random.Generator, width: int, height: int) -> NDArray[np.uint8]:
    """uint8 [height, width, 3]: blobs at three scales and grain."""
    total = np.zeros((height, width, 3), np.float32)
    for cells, weight in ((4, 90.0), (16, 50.0), (64, 25.0)):
        coarse = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        smooth = np.asarray(
            Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32
        )
        total += (smooth / 127.5 - 1) * weight
    total += rng.normal(0, 4, total.shape).astype(np.float32)
    return np.clip(total + 128, 0, 255).astype(np.uint8)
