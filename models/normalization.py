"""Normalization: how a checkpoint wants uint8 pixels turned into numbers, read from its preprocessor files.

Owns mean, deviation and scale alone. Knows nothing of sizes, budgets or tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from models.config import read_json
from models.errors import ConfigError

MediaKind = Literal["image", "video"]
# What a missing key means: the published processors' defaults.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
RESCALE_FACTOR = 1 / 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalization:
    """y = (x * rescale_factor - mean) / std, with one mean and one std for each channel."""

    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    rescale_factor: float = RESCALE_FACTOR


def load_normalization(model_dir: str | Path, kind: MediaKind, *, channels: int = 3) -> Normalization:
    """From processor_config.json's own section, else (video_)preprocessor_config.json, else the class defaults.

    Raises ConfigError naming file and key.
    """
    path, keys = _find(Path(model_dir), kind)
    rescales, normalises = (keys.get(name) is not False for name in ("do_rescale", "do_normalize"))
    default = Normalization()
    mean = _channels(path, keys, "image_mean", default.mean, channels) if normalises else (0.0,) * channels
    std = _channels(path, keys, "image_std", default.std, channels) if normalises else (1.0,) * channels
    if not all(std):
        raise ConfigError(f"{path}: image_std is {list(std)}; it must not be 0")
    factor = keys.get("rescale_factor", default.rescale_factor) if rescales else 1.0
    if not _is_number(factor):
        raise ConfigError(f"{path}: rescale_factor is {factor!r}; it must be a number")
    return Normalization(mean=mean, std=std, rescale_factor=float(factor))


def _find(model_dir: Path, kind: MediaKind) -> tuple[Path, dict[str, Any]]:
    """The order in which transformers looks; a clip is treated as an image where no file speaks of videos."""
    nested = model_dir / "processor_config.json"
    if nested.exists() and isinstance(section := read_json(nested).get(f"{kind}_processor"), dict):
        return nested, section
    names = ["video_preprocessor_config.json"] if kind == "video" else []
    for name in (*names, "preprocessor_config.json"):
        if (model_dir / name).exists():
            return model_dir / name, read_json(model_dir / name)
    return nested, {}


def _channels(
    path: Path, keys: dict[str, Any], name: str, default: tuple[float, ...], channels: int
) -> tuple[float, ...]:
    value = keys.get(name)
    value = list(default) if value is None else value
    values = [value] * channels if _is_number(value) else value
    if not isinstance(values, list) or len(values) != channels or not all(map(_is_number, values)):
        raise ConfigError(f"{path}: {name} is {value!r}; it must be a number or {channels} of them")
    return tuple(map(float, values))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
