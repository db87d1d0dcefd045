"""What an image or a video costs: its size after resizing, its frames, patches and tokens.

Arithmetic on sizes, equal to the published GLM-4.1V processors'.
"""

from __future__ import annotations

import math

import numpy as np

from glm_batch.models.checkpoint.media_config import ImageProcessorConfig, VideoProcessorConfig
from glm_batch.models.errors import RowError

Grid = tuple[int, int, int]  # patches along time, height and width

MAX_ASPECT_RATIO = 200


def smart_resize(
    num_frames: int, height: int, width: int, config: ImageProcessorConfig
) -> tuple[int, int]:
    """(height, width) in pixels of frames of that size once they are within the budget.

    The sides keep their ratio as far as the multiples allow. Ties round to even, as Python does.
    Raises RowError when one side is more than 200 times the other.
    """
    factor = config.factor
    source = f"{width}x{height}"
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise RowError(
            "media_aspect_ratio",
            f"at {source} pixels one side is more than {MAX_ASPECT_RATIO} times the other; cut it",
        )
    even_frames = round(num_frames / config.temporal_patch_size) * config.temporal_patch_size
    rounded = round(height / factor) * factor, round(width / factor) * factor
    pixels = even_frames * rounded[0] * rounded[1]
    if pixels > config.max_pixels:
        shrink = math.sqrt(num_frames * height * width / config.max_pixels)
        height, width = (math.floor(side / shrink / factor) * factor for side in (height, width))
        return max(factor, height), max(factor, width)
    if pixels < config.min_pixels:
        grow = math.sqrt(config.min_pixels / (num_frames * height * width))
        height, width = (math.ceil(side * grow / factor) * factor for side in (height, width))
        return height, width
    return rounded


def image_grid(height: int, width: int, config: ImageProcessorConfig) -> Grid:
    """The patches of an image of that size. Raises RowError as smart_resize does."""
    return _grid(1, *smart_resize(config.temporal_patch_size, height, width, config), config)


def video_grid(num_frames: int, height: int, width: int, config: VideoProcessorConfig) -> Grid:
    """The patches of so many sampled frames; the last one is repeated to fill a group."""
    groups = math.ceil(num_frames / config.temporal_patch_size)
    num_frames = max(num_frames, config.temporal_patch_size)
    return _grid(groups, *smart_resize(num_frames, height, width, config), config)


def num_media_tokens(grid: Grid, merge_size: int) -> int:
    """Tokens that a grid becomes in a prompt, without those of the markers around them."""
    return math.prod(grid) // merge_size**2


def sample_frames(
    num_frames: int, fps: float, config: VideoProcessorConfig, *, duration_s: float | None = None
) -> list[int]:
    """The frames to take of a clip, in order; an even number of them, so the last may occur twice.

    `fps` is the clip's own rate. Without `duration_s` the length is estimated as the published
    processor does.
    """
    last = num_frames - 1
    duration_s = duration_s or round(last / fps) + 1
    if duration_s <= config.max_duration_s:
        count = max(math.floor(duration_s * config.fps), 1)
        indices = [min(last, math.ceil(i * fps / config.fps)) for i in range(count)]
    elif (count := max(int(config.max_duration_s * config.fps), 1)) < num_frames:
        indices = [
            min(last, math.ceil(second * fps))
            for second in np.linspace(0, duration_s, count).tolist()
        ]
    else:
        indices = list(range(num_frames))
    indices = list(dict.fromkeys(indices))
    return indices + indices[-1:] * (len(indices) % 2)


def group_timestamps(indices: list[int], fps: float, config: VideoProcessorConfig) -> list[float]:
    """Seconds from the clip's begin to the first frame of each group of sampled frames."""
    return [index / fps for index in indices[:: config.temporal_patch_size]]


def _grid(groups: int, height: int, width: int, config: ImageProcessorConfig) -> Grid:
    return groups, height // config.patch_size, width // config.patch_size
