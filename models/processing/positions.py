"""Where media stand in a prompt: placeholders expanded, token types, and three-axis positions.

Works on token ids, sizes and timestamps; equal to the published GLM-4.1V processor and model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from glm_batch.models.checkpoint.model_config import MediaTokens
from glm_batch.models.errors import ConfigError, RowError
from glm_batch.models.processing.budget import Grid, num_media_tokens
from glm_batch.models.processing.tokenizer import Tokenizer

TEXT, IMAGE, VIDEO = 0, 1, 2  # the values of mm_token_type_ids


def tokenizer_media_tokens(tokenizer: Tokenizer) -> MediaTokens:
    """The ids as the tokenizer has them. Raises ConfigError when it lacks one."""
    strings = {
        "image": "<|image|>",
        "video": "<|video|>",
        "image_start": "<|begin_of_image|>",
        "image_end": "<|end_of_image|>",
        "video_start": "<|begin_of_video|>",
        "video_end": "<|end_of_video|>",
    }
    missing = sorted(set(strings.values()) - tokenizer.control_tokens)
    if missing:
        raise ConfigError(
            f"tokenizer.json has no {', '.join(missing)}; images and videos need a GLM-4.1V model"
        )
    return MediaTokens(
        **{name: tokenizer.encode_control(text)[0] for name, text in strings.items()}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSpan:
    """A video in a prompt: its grid, and the second at which each group of frames begins."""

    grid: Grid
    timestamps: Sequence[float]


def expand_placeholders(
    ids: Sequence[int],
    *,
    tokens: MediaTokens,
    merge_size: int,
    images: Sequence[Grid],
    videos: Sequence[VideoSpan],
    encode: Callable[[str], list[int]],
) -> list[int]:
    """The prompt with as many image tokens for each placeholder as its media has.

    A group of a video's frames becomes the image markers, its tokens, and the whole seconds of its
    timestamp as text, which `encode` turns into ids. Raises RowError when there are not as many
    placeholders as media.
    """
    for kind, placeholder, media in (
        ("image", tokens.image, images),
        ("video", tokens.video, videos),
    ):
        found = sum(1 for id in ids if id == placeholder)
        if found != len(media):
            raise RowError(
                "media_mismatch",
                f"the prompt has {found} {kind} placeholders for {len(media)} {kind}s",
            )
    next_image, next_video = iter(images), iter(videos)
    expanded: list[int] = []
    for id in ids:
        if id == tokens.image:
            expanded += [id] * num_media_tokens(next(next_image), merge_size)
        elif id == tokens.video:
            expanded += _video_ids(next(next_video), tokens, merge_size, encode)
        else:
            expanded.append(id)
    return expanded


def media_token_types(ids: Sequence[int], tokens: MediaTokens) -> npt.NDArray[np.int64]:
    """mm_token_type_ids [tokens] of an expanded prompt: VIDEO within video markers, else IMAGE."""
    array = np.asarray(ids, np.int64)
    in_video = np.cumsum(array == tokens.video_start) > np.cumsum(array == tokens.video_end)
    types: npt.NDArray[np.int64] = np.where(
        array == tokens.image, np.where(in_video, VIDEO, IMAGE), TEXT
    )
    return types


def rope_positions(
    types: Sequence[int] | npt.NDArray[np.int64],
    *,
    merge_size: int,
    images: Sequence[Grid],
    videos: Sequence[Grid],
) -> tuple[npt.NDArray[np.int64], int]:
    """(positions [3, tokens] along time, height and width, rope_delta) of one prompt.

    Text counts on all three axes together; an image or a group of frames stands still in time,
    counts its rows and columns, and moves the text after it on by the longer side. A token
    generated at index i has position i + rope_delta on all axes. Raises RowError when the runs of
    media tokens do not fit the grids.
    """
    frames = [(1, height, width) for groups, height, width in videos for _ in range(groups)]
    grids = {IMAGE: iter(images), VIDEO: iter(frames)}
    pieces: list[npt.NDArray[np.int64]] = []
    position = 0
    for kind, run in groupby(np.asarray(types, np.int64).tolist()):
        length = sum(1 for _ in run)
        if kind == TEXT:
            piece = np.broadcast_to(np.arange(length), (3, length))
            step = length
        else:
            rows, columns = _merged(next(grids[kind], (1, 0, 0)), merge_size)
            if rows * columns != length:
                raise RowError(
                    "media_mismatch",
                    f"{length} media tokens in a row do not fit a grid of {rows}x{columns}",
                )
            piece = np.stack(
                [np.zeros(length, np.int64), *np.indices((rows, columns)).reshape(2, -1)]
            )
            step = max(rows, columns)
        pieces.append(piece + position)
        position += step
    if any(next(left, None) is not None for left in grids.values()):
        raise RowError(
            "media_mismatch",
            "there are more images or frames than runs of media tokens in the prompt",
        )
    if not pieces:
        raise RowError("empty_prompt", "the prompt has no tokens")
    positions = np.concatenate(pieces, axis=1)
    return positions, int(positions.max()) + 1 - positions.shape[1]


def _video_ids(
    video: VideoSpan, tokens: MediaTokens, merge_size: int, encode: Callable[[str], list[int]]
) -> list[int]:
    groups, height, width = video.grid
    if len(video.timestamps) != groups:
        raise RowError(
            "media_mismatch",
            f"the video has {groups} groups of frames but {len(video.timestamps)} times",
        )
    frame = [
        tokens.image_start,
        *[tokens.image] * num_media_tokens((1, height, width), merge_size),
        tokens.image_end,
    ]
    ids: list[int] = []
    for timestamp in video.timestamps:
        ids += frame
        ids += encode(str(int(timestamp)))
    return ids


def _merged(grid: Grid, merge_size: int) -> tuple[int, int]:
    """Rows and columns of tokens."""
    return grid[1] // merge_size, grid[2] // merge_size
