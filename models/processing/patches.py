"""RGB frames to the patches that travel to the model: resized, cut, one byte a value.

Torch and Pillow are imported where they are used: only processes that handle media need them.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import numpy.typing as npt

from glm_batch.models.checkpoint.media_config import (
    NUM_CHANNELS,
    ImageProcessorConfig,
    MediaKind,
    Resampling,
)
from glm_batch.models.processing.budget import Grid

if TYPE_CHECKING:
    import torch

Frame = npt.NDArray[np.uint8]  # [height, width, 3]
# a file's bytes, or the file itself, opened for reading and seekable
Encoded = bytes | memoryview | BinaryIO


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MediaItem:
    """One image or video, cut into patches but not yet normalised.

    `grid_thw` counts frames (1 for an image, the temporal groups of a video), rows and columns of
    patches. `patches` are uint8 [t * h * w, values] in storage order: an image's hold its frame
    once [channels * patch * patch], a video's the frames of the group [channels *
    temporal_patch_size * patch * patch]. Items with equal kind, grid and `digest` are taken for the
    same.
    """

    kind: MediaKind
    patches: npt.NDArray[np.uint8]
    grid_thw: tuple[int, int, int]
    digest: bytes

    @property
    def key(self) -> tuple[str, tuple[int, int, int], bytes]:
        """What tells items apart."""
        return self.kind, self.grid_thw, self.digest


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Media:
    """What a prompt shows: images, and videos, in the order of their placeholders.

    `positions` int64 [3, tokens] are the prompt's rotary positions along time, height and width.
    """

    items: tuple[MediaItem, ...]
    positions: npt.NDArray[np.int64]

    @property
    def rope_delta(self) -> int:
        """The first generated token stands at position (number of prompt tokens) + rope_delta."""
        return int(self.positions.max()) + 1 - len(self.positions[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaPatches:
    """One image or video, ready for the vision tower.

    `patches` is uint8 [t * h * w, 3 * frames * patch * patch] for the grid (t, h, w), merge block
    by merge block; an image holds its frame once, a group of a video its temporal_patch_size
    frames. `digest` names the content, as it was given (see encoded_digest), and the processor's
    configuration. `source` is what was there before resizing: frames taken (1 for an image),
    height, width. `timestamps` are the seconds of a video's groups, empty for an image.
    """

    kind: MediaKind
    patches: npt.NDArray[np.uint8]
    grid: Grid
    digest: str
    source: Grid
    timestamps: tuple[float, ...] = ()

    @property
    def item(self) -> MediaItem:
        """As the engine takes it."""
        return MediaItem(
            kind=self.kind,
            patches=self.patches,
            grid_thw=self.grid,
            digest=bytes.fromhex(self.digest),
        )


class PatchWriter:
    """Resizes frames and cuts them into place, one at a time.

    `source` is (frames, height, width) before resizing, `grid` what becomes of it.
    """

    def __init__(
        self, kind: MediaKind, source: Grid, grid: Grid, config: ImageProcessorConfig
    ) -> None:
        groups, height, width = grid
        self._kind, self._source, self._grid = kind, source, grid
        self._config = config
        self._frames_per_patch = frames_per_patch = (
            1 if kind == "image" else config.temporal_patch_size
        )
        merge, patch = config.merge_size, config.patch_size
        blocks = (height // merge, width // merge, merge, merge)
        self._patches = np.empty(
            (groups, *blocks, NUM_CHANNELS, frames_per_patch, patch, patch), np.uint8
        )

    def write(self, position: int, frame: Frame) -> None:
        """Takes over the frame that comes at `position` (from 0) in its clip."""
        _, height, width = self._grid
        merge, patch = self._config.merge_size, self._config.patch_size
        frame = resize(frame, height * patch, width * patch, self._config.resampling)
        group, slot = divmod(position, self._frames_per_patch)
        pieces = frame.reshape(
            height // merge, merge, patch, width // merge, merge, patch, NUM_CHANNELS
        )
        self._patches[group, ..., slot, :, :] = pieces.transpose(0, 3, 1, 4, 6, 2, 5)

    def finish(
        self, *, digest: str | None = None, timestamps: tuple[float, ...] = ()
    ) -> MediaPatches:
        """The patches of all frames written, named by `digest` or else by one over them."""
        groups, height, width = self._grid
        patches = self._patches.reshape(groups * height * width, -1)
        return MediaPatches(
            kind=self._kind,
            patches=patches,
            grid=self._grid,
            digest=digest or self._pixel_digest(),
            source=self._source,
            timestamps=timestamps,
        )

    def _pixel_digest(self) -> str:
        state = hashlib.sha256(
            f"{self._kind} pixels {self._grid} {self._config.fingerprint}\n".encode()
        )
        state.update(self._patches.data)
        return state.hexdigest()


def encoded_digest(kind: MediaKind, data: Encoded, config: ImageProcessorConfig) -> str:
    """The name of what an image's or clip's encoded bytes become under a configuration.

    Equal bytes and an equal configuration make an equal name, and anything else another one, also
    the same pixels encoded otherwise: a compressed image is a tenth of its patches, and so is the
    cost of hashing it.
    """
    state = _encoded_state(kind, config).copy()
    if isinstance(data, bytes | memoryview):
        state.update(data)
        return state.hexdigest()
    file, _ = as_file(data)
    while piece := file.read(1 << 20):
        state.update(piece)
    return state.hexdigest()


@lru_cache(maxsize=16)
def _encoded_state(kind: MediaKind, config: ImageProcessorConfig) -> hashlib._Hash:
    return hashlib.sha256(f"{kind} encoded {config.fingerprint}\n".encode())


def as_file(data: Encoded) -> tuple[BinaryIO, int]:
    """A file at its begin, and its size in bytes."""
    file = io.BytesIO(data) if isinstance(data, bytes | memoryview) else data
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    return file, size


def resize(frame: Frame, height: int, width: int, resampling: Resampling) -> Frame:
    """The frame at another size, bicubic with antialiasing; itself when it has that size."""
    # torch takes no other memory; may copy
    frame = np.require(frame, requirements=["C_CONTIGUOUS", "WRITEABLE"])
    if frame.shape[:2] == (height, width):
        return frame
    if resampling == "pil":
        from PIL import Image

        return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
    import torch

    source = torch.from_numpy(frame).permute(2, 0, 1)[None]  # [1, 3, height, width], a view
    resized = torch.nn.functional.interpolate(
        source, size=(height, width), mode="bicubic", antialias=True, align_corners=False
    )
    result: Frame = resized[0].permute(1, 2, 0).numpy()
    return result


def pixel_values(patches: torch.Tensor, config: ImageProcessorConfig) -> torch.Tensor:
    """uint8 patches to the published processor's float32 [patches, 3 * frames * patch * patch].

    Normalised by mean and standard deviation, in one step on values from 0 to 255; an image's frame
    is repeated temporal_patch_size times.
    """
    import torch

    area = config.patch_size**2
    values = patches.view(len(patches), NUM_CHANNELS, -1, area).to(torch.float32)
    mean, std = (
        (torch.tensor(numbers, device=patches.device) * (1.0 / config.rescale_factor)).view(
            1, -1, 1, 1
        )
        for numbers in (config.image_mean, config.image_std)
    )
    values = ((values - mean) / std).expand(-1, -1, config.temporal_patch_size, -1)
    return values.reshape(len(patches), -1)
