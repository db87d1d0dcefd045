"""One model on several ranks: rank 0 leads, and every step is the same TorchRunner's on each.

Only rank 0 schedules and samples, so followers need a step's arrays and nothing else; each encodes
its share of the images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from glm_batch.models import rooms
from glm_batch.models.checkpoint.media_config import MediaKind
from glm_batch.models.engine.api.interface import EngineConfig
from glm_batch.models.engine.execution.batch import Batch
from glm_batch.models.engine.execution.media_encoder import Key, MediaEncoder
from glm_batch.models.engine.execution.runner import TorchRunner
from glm_batch.models.engine.execution.settings import (
    Limits,
    resolve_device,
    resolve_dtype,
    resolve_limits,
)
from glm_batch.models.engine.scheduling.placeholders import Span
from glm_batch.models.engine.scheduling.scheduler import is_out_of_memory
from glm_batch.models.engine.works.readout import StepOutput
from glm_batch.models.errors import EngineError
from glm_batch.models.network.layers.parallel import SINGLE, ParallelGroup, TorchGroup, dealt
from glm_batch.models.network.registry import build_model
from glm_batch.models.network.vision import VisionTower
from glm_batch.models.processing.patches import MediaItem


def build_runner(config: EngineConfig, group: ParallelGroup = SINGLE) -> tuple[TorchRunner, Limits]:
    """Loads a checkpoint, or a rank's part of it. Ranks agree on the size of the KV cache: the
    smallest one's.

    Raises ConfigError for what the checkpoint or the device cannot do.
    """
    device = resolve_device(config.device, group)
    if device.index is not None:
        torch.cuda.set_device(device)  # of this thread, which is the one that will run the steps
    dtype = resolve_dtype(config, device)
    model = build_model(config.model, dtype=dtype, device=device, group=group)
    limits = resolve_limits(config, model.config, dtype, device, group)
    if isinstance(group, TorchGroup):
        limits = replace(limits, num_blocks=group.smallest(limits.num_blocks))
    encoder: MediaEncoder | None = None
    if model.vision and isinstance(group, TorchGroup):
        encoder = SharedEncoder(
            model.vision, group, device=device, max_bytes=limits.media_cache_bytes
        )
    elif model.vision:
        encoder = MediaEncoder(model.vision, device=device, max_bytes=limits.media_cache_bytes)
    if limits.tile_queries:
        runner: TorchRunner = rooms.load("models.engine.cuda.kernels").make_runner(
            model, limits, encoder
        )
        return runner, limits
    num_slots = limits.num_blocks * limits.block_size
    return TorchRunner(model, num_slots=num_slots, encoder=encoder), limits


def lead(config: EngineConfig, group: TorchGroup) -> tuple[LeadingRunner, Limits]:
    """Rank 0's runner, once all ranks have loaded. The others must be in `serve`."""
    runner, limits = build_runner(config, group)
    group.smallest(0)
    return LeadingRunner(runner, group), limits


def serve(config: EngineConfig, group: TorchGroup) -> None:
    """Another rank's whole life: loads its part, then runs what rank 0 runs until that closes its
    engine.

    Raises whatever a step raises, but for want of memory that all ranks have alike.
    """
    runner, _ = build_runner(config, group)
    group.smallest(0)
    while (command := group.broadcast_object()) != "close":
        if command == "free_memory":
            runner.free_memory()
        else:
            _follow(command, runner, group)


def _follow(step: _SentStep, runner: TorchRunner, group: TorchGroup) -> None:
    try:
        runner.run(received(step, group))
        return
    except (RuntimeError, MemoryError) as error:
        if not (is_out_of_memory(error) and group.in_step()):
            raise
    # Rank 0 will take the step back, and let all ranks free memory.


class LeadingRunner:
    """Rank 0: every step goes to all ranks; where all failed alike it can be tried in parts."""

    def __init__(self, runner: TorchRunner, group: TorchGroup) -> None:
        self.config, self.encoder = runner.config, runner.encoder
        self._runner, self._group = runner, group

    def run(self, batch: Batch) -> StepOutput:
        """As TorchRunner.run. Raises EngineError where the ranks are out of step."""
        send(batch, self.encoder, self._group)
        try:
            return self._runner.run(batch)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error) and self._group.in_step():
                raise
            raise EngineError(
                f"a step on {self._group.size} ranks failed on rank 0: "
                f"{error or type(error).__name__}; if it is memory again and "
                "again, lower engine.max_step_tokens"
            ) from error

    def free_memory(self) -> None:
        self._group.broadcast_object("free_memory")
        self._runner.free_memory()

    def close(self) -> None:
        """Ends the other ranks; where one has died before, they are ending already."""
        try:
            self._group.broadcast_object("close")
        except RuntimeError:
            return


class SharedEncoder(MediaEncoder):
    """All ranks remember all features, each encodes its share of the missing ones: see `dealt`."""

    def __init__(
        self, tower: VisionTower, group: TorchGroup, *, device: torch.device, max_bytes: int
    ) -> None:
        super().__init__(tower, device=device, max_bytes=max_bytes)
        self._group = group
        self._width, self._dtype = tower.config.out_hidden_size, tower.position_embedding.dtype
        self._merged = tower.config.spatial_merge_size**2

    def _encode(self, items: Sequence[MediaItem]) -> dict[Key, torch.Tensor]:
        owners = owners_of(items, self._group.size)
        own = [item for item, owner in zip(items, owners, strict=True) if owner == self._group.rank]
        encoded = super()._encode(own) if own else {}
        found: dict[Key, torch.Tensor] = {}
        for rank in sorted(set(owners)):
            theirs = [item for item, owner in zip(items, owners, strict=True) if owner == rank]
            counts = [len(item.patches) // self._merged for item in theirs]
            if rank == self._group.rank:
                features = torch.cat([encoded[item.key] for item in theirs])
            else:
                features = torch.empty(
                    sum(counts), self._width, dtype=self._dtype, device=self._device
                )
            self._group.broadcast(features, rank)
            pieces = torch.split(features, counts)
            # Copies: a remembered piece must not keep all the others alive.
            found |= {item.key: piece.clone() for item, piece in zip(theirs, pieces, strict=True)}
        return found


def owners_of(items: Sequence[MediaItem], size: int) -> list[int]:
    """The rank that encodes each item: the same list on every rank."""
    return dealt([len(item.patches) for item in items], size)


@dataclass(frozen=True, slots=True)
class _SentItem:
    """A MediaItem without its patches. `patches_to`: the rank that they follow to, if they do."""

    kind: MediaKind
    grid_thw: tuple[int, int, int]
    digest: bytes
    shape: tuple[int, ...]
    patches_to: int | None


@dataclass(frozen=True, slots=True)
class _SentStep:
    """A Batch as it travels: its media as (number of the item, start, end, first)."""

    batch: Batch
    items: tuple[_SentItem, ...]
    spans: tuple[tuple[int, int, int, int], ...]


Command = _SentStep | Literal["free_memory", "close"]


def send(batch: Batch, encoder: MediaEncoder | None, group: TorchGroup) -> None:
    """Rank 0's side: the step to all ranks, patches to the rank that is to encode them."""
    items = {span.item.key: span.item for span in batch.media}
    missing = encoder.missing(items.values()) if encoder else []
    owners = dict(zip((item.key for item in missing), owners_of(missing, group.size), strict=True))
    numbers = {key: number for number, key in enumerate(items)}
    step = _SentStep(
        replace(batch, media=()),
        tuple(
            _SentItem(item.kind, item.grid_thw, item.digest, item.patches.shape, owners.get(key))
            for key, item in items.items()
        ),
        tuple((numbers[span.item.key], span.start, span.end, span.first) for span in batch.media),
    )
    group.broadcast_object(step)
    for key, owner in owners.items():
        if owner:
            # A copy where the patches are a view that must not be written: torch would warn of it.
            group.send(torch.from_numpy(np.array(items[key].patches, order="C")).flatten(), owner)


def received(step: _SentStep, group: TorchGroup) -> Batch:
    """Another rank's side: the batch, with patches where this rank encodes them."""
    items = [_item(sent, group) for sent in step.items]
    return replace(step.batch, media=tuple(_spans(step, items)))


def _item(sent: _SentItem, group: TorchGroup) -> MediaItem:
    patches = np.broadcast_to(np.zeros(1, np.uint8), sent.shape)
    if sent.patches_to == group.rank:
        patches = (
            group.receive(torch.empty(sent.shape, dtype=torch.uint8).flatten(), 0)
            .numpy()
            .reshape(sent.shape)
        )
    return MediaItem(kind=sent.kind, patches=patches, grid_thw=sent.grid_thw, digest=sent.digest)


def _spans(step: _SentStep, items: Sequence[MediaItem]) -> Iterator[Span]:
    for number, start, end, first in step.spans:
        yield Span(items[number], start, end, first)
