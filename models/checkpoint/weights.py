"""Checkpoint tensors into a model: streams safetensors one tensor at a time and refuses anything
missing or left over.

A model lists its targets (checkpoint name -> the view of a parameter that it fills); this file only
streams, compares and copies, so that peak memory is the model plus about one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from glm_batch.models.checkpoint.config_reader import read_json
from glm_batch.models.errors import ConfigError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A target that takes pieces of a stored tensor of this shape: where each lies there, and the
    view that it fills.

    No more of the file is read than these.
    """

    shape: tuple[int, ...]
    pieces: tuple[tuple[tuple[slice, ...], torch.Tensor], ...]


Target = torch.Tensor | Cut
Targets = dict[str, Target]


def load_weights(model_dir: str | Path, targets: Targets, *, copies: Targets | None = None) -> None:
    """Fills every target from the checkpoint, converting to the target's dtype and device.

    `copies` are names that a checkpoint may store besides, with the targets that they must then
    equal (tied weights). Raises ConfigError naming the first missing, unexpected, quantised or
    wrongly shaped tensors.
    """
    copies = copies or {}
    known = targets | copies
    stored = _by_target(find_shards(Path(model_dir)), known)
    _compare(Path(model_dir), set(stored) - set(copies), set(targets))
    in_file_order = sorted(
        stored.items(), key=lambda item: (item[0] in copies, item[1][1], item[0])
    )
    for name, (stored_name, shard) in in_file_order:
        for tensor, view in _read(shard, stored_name, known[name]):
            if name not in copies:
                view.copy_(tensor)
            elif not torch.equal(tensor.to(view.device, view.dtype), view):
                raise ConfigError(
                    f"{shard}: tensor {stored_name} differs from the one that config.json ties it to; set "
                    "tie_word_embeddings to false if both are meant, or remove the tensor"
                )


def _by_target(shards: dict[str, Path], known: Targets) -> dict[str, tuple[str, Path]]:
    """Target name -> the stored tensor's name and file."""
    found: dict[str, tuple[str, Path]] = {}
    for stored_name, shard in shards.items():
        name = _canonical(stored_name, known)
        if name in found:
            raise ConfigError(
                f"{shard}: stores both {found[name][0]} and {stored_name}, which are the same tensor"
            )
        found[name] = stored_name, shard
    return found


def _check_shape(shard: Path, name: str, shape: list[int], target: Target) -> None:
    if shape != list(target.shape):
        raise ConfigError(
            f"{shard}: tensor {name} is {shape}, config.json asks for {list(target.shape)}"
        )


def _check_dtype(shard: Path, name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in STORED_DTYPES:
        raise ConfigError(
            f"{shard}: tensor {name} is stored as {str(tensor.dtype).removeprefix('torch.')}; quantised checkpoints "
            "are not read: use the float32, bfloat16 or float16 one"
        )


def find_shards(model_dir: Path) -> dict[str, Path]:
    """Maps each stored tensor's name to the safetensors file that holds it. Raises ConfigError when
    there is none.
    """
    index = model_dir / INDEX_NAME
    if index.exists():
        return _indexed(index)
    single = model_dir / SINGLE_NAME
    if single.exists():
        return dict.fromkeys(_names(single), single)
    pickled = [
        path.name
        for pattern in ("*.bin", "*.pt", "*.pth")
        for path in sorted(model_dir.glob(pattern))
    ]
    if pickled:
        raise ConfigError(
            f"{model_dir}: holds {', '.join(pickled[:3])} but no {SINGLE_NAME}; pickled weights can run code and are "
            "refused: convert the checkpoint to safetensors first"
        )
    raise ConfigError(
        f"{model_dir}: no {SINGLE_NAME} and no {INDEX_NAME}; is this a checkpoint directory?"
    )


def _indexed(index: Path) -> dict[str, Path]:
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(v, str) for v in weight_map.values())
    ):
        raise ConfigError(
            f"{index}: weight_map must name a file for each tensor; copy the index again"
        )
    found: dict[str, Path] = {}
    for file_name in sorted(set(weight_map.values())):
        shard = index.parent / file_name
        if shard.parent != index.parent or not shard.is_file():
            raise ConfigError(
                f"{index}: names the shard {file_name!r}, which is not in {index.parent}; copy it there"
            )
        for name in _names(shard):
            # one that no index names is reported as unexpected
            if weight_map.get(name, file_name) == file_name:
                found[name] = shard
    if lost := sorted(set(weight_map) - set(found)):
        raise ConfigError(f"{index}: promises tensors that their shards do not hold: {_some(lost)}")
    return found


def _names(shard: Path) -> Iterator[str]:
    try:
        with safe_open(shard, framework="pt") as file:
            yield from file.keys()
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{shard}: not a readable safetensors file ({error}); copy it again"
        ) from error


def _read(shard: Path, name: str, target: Target) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the target takes of a stored tensor, each with the view that it fills. Raises
    ConfigError.
    """
    # The file is opened anew for each tensor, so that its mapped pages are given back and never add
    # up to the file.
    try:
        with safe_open(shard, framework="pt") as file:
            if isinstance(target, torch.Tensor):
                tensor = file.get_tensor(name)
                _check_shape(shard, name, list(tensor.shape), target)
                _check_dtype(shard, name, tensor)
                return [(tensor, target)]
            stored = file.get_slice(name)
            _check_shape(shard, name, stored.get_shape(), target)
            _check_dtype(shard, name, stored[:0])
            return [(stored[place], view) for place, view in target.pieces]
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{shard}: tensor {name} cannot be read ({error}); copy the file again"
        ) from error


def _canonical(name: str, targets: Targets) -> str:
    """A base model saved alone lacks the `model.` prefix; old saves of GLM-4.1V lack `model.` or
    `language_model.`.
    """
    for candidate in (name, f"model.{name}", f"model.language_model.{name.removeprefix('model.')}"):
        if candidate in targets:
            return candidate
    return name


def _compare(model_dir: Path, stored: set[str], wanted: set[str]) -> None:
    problems = []
    if missing := sorted(wanted - stored):
        problems.append(f"missing: {_some(missing)}")
    if unexpected := sorted(stored - wanted):
        problems.append(f"unexpected: {_some(unexpected)}")
    if problems:
        raise ConfigError(
            f"{model_dir}: the tensors do not fit config.json ({'; '.join(problems)}); check the architecture, "
            "attention_bias and tie_word_embeddings"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
