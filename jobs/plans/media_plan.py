"""What images and videos cost in a plan, and what they would cost under smaller pixel budgets.

Owns the arithmetic of the what-if, on the sizes of sampled media. Knows nothing of rows, files or
decoding.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from glm_batch.models.checkpoint.media_config import MediaKind
from glm_batch.models.processing.budget import Grid, image_grid, num_media_tokens, video_grid
from glm_batch.models.processing.patches import MediaPatches
from glm_batch.pipelines.job import Job, PreprocessSection
from glm_batch.pipelines.tasks.job_media import media_budgets

SMALLER = (1 / 2, 1 / 4, 1 / 8)  # of the pixels that the largest of the sampled media keeps


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaSize:
    """One image or video: frames taken, height and width before resizing, and patches after it."""

    kind: MediaKind
    source: Grid
    grid: Grid

    @classmethod
    def of(cls, patches: MediaPatches) -> MediaSize:
        return cls(kind=patches.kind, source=patches.source, grid=patches.grid)


def media_lines(
    job: Job, media: Sequence[MediaSize], prompt_tokens: int
) -> Iterator[tuple[str, str]]:
    """Name and text of the lines about media. `prompt_tokens` are those of the whole sample."""
    if not media:
        return
    tokens = media_tokens(job, job.preprocess, media)
    kinds = Counter(each.kind for each in media)
    yield (
        "media tokens",
        f"{sum(tokens) / prompt_tokens:.0%} of the prompt tokens: "
        + " and ".join(f"{count:,} {kind}{'s' * (count > 1)}" for kind, count in kinds.items())
        + f", each min {min(tokens)}, median {statistics.median(tokens):.0f}, max {max(tokens)}",
    )
    for max_pixels in smaller_budgets(job, media):
        fewer = sum(tokens) - sum(media_tokens(job, with_budget(job.preprocess, max_pixels), media))
        if fewer:
            yield (
                f"  preprocess.max_pixels={max_pixels}",
                (
                    f"would save {fewer / prompt_tokens:.0%} of the prompt tokens; see on rows "
                    f"with gold what it costs"
                ),
            )


def media_note(patches: MediaPatches) -> str:
    """What a shown prompt's placeholder stands for: ", image 640x480"."""
    frames, height, width = patches.source
    return f", {patches.kind} {width}x{height}" + (
        f" ({frames} frames taken)" if patches.kind == "video" else ""
    )


def media_tokens(job: Job, preprocess: PreprocessSection, media: Sequence[MediaSize]) -> list[int]:
    """The tokens that each of the media becomes under these budgets; sampled frames stay as they
    are.
    """
    image, video = media_budgets(preprocess, job.model)
    grids = [
        image_grid(*each.source[1:], image)
        if each.kind == "image"
        else video_grid(*each.source, video)
        for each in media
    ]
    return [num_media_tokens(grid, image.merge_size) for grid in grids]


def smaller_budgets(job: Job, media: Sequence[MediaSize]) -> list[int]:
    """Values for preprocess.max_pixels below what the largest of the media has after resizing, in
    whole tokens.
    """
    image, video = media_budgets(job.preprocess, job.model)
    copies = {"image": 1, "video": video.temporal_patch_size}
    pixels = (
        max(each.grid[0] * each.grid[1] * each.grid[2] * copies[each.kind] for each in media)
        * image.patch_size**2
    )
    token = image.factor**2
    return list(dict.fromkeys(max(round(pixels * share / token), 1) * token for share in SMALLER))


def with_budget(preprocess: PreprocessSection, max_pixels: int) -> PreprocessSection:
    least = preprocess.min_pixels
    return replace(
        preprocess,
        max_pixels=max_pixels,
        min_pixels=None if least is None else min(least, max_pixels),
    )
