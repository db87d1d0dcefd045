"""Prompts and their media in vLLM's engine form: neither its processor nor its renderer ever runs.

Patches stay bytes where vLLM normalises them on the device, else they are normalised here; vLLM
computes positions and features.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from vllm.inputs.engine import mm_input, tokens_input
from vllm.multimodal.inputs import (
    MultiModalFieldConfig,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
    PlaceholderRange,
)

from glm_batch.models.checkpoint.media_config import (
    NUM_CHANNELS,
    ImageProcessorConfig,
    MediaKind,
    VideoProcessorConfig,
)
from glm_batch.models.checkpoint.model_config import VisionConfig
from glm_batch.models.engine.scheduling.placeholders import PlacedMedia, Span
from glm_batch.models.processing.patches import MediaItem, pixel_values


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaRenderer:
    """With a `dtype`, pixels are handed over normalised; without one, as bytes."""

    configs: dict[MediaKind, ImageProcessorConfig]
    dtype: torch.dtype | None

    @classmethod
    def from_dir(
        cls, model_dir: str, vision: VisionConfig, dtype: torch.dtype | None
    ) -> MediaRenderer:
        """Normalisation is the processors' matter, the size of patches the network's."""
        found: dict[MediaKind, ImageProcessorConfig] = {
            "image": ImageProcessorConfig.from_dir(model_dir),
            "video": VideoProcessorConfig.from_dir(model_dir),
        }
        patch, temporal = vision.patch_size, vision.temporal_patch_size
        for kind, config in found.items():
            found[kind] = replace(config, patch_size=patch, temporal_patch_size=temporal)
        return cls(configs=found, dtype=dtype)

    def num_bytes(self, media: PlacedMedia) -> int:
        """What the media of a prompt take once they are rendered."""
        size = 1 if self.dtype is None else self.dtype.itemsize
        items = [spans[0].item for spans in _by_item(media.spans)]
        copies = {
            kind: config.temporal_patch_size if kind == "image" else 1
            for kind, config in self.configs.items()
        }
        return sum(item.patches.nbytes * copies[item.kind] * size for item in items)

    def render(self, media: PlacedMedia) -> RenderedMedia:
        """Several times the bytes of the patches, so not before vLLM is near to use them."""
        items: dict[str, list[MultiModalKwargsItem]] = {}
        hashes: dict[str, list[str]] = {}
        places: dict[str, list[PlaceholderRange]] = {}
        for spans in _by_item(media.spans):
            item = spans[0].item
            items.setdefault(item.kind, []).append(self._arguments(item))
            hashes.setdefault(item.kind, []).append(_name(item))
            places.setdefault(item.kind, []).append(_placeholders(spans))
        return RenderedMedia(items=items, hashes=hashes, places=places)

    def _arguments(self, item: MediaItem) -> MultiModalKwargsItem:
        pixels, grid = (
            ("pixel_values", "image_grid_thw")
            if item.kind == "image"
            else ("pixel_values_videos", "video_grid_thw")
        )
        values = self._pixels(item)
        fields = {
            pixels: MultiModalFieldConfig.flat_from_sizes(item.kind, torch.tensor([len(values)])),
            grid: MultiModalFieldConfig.batched(item.kind, keep_on_cpu=True),
        }
        found = MultiModalKwargsItems.from_hf_inputs(
            {pixels: values, grid: torch.tensor([item.grid_thw])}, fields
        )
        return found[item.kind][0]

    def _pixels(self, item: MediaItem) -> torch.Tensor:
        """[patches, channels * temporal_patch_size * patch * patch], an image's frame repeated."""
        config, patches = self.configs[item.kind], torch.from_numpy(item.patches)
        if self.dtype is not None:
            return pixel_values(patches, config).to(self.dtype)
        frames = patches.view(len(patches), NUM_CHANNELS, -1, config.patch_size**2)
        return frames.expand(-1, -1, config.temporal_patch_size, -1).reshape(len(patches), -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedMedia:
    """A prompt's media for all of its forks; empty where it shows none."""

    items: dict[str, list[MultiModalKwargsItem]] = field(default_factory=dict)
    hashes: dict[str, list[str]] = field(default_factory=dict)
    places: dict[str, list[PlaceholderRange]] = field(default_factory=dict)

    def input(self, tokens: list[int]) -> Any:
        """Tokens, beginning with the prompt's, as vLLM's engine takes them."""
        if not self.items:
            return tokens_input(tokens)
        return mm_input(tokens, MultiModalKwargsItems(self.items), self.hashes, self.places)


def _by_item(spans: tuple[Span, ...]) -> list[list[Span]]:
    """An image has one span; a video's frames follow each other."""
    groups: list[list[Span]] = []
    for span in spans:
        if groups and groups[-1][0].item is span.item and span.first:
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups


def _name(item: MediaItem) -> str:
    return f"{item.kind}-{'x'.join(map(str, item.grid_thw))}-{item.digest.hex()}"


def _placeholders(spans: list[Span]) -> PlaceholderRange:
    """From the first feature to the last; the tokens between a video's frames are text."""
    start, end = spans[0].start, spans[-1].end
    if len(spans) == 1:
        return PlaceholderRange(offset=start, length=end - start)
    is_feature = torch.zeros(end - start, dtype=torch.bool)
    for span in spans:
        is_feature[span.start - start : span.end - start] = True
    return PlaceholderRange(offset=start, length=end - start, is_embed=is_feature)
