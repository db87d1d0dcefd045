"""Where a prompt's images and videos stand: which placeholder tokens take which features. Plain
Python, no torch.

Owns the check that prompt and media fit each other. A token's key in the prefix index is its id,
but a placeholder's is its feature: equal texts about different images share nothing from the first
image on.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from glm_batch.models.checkpoint.media_config import MediaKind
from glm_batch.models.checkpoint.model_config import MediaTokens, VisionConfig
from glm_batch.models.errors import RowError
from glm_batch.models.processing.patches import Media, MediaItem


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, end) take the features [first, first + end - start) of `item`."""

    item: MediaItem
    start: int
    end: int
    first: int

    def cut(self, start: int, end: int) -> Span | None:
        """What lies within tokens [start, end); None when that is nothing."""
        low, high = max(start, self.start), min(end, self.end)
        return Span(self.item, low, high, self.first + low - self.start) if low < high else None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacedMedia:
    """Media of one prompt, matched with its tokens: one span for each image and each frame, in the
    prompt's order.

    keys: what identifies each prompt token. positions: int64 [3, tokens].
    """

    spans: tuple[Span, ...]
    keys: list[Hashable]
    positions: NDArray[np.int64]
    rope_delta: int

    @property
    def num_tokens(self) -> int:
        return sum(span.end - span.start for span in self.spans)


def place(
    media: Media | None, prompt: Sequence[int], tokens: MediaTokens, vision: VisionConfig
) -> PlacedMedia | None:
    """Matches images with placeholders outside videos, frames with those inside; else RowError."""
    items = media.items if media else ()
    for item in items:
        _check_item(item, vision)
    merged = vision.spatial_merge_size**2
    where = _placeholders(prompt, tokens)
    spans: list[Span] = []
    for kind, name in (("image", "image"), ("video", "video frame")):
        mine = [item for item in items if item.kind == kind]
        expected = sum(len(item.patches) // merged for item in mine)
        if expected != len(where[kind]):
            raise RowError(
                "media_mismatch",
                f"the prompt has {len(where[kind])} {name} tokens, its "
                f"{len(mine)} {kind}s give {expected} features",
            )
        spans += _spans(mine, where[kind], merged)
    if media is None:
        return None
    _check_positions(media, len(prompt))
    spans.sort(key=lambda span: span.start)
    keys: list[Hashable] = list(prompt)
    for span in spans:
        key, num_tokens = span.item.key, span.end - span.start
        keys[span.start : span.end] = [(key, span.first + i) for i in range(num_tokens)]
    return PlacedMedia(
        spans=tuple(spans), keys=keys, positions=media.positions, rope_delta=media.rope_delta
    )


def _placeholders(prompt: Sequence[int], tokens: MediaTokens) -> dict[str, list[int]]:
    """The indices of the placeholders outside and inside videos."""
    found: dict[str, list[int]] = {"image": [], "video": []}
    kind: MediaKind = "image"
    for index, token in enumerate(prompt):
        if token == tokens.image:
            found[kind].append(index)
        elif token == tokens.video_start:
            kind = "video"
        elif token == tokens.video_end:
            kind = "image"
    return found


def _spans(items: list[MediaItem], where: list[int], merged: int) -> Iterator[Span]:
    """One span a frame, of neighbouring tokens: else the media stand in another order."""
    indices = iter(where)
    for item in items:
        frames = item.grid_thw[0]
        count = len(item.patches) // merged // frames
        for frame in range(frames):
            mine = list(islice(indices, count))
            if mine[-1] - mine[0] != count - 1:
                raise RowError(
                    "media_mismatch",
                    f"a frame of {count} features (grid {item.grid_thw}) meets placeholder tokens "
                    f"that are apart, at {mine[0]} to {mine[-1]}; media must stand in the order of "
                    "their placeholders",
                )
            yield Span(item, mine[0], mine[-1] + 1, frame * count)


def _check_item(item: MediaItem, vision: VisionConfig) -> None:
    t, h, w = item.grid_thw
    copies = vision.temporal_patch_size if item.kind == "video" else 1
    shape = (t * h * w, copies * vision.frame_values)
    merge = vision.spatial_merge_size
    if min(t, h, w) < 1 or h % merge or w % merge or (item.kind == "image" and t != 1):
        raise RowError(
            "invalid_media",
            f"the {item.kind}'s grid is {item.grid_thw}; it must be (frames, rows, "
            f"columns), 1 frame for an image, rows and columns multiples of {merge}",
        )
    if item.patches.dtype != np.uint8 or item.patches.shape != shape:
        raise RowError(
            "invalid_media",
            f"the {item.kind}'s patches are {item.patches.dtype} {list(item.patches.shape)}; its "
            f"grid {item.grid_thw} and the checkpoint ask for uint8 {list(shape)}",
        )


def _check_positions(media: Media, num_tokens: int) -> None:
    positions = media.positions
    if positions.shape != (3, num_tokens) or positions.dtype != np.int64:
        raise RowError(
            "invalid_media",
            f"the positions are {positions.dtype} {list(positions.shape)}; they must be "
            f"int64 [3, {num_tokens}]",
        )
    if positions.min() < 0 or positions.max() >= num_tokens:
        raise RowError("invalid_media", f"the positions reach outside 0 to {num_tokens - 1}")
