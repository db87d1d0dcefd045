"""`python -m benchmarks.preprocessing`: photos to patches, ours against the published processors,
on one thread.

Peers: transformers' Pillow-backed class of GLM-4.1V, and the arithmetic of its torch-backed class
(which needs torchvision) written out with torch alone; that the results are equal is checked on the
way. Owns the timing.
"""

from __future__ import annotations

import io
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks import BUILD
from benchmarks.machine import describe
from benchmarks.photos import photos
from glm_batch.glm_actors.media.media_loader import MediaLoader, MediaRules
from glm_batch.models.checkpoint.media_config import ImageProcessorConfig, VideoProcessorConfig
from glm_batch.models.processing.budget import image_grid
from glm_batch.models.processing.images import ImageProcessor, decode_image
from glm_batch.models.processing.patches import pixel_values

SIZES = ((640, 480), (1920, 1080))
PUBLISHED = ImageProcessorConfig(min_pixels=12544, max_pixels=9633792)

Photo = Any  # encoded bytes or an array, as the contender takes it


def main(
    count: Annotated[int, typer.Option(min=1, help="photos of each size")] = 24,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Prints images per second of one core and ratios, medians of `repeats` interleaved passes."""
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "machine": describe(),
        "count": count,
        "repeats": repeats,
        "sizes": {},
    }
    for width, height in SIZES:
        encoded = list(photos(count, width, height))
        frames = [
            decode_image(data, max_source_pixels=PUBLISHED.max_source_pixels) for data in encoded
        ]
        _check(frames[0])
        seconds = _measure(_contenders(encoded, frames), repeats)
        report["sizes"][f"{width}x{height}"] = {name: 1 / value for name, value in seconds.items()}
    path = BUILD / f"preprocessing-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1))
    _show(Console(), report)


def torch_path(frame: np.ndarray[Any, Any], config: ImageProcessorConfig) -> torch.Tensor:
    """float32 [patches, 1176]: what the torch-backed class computes, step by step as it does."""
    _, rows, columns = image_grid(frame.shape[0], frame.shape[1], config)
    patch, merge, frames = config.patch_size, config.merge_size, config.temporal_patch_size
    image = torch.from_numpy(frame).permute(2, 0, 1)[None]
    image = torch.nn.functional.interpolate(
        image,
        size=(rows * patch, columns * patch),
        mode="bicubic",
        antialias=True,
        align_corners=False,
    )
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1) * 255
        for values in (config.image_mean, config.image_std)
    )
    values = ((image.to(torch.float32) - mean) / std)[:, None].repeat(1, frames, 1, 1, 1)
    grid = (1, 1, frames, 3, rows // merge, merge, patch, columns // merge, merge, patch)
    return values.view(grid).permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(rows * columns, -1)


def _contenders(
    encoded: list[bytes], frames: list[Any]
) -> dict[str, tuple[Callable[[Photo], object], Sequence[Photo]]]:
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

    published = Glm4vImageProcessorPil(
        size={"shortest_edge": PUBLISHED.min_pixels, "longest_edge": PUBLISHED.max_pixels}
    )
    ours = ImageProcessor(PUBLISHED)
    loader = MediaLoader(MediaRules(), PUBLISHED, VideoProcessorConfig())
    salt = iter(range(1 << 30))  # so that no pass finds what an earlier one decoded
    return {
        "decode alone": (
            lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")),
            encoded,
        ),
        "ours": (ours.from_array, frames),
        "torch path": (lambda frame: torch_path(frame, PUBLISHED), frames),
        "transformers PIL": (lambda frame: published(images=[frame], return_tensors="np"), frames),
        "ours, decode included": (ours.from_bytes, encoded),
        "ours, in a job's decoder": (
            lambda data: loader.load([("image", data + next(salt).to_bytes(4))]),
            encoded,
        ),
        "transformers PIL, decode included": (
            lambda data: published(
                images=[Image.open(io.BytesIO(data)).convert("RGB")], return_tensors="np"
            ),
            encoded,
        ),
    }


def _check(frame: Any) -> None:
    """Ours, unfolded, equals the torch path to rounding."""
    ours = pixel_values(
        torch.from_numpy(ImageProcessor(PUBLISHED).from_array(frame).patches), PUBLISHED
    )
    difference = (ours - torch_path(frame, PUBLISHED)).abs().max().item()
    if difference > 1e-6:
        raise SystemExit(f"ours and the torch path differ by {difference}")


def _measure(
    contenders: dict[str, tuple[Callable[[Photo], object], Sequence[Photo]]], repeats: int
) -> dict[str, float]:
    """Seconds a photo: the median over passes, in each of which every contender has its turn."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, (work, items) in contenders.items():
            begun = time.perf_counter()
            for item in items:
                work(item)
            if turn:  # the first one warms up
                seconds[name].append((time.perf_counter() - begun) / len(items))
    return {name: statistics.median(values) for name, values in seconds.items()}


def _show(console: Console, report: dict[str, Any]) -> None:
    sizes = report["sizes"]
    table = Table(title="images per second on one thread")
    table.add_column("")
    for size in sizes:
        table.add_column(size, justify="right")
    for name in next(iter(sizes.values())):
        table.add_row(name, *[f"{rates[name]:.0f}" for rates in sizes.values()])
    for ours, peer in (
        ("ours", "torch path"),
        ("ours", "transformers PIL"),
        ("ours, decode included", "transformers PIL, decode included"),
    ):
        table.add_row(
            f"{ours} / {peer}", *[f"{rates[ours] / rates[peer]:.2f} x" for rates in sizes.values()]
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
