"""MediaEncoder: images and videos to features, remembered on the model's device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from glm_batch.models.byte_cache import ByteCache
from glm_batch.models.checkpoint.media_config import MediaKind
from glm_batch.models.engine.scheduling.scheduler import is_out_of_memory
from glm_batch.models.network.vision import Grid, VisionTower
from glm_batch.models.processing.patches import MediaItem

# of one forward pass of the tower; a single frame may have more
ENCODE_PATCHES = {"cpu": 4096, "cuda": 32768}
# What remembering one item costs beside its features: measured on small ones, most of it memory
# that lies between them.
ENTRY_BYTES = 32 << 10
Key = tuple[str, tuple[int, int, int], bytes]


@dataclass(frozen=True, slots=True)
class _Frame:
    """The unit that the tower computes: no frame sees another."""

    item: MediaItem
    patches: NDArray[np.uint8]

    @property
    def grid(self) -> Grid:
        return 1, *self.item.grid_thw[1:]


class MediaEncoder:
    """Features by item, the least recently used forgotten beyond `max_bytes`."""

    def __init__(self, tower: VisionTower, *, device: torch.device, max_bytes: int) -> None:
        self.num_encoded = 0  # items that went through the tower
        self._tower = tower
        self._device = device
        self._max_patches = ENCODE_PATCHES[device.type]
        self._features: ByteCache[torch.Tensor] = ByteCache(max_bytes)

    def features(self, items: Iterable[MediaItem]) -> dict[Key, torch.Tensor]:
        """Each item's features [t * h * w / merge^2, hidden_size]."""
        wanted = {item.key: item for item in items}
        missing = self.missing(wanted.values())
        found = {key: self._features.get(key) for key in wanted}
        found |= self._encode(missing) if missing else {}
        features = {key: value for key, value in found.items() if value is not None}
        for key, value in features.items():
            self._features.put(key, value, value.nbytes + ENTRY_BYTES)
        return features

    def missing(self, items: Iterable[MediaItem]) -> list[MediaItem]:
        """Those that `features` would encode, in its order."""
        wanted = {item.key: item for item in items}
        return [item for key, item in wanted.items() if key not in self._features]

    def forget(self) -> None:
        """Frees the remembered features."""
        self._features = ByteCache(self._features.max_bytes)

    def _encode(self, items: Sequence[MediaItem]) -> dict[Key, torch.Tensor]:
        pieces: dict[Key, list[torch.Tensor]] = {item.key: [] for item in items}
        for bunch in self._bunches(items):
            # Frames of one kind and size side by side: one matrix product each, and one attention.
            bunch.sort(key=lambda frame: (frame.item.kind, frame.grid))
            kinds: list[MediaKind] = ["image", "video"]
            patches = [
                torch.from_numpy(np.concatenate(mine)).to(self._device)
                for kind in kinds
                if (mine := [frame.patches for frame in bunch if frame.item.kind == kind])
            ]
            encoded = self._forward(patches, bunch)
            merged = self._tower.config.spatial_merge_size**2
            start = 0
            for frame in bunch:
                end = start + len(frame.patches) // merged
                pieces[frame.item.key].append(encoded[start:end])
                start = end
        self.num_encoded += len(items)
        return {key: torch.cat(frames) for key, frames in pieces.items()}

    def _forward(self, patches: list[torch.Tensor], bunch: Sequence[_Frame]) -> torch.Tensor:
        """One pass of the tower; where memory runs out, later ones take half as much at a time."""
        try:
            return self._tower.forward_uint8(patches, [frame.grid for frame in bunch])
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error) and len(bunch) > 1:
                self._max_patches = max(1, self._max_patches // 2)
            raise

    def _bunches(self, items: Sequence[MediaItem]) -> Iterator[list[_Frame]]:
        """All frames, as many at a time as one forward pass takes."""
        bunch: list[_Frame] = []
        size = 0
        for item in items:
            for patches in item.patches.reshape(item.grid_thw[0], -1, item.patches.shape[1]):
                if bunch and size + len(patches) > self._max_patches:
                    yield bunch
                    bunch, size = [], 0
                bunch.append(_Frame(item, patches))
                size += len(patches)
        if bunch:
            yield bunch
