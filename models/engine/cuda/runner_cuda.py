"""CudaRunner: the runner of a single process on an NVIDIA GPU, with fused kernels and recorded
decode steps.

Reads batches of models.engine.cuda.batch_paged. Everything but the backbone's pass is
TorchRunner's.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import torch

from glm_batch.models.engine.cuda.batch_paged import PagedLayout, PagedQueries
from glm_batch.models.engine.cuda.decode_graphs import DecodeGraphs, DecodeInputs, is_decode
from glm_batch.models.engine.cuda.glm_fused import fused_forward
from glm_batch.models.engine.execution.batch import Batch
from glm_batch.models.engine.execution.media_encoder import MediaEncoder
from glm_batch.models.engine.execution.runner import TorchRunner
from glm_batch.models.engine.works.readout import StepOutput
from glm_batch.models.network.layers.attention import AttentionBatch
from glm_batch.models.network.registry import Model


class CudaRunner(TorchRunner):
    """`max_seqs` sequences of up to `max_blocks` blocks each bound what is recorded."""

    def __init__(
        self,
        model: Model,
        *,
        num_slots: int,
        max_seqs: int,
        max_blocks: int,
        encoder: MediaEncoder | None = None,
    ) -> None:
        super().__init__(model, num_slots=num_slots, encoder=encoder)
        self._graphs = DecodeGraphs(
            max_seqs=max_seqs, max_entries=max_seqs * max_blocks, device=model.device
        )

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepOutput:
        if not (is_decode(batch) and self._graphs.fits(batch)):
            return super().run(batch)
        return StepOutput(sample_logits=self._graphs.run(batch, self._turns, self._logits))

    def free_memory(self) -> None:
        self._graphs.forget()
        super().free_memory()

    def _turns(self, inputs: DecodeInputs, max_position: int) -> torch.Tensor:
        return self._model.backbone.rope.lookup(inputs.positions, max_position)

    def _logits(self, inputs: DecodeInputs, turns: torch.Tensor) -> torch.Tensor:
        hidden = fused_forward(
            self._model.backbone, inputs.input_ids, turns, self._cache.pages, inputs.attn
        )
        return self._model.head(hidden)  # type: ignore[no-any-return]

    def _hidden(self, batch: Batch) -> torch.Tensor:
        backbone = self._model.backbone
        turns = backbone.rope.lookup(self._tensor(batch.positions), int(batch.positions.max()))
        return fused_forward(
            backbone,
            self._tensor(batch.input_ids),
            turns,
            self._cache.pages,
            self._attention(batch),
            self._media(batch),
        )

    def _attention(self, batch: Batch) -> AttentionBatch:
        device = self._model.device
        groups = paged_queries(batch.groups, device)
        same = batch.out_groups is batch.groups
        return AttentionBatch(
            slots=self._tensor(batch.slots),
            groups=groups,
            out_rows=self._tensor(batch.out_rows),
            out_groups=groups if same else paged_queries(batch.out_groups, device),
        )


def paged_queries(layout: PagedLayout, device: torch.device) -> PagedQueries:
    """The layout's arrays on the device."""
    values: dict[str, Any] = {field.name: getattr(layout, field.name) for field in fields(layout)}
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            values[name] = torch.from_numpy(value).to(device)
    return PagedQueries(**values)
