"""Checkpoint tensors into a model, one after the other: peak memory is the model and one tensor.

A model lists its targets: for each name in the checkpoint, the view of a parameter that it fills.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from glm_batch.models.checkpoint.headers import StoredTensor, match_tensors
from glm_batch.models.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A target that takes pieces of a stored tensor: where each lies, and the view it fills.

    No more of the file is read than these.
    """

    shape: tuple[int, ...]
    pieces: tuple[tuple[tuple[slice, ...], torch.Tensor], ...]


Target = torch.Tensor | Cut
Targets = dict[str, Target]


def load_weights(model_dir: str | Path, targets: Targets, *, copies: Targets | None = None) -> None:
    """Fills every target from the checkpoint, converting to the target's dtype and device.

    `copies` are names that a checkpoint may store besides, with the targets that they must then
    equal (tied weights). Raises ConfigError where targets and stored tensors do not fit.
    """
    copies = copies or {}
    known = targets | copies
    stored = match_tensors(Path(model_dir), _shapes(targets), _shapes(copies))
    in_file_order = sorted(
        stored.items(), key=lambda item: (item[0] in copies, item[1].shard, item[0])
    )
    for name, source in in_file_order:
        for tensor, view in _read(source, known[name]):
            if name not in copies:
                view.copy_(tensor)
            elif not torch.equal(tensor.to(view.device, view.dtype), view):
                raise ConfigError(
                    f"{source.shard}: tensor {source.name} differs from the one that config.json "
                    "ties it to; set tie_word_embeddings to false if both are meant, or remove the "
                    "tensor"
                )


def _shapes(targets: Targets) -> dict[str, tuple[int, ...]]:
    return {name: tuple(target.shape) for name, target in targets.items()}


def _read(source: StoredTensor, target: Target) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the target takes of a stored tensor, each with the view that it fills."""
    # The file is opened anew for each tensor, so that its mapped pages are given back and never add
    # up to the file.
    try:
        with safe_open(source.shard, framework="pt") as file:
            if isinstance(target, torch.Tensor):
                return [(file.get_tensor(source.name), target)]
            stored = file.get_slice(source.name)
            return [(stored[place], view) for place, view in target.pieces]
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{source.shard}: tensor {source.name} cannot be read ({error}); copy the file again"
        ) from error
