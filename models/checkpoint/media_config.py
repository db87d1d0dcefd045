"""What a checkpoint says about images and videos: patches, pixel budgets, normalisation, sampling.

Read from processor_config.json, preprocessor_config.json and video_preprocessor_config.json; what
is missing there are the defaults of the published GLM-4.1V classes.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from glm_batch.models.checkpoint.directory import read_json
from glm_batch.models.errors import ConfigError

MediaKind = Literal["image", "video"]
Resampling = Literal["torch", "pil"]

NUM_CHANNELS = 3
BICUBIC = 3  # Pillow's number, which the files use
# An 8192x8192 source; a decoded frame of it takes 200 MB, and Pillow needs a third more while it
# decodes.
DEFAULT_MAX_SOURCE_PIXELS = 1 << 26
SUPPORTED_PROCESSORS = "Glm4v"  # Glm4vImageProcessor, ..Fast, ..Pil, Glm4vVideoProcessor


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalization:
    """y = (x * rescale_factor - mean) / std, with one mean and one std for each channel."""

    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    rescale_factor: float = 1 / 255


PUBLISHED = Normalization()


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageProcessorConfig:
    """How images become patches.

    `min_pixels` and `max_pixels` bound frames x height x width after resizing; an image counts as
    `temporal_patch_size` frames. `max_source_pixels` bounds width x height before decoding.
    `resampling` names the arithmetic of the bicubic filter: "torch" is the published default
    processor's, "pil" that of its Pillow twin.
    """

    min_pixels: int = 112 * 112
    max_pixels: int = 28 * 28 * 15000
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    rescale_factor: float = PUBLISHED.rescale_factor
    image_mean: tuple[float, ...] = PUBLISHED.mean
    image_std: tuple[float, ...] = PUBLISHED.std
    resampling: Resampling = "torch"
    max_source_pixels: int = DEFAULT_MAX_SOURCE_PIXELS

    def __post_init__(self) -> None:
        for name in ("min_pixels", "max_pixels", "patch_size", "temporal_patch_size", "merge_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}: {value!r}; it must be a whole number from 1")
        if self.min_pixels > self.max_pixels:
            raise ConfigError(
                f"min_pixels: {self.min_pixels:,} is above max_pixels, {self.max_pixels:,}; lower "
                "it"
            )
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            if len(value) != NUM_CHANNELS or not all(_is_number(part) for part in value):
                raise ConfigError(
                    f"{name}: {value!r}; it must be three numbers, for red, green and blue"
                )
        if (
            not _is_number(self.rescale_factor)
            or self.rescale_factor <= 0
            or min(self.image_std) <= 0
        ):
            raise ConfigError("rescale_factor and image_std must be above 0")

    @property
    def factor(self) -> int:
        """The pixels along one side of a token; sides of resized frames are multiples of it."""
        return self.patch_size * self.merge_size

    @property
    def normalization(self) -> Normalization:
        """What the model folds into its patch embedding."""
        return Normalization(
            mean=self.image_mean, std=self.image_std, rescale_factor=self.rescale_factor
        )

    @property
    def fingerprint(self) -> str:
        """One line of text that differs where any value differs."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_dir(cls, path: str | Path) -> Self:
        """Reads a checkpoint; what is missing are the class defaults. Raises ConfigError."""
        return cls._from_files(Path(path), "image_processor", ["preprocessor_config.json"])

    @classmethod
    def _from_files(cls, folder: Path, nested: str, names: list[str]) -> Self:
        values, source = _read_first(folder, nested, names)
        try:
            return cls(**_common_values(values), **cls._own_values(values))
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from error

    @classmethod
    def _own_values(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoProcessorConfig(ImageProcessorConfig):
    """How videos become patches: all sampled frames share one budget.

    `fps` frames are taken of each second; of a clip longer than `max_duration_s`, max_duration_s *
    fps in all. A decoder holds several source frames, so their limit is lower than an image's: 8K.
    """

    max_pixels: int = 28 * 28 * 2 * 30000
    fps: float = 2
    max_duration_s: float = 300
    max_source_pixels: int = DEFAULT_MAX_SOURCE_PIXELS // 2

    def __post_init__(self) -> None:
        # No super(): the decorator's slots make a new class, which the implicit form does not find
        # in Python 3.11.
        ImageProcessorConfig.__post_init__(self)
        for name in ("fps", "max_duration_s"):
            value = getattr(self, name)
            if not _is_number(value) or value <= 0:
                raise ConfigError(f"{name}: {value!r}; it must be a number above 0")

    @classmethod
    def from_dir(cls, path: str | Path) -> Self:
        """Reads a checkpoint; what is missing are the class defaults. Raises ConfigError.

        As in the published classes, preprocessor_config.json stands in for a missing video file.
        """
        names = ["video_preprocessor_config.json", "preprocessor_config.json"]
        return cls._from_files(Path(path), "video_processor", names)

    @classmethod
    def _own_values(cls, values: dict[str, Any]) -> dict[str, Any]:
        renamed = {"fps": "fps", "max_duration": "max_duration_s"}
        return {new: values[old] for old, new in renamed.items() if values.get(old) is not None}


def _read_first(folder: Path, nested: str, names: list[str]) -> tuple[dict[str, Any], Path]:
    """The first description found, and its file; that of the common file goes first."""
    common = folder / "processor_config.json"
    entry = read_json(common, optional=True).get(nested)
    if isinstance(entry, dict):
        return entry, common
    for name in names:
        if (folder / name).is_file():
            return read_json(folder / name), folder / name
    return {}, folder


def _common_values(values: dict[str, Any]) -> dict[str, Any]:
    """The fields that both share. Raises ConfigError for settings that mean other arithmetic."""
    for key in ("image_processor_type", "video_processor_type"):
        if not str(values.get(key) or SUPPORTED_PROCESSORS).startswith(SUPPORTED_PROCESSORS):
            raise ConfigError(
                f"{key}: {values[key]!r} is not supported; this version reads "
                f"{SUPPORTED_PROCESSORS}*"
            )
    for key, wanted in (
        ("do_resize", True),
        ("do_convert_rgb", True),
        ("do_sample_frames", True),
        ("resample", BICUBIC),
    ):
        if values.get(key) not in (None, wanted):
            raise ConfigError(
                f"{key}: {values[key]!r} is not supported; set it to {json.dumps(wanted)}"
            )
    keys = ("patch_size", "temporal_patch_size", "merge_size", "rescale_factor")
    found: dict[str, Any] = {key: values[key] for key in keys if values.get(key) is not None}
    for key in ("image_mean", "image_std"):
        if values.get(key) is not None:
            found[key] = (
                tuple(values[key])
                if isinstance(values[key], list)
                else (values[key],) * NUM_CHANNELS
            )
    if values.get("do_rescale") is False:
        found["rescale_factor"] = 1.0
    if values.get("do_normalize") is False:
        found |= {"image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}
    return found | _budget(values.get("size"))


def _budget(size: object) -> dict[str, Any]:
    """The keys are named after edges; what they hold are numbers of pixels."""
    if size is None:
        return {}
    if not isinstance(size, dict) or not {"shortest_edge", "longest_edge"} <= size.keys():
        raise ConfigError(
            f"size: {size!r}; it must hold shortest_edge and longest_edge, both numbers of pixels"
        )
    return {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
