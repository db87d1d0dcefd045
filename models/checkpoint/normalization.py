"""Normalization: how a checkpoint wants uint8 pixels turned into numbers.

Owns the numbers alone; models.checkpoint.media_config reads them. Knows nothing of sizes, budgets
or tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MediaKind = Literal["image", "video"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalization:
    """y = (x * rescale_factor - mean) / std, with one mean and one std for each channel."""

    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    rescale_factor: float = 1 / 255
