"""Training samples: conversations as ids, with their pictures and clips, and padded batches of
them.

Owns where the loss is taken, how media stand in a prompt and how samples become tensors. Knows
nothing of tickets, shapes or the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from tiny_tokenizer import ChatEncoder

from glm_batch.models.checkpoint.media_config import ImageProcessorConfig, VideoProcessorConfig
from glm_batch.models.checkpoint.model_config import MediaTokens
from glm_batch.models.processing.patches import MediaPatches, pixel_values
from glm_batch.models.processing.positions import (
    VideoSpan,
    expand_placeholders,
    media_token_types,
    rope_positions,
)

IGNORED = -100
# A picture becomes 16 to 36 tokens, a clip at most 48 in all, so that training is cheap.
IMAGES = ImageProcessorConfig(min_pixels=2 * 28 * 28 * 16, max_pixels=2 * 28 * 28 * 36)
VIDEOS = VideoProcessorConfig(min_pixels=28 * 28 * 32, max_pixels=28 * 28 * 96)
MERGE = IMAGES.merge_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One conversation; `targets` holds IGNORED wherever no loss is wanted, `positions` are [3,
    tokens].

    `media` says which of a batch's media the prompt shows, None for text alone.
    """

    input_ids: list[int]
    targets: list[int]
    positions: npt.NDArray[np.int64]
    media: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Samples padded to the right, where causal attention never looks.

    `ids` and `targets` are [samples, tokens], `positions` [3, samples, tokens]. `pixels` are
    [patches, values] of all media and `grids` [frames, 3]; `features` names for each media token of
    `ids`, in order, its row among the merged patches. Without media the last three are empty.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    pixels: torch.Tensor
    grids: torch.Tensor
    features: torch.Tensor

    def to(self, device: str) -> Batch:
        return Batch(**{name: getattr(self, name).to(device) for name in self.__dataclass_fields__})


def ask(
    encoder: ChatEncoder, system: str | None, user: str, item: MediaPatches | None = None
) -> list[int]:
    """The ids of a question up to and including `<|assistant|>`; `item` stands before the user's
    text.
    """
    if item is None:
        return encoder.prompt(system, user)
    images, videos = _by_kind(item)
    return expand_placeholders(
        encoder.prompt(system, user, ["video" if videos else "image"]),
        tokens=media_tokens(encoder),
        merge_size=MERGE,
        images=images,
        videos=[VideoSpan(grid=grid, timestamps=item.timestamps) for grid in videos],
        encode=encoder.plain,
    )


def positions_of(
    encoder: ChatEncoder, ids: list[int], item: MediaPatches | None = None
) -> npt.NDArray[np.int64]:
    """[3, tokens] of a conversation that shows `item`."""
    if item is None:
        return np.tile(np.arange(len(ids)), (3, 1))
    images, videos = _by_kind(item)
    types = media_token_types(ids, media_tokens(encoder))
    return rope_positions(types, merge_size=MERGE, images=images, videos=videos)[0]


def make_sample(
    encoder: ChatEncoder,
    question: tuple[str | None, str],
    answer: str,
    shown: tuple[int, MediaPatches] | None = None,
) -> Sample:
    """A conversation that ends with `<|user|>`, the loss on the answer only.

    `question` is the system's and the user's text, `shown` what stands before the user's, with its
    number.
    """
    media, item = shown or (None, None)
    prompt = ask(encoder, *question, item)
    reply = [*encoder.plain(f"\n{answer}"), encoder.control_ids["<|user|>"]]
    ids = prompt + reply[:-1]
    return Sample(
        input_ids=ids,
        targets=[IGNORED] * (len(prompt) - 1) + reply,
        positions=positions_of(encoder, ids, item),
        media=media,
    )


def stack(samples: Sequence[Sample], media: Sequence[MediaPatches] = ()) -> Batch:
    """One batch of samples and of all media that they show."""
    longest = max(len(sample.input_ids) for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    targets = torch.full((len(samples), longest), IGNORED)
    positions = torch.zeros(3, len(samples), longest, dtype=torch.long)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.input_ids)] = torch.tensor(sample.input_ids)
        targets[row, : len(sample.targets)] = torch.tensor(sample.targets)
        positions[:, row, : len(sample.input_ids)] = torch.from_numpy(sample.positions)
    counts = [len(item.patches) // MERGE**2 for item in media]
    starts = np.cumsum([0, *counts])
    shown = [
        torch.arange(starts[s.media], starts[s.media + 1]) for s in samples if s.media is not None
    ]
    frames = [(1, *item.grid[1:]) for item in media for _ in range(item.grid[0])]
    empty = torch.empty(0, dtype=torch.long)
    return Batch(
        ids=ids,
        targets=targets,
        positions=positions,
        pixels=torch.cat([_normalised(item) for item in media]) if media else torch.empty(0, 0),
        grids=torch.tensor(frames) if frames else empty,
        features=torch.cat(shown) if shown else empty,
    )


def media_tokens(encoder: ChatEncoder) -> MediaTokens:
    """The ids that mark media in a prompt."""
    ids = encoder.control_ids
    return MediaTokens(
        image=ids["<|image|>"],
        video=ids["<|video|>"],
        image_start=ids["<|begin_of_image|>"],
        image_end=ids["<|end_of_image|>"],
        video_start=ids["<|begin_of_video|>"],
        video_end=ids["<|end_of_video|>"],
    )


def _by_kind(item: MediaPatches) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    return ([], [item.grid]) if item.timestamps else ([item.grid], [])


def _normalised(item: MediaPatches) -> torch.Tensor:
    return pixel_values(torch.from_numpy(item.patches), IMAGES)
