"""Decode steps as CUDA graphs: hundreds of kernels started by one call, for a few sizes that
batches are padded to.

Owns the buffers at fixed addresses that a graph reads, how a step's arrays get there in one copy,
and which graphs exist; each is recorded when its size is first needed. Knows the model only as a
function of those buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from glm_batch.models.engine.cuda.batch_paged import PagedLayout, PagedQueries
from glm_batch.models.engine.execution.batch import Batch
from glm_batch.models.network.layers.attention import AttentionBatch

SIZES = (
    1,
    2,
    4,
    8,
    12,
    16,
    24,
    32,
    48,
    64,
    80,
    96,
    112,
    128,
    160,
    192,
    224,
    256,
    320,
    384,
    448,
    512,
)
NOWHERE = -1  # the slot of a padding row


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeInputs:
    """One token of each of B sequences: input_ids, positions [B] int64 and who sees what."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    attn: AttentionBatch


Prepare = Callable[[DecodeInputs, int], torch.Tensor]
Compute = Callable[[DecodeInputs, torch.Tensor], torch.Tensor]


def is_decode(batch: Batch) -> bool:
    """Whether every token of the step is the last of a sequence that samples its next one."""
    return (
        len(batch.readout.sample) == len(batch.input_ids)
        and batch.positions.ndim == 1
        and not batch.media
    )


class DecodeGraphs:
    """For steps of up to `max_seqs` sequences whose block tables have up to `max_entries` entries
    together.

    `prepare` (inputs, highest position) gives the turns of a step, outside the graph, because their
    table may grow; `compute` (inputs, turns) -> logits [B, vocab_size] is what is recorded. They
    are given with each step, so that whoever owns the graphs is not owned by them.
    """

    def __init__(self, *, max_seqs: int, max_entries: int, device: torch.device) -> None:
        self._sizes = [size for size in SIZES if size < max_seqs] + [max_seqs]
        self._max_entries = max_entries
        self._record = device.type == "cuda"  # elsewhere the same steps run without a graph
        length = _Places(max_seqs).tables + max_entries
        self._host = torch.zeros(length, dtype=torch.int32, pin_memory=self._record)
        self._device = torch.zeros(length, dtype=torch.int32, device=device)
        self._turns: torch.Tensor | None = None
        self._logits: torch.Tensor | None = None
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    def fits(self, batch: Batch) -> bool:
        layout = batch.groups
        assert isinstance(layout, PagedLayout)
        return len(batch.input_ids) <= self._sizes[-1] and len(layout.tables) <= self._max_entries

    def run(self, batch: Batch, prepare: Prepare, compute: Compute) -> torch.Tensor:
        """Logits [tokens, vocab_size] of a batch that `is_decode` and `fits`; good for one call."""
        count = len(batch.input_ids)
        size = next(size for size in self._sizes if size >= count)
        inputs = self._fill(batch, size)
        turns = prepare(inputs, int(batch.positions.max()))
        if self._turns is None:
            self._turns = turns.new_zeros(self._sizes[-1], *turns.shape[1:])
        self._turns[:size].copy_(turns)
        if not self._record:
            return compute(inputs, self._turns[:size])[:count]
        if size not in self._graphs:
            self._graphs[size] = self._recorded(inputs, size, compute)
        self._graphs[size].replay()
        assert self._logits is not None
        return self._logits[:count]

    def forget(self) -> None:
        """Lets the graphs' memory go; they are recorded anew when they are needed."""
        self._graphs.clear()
        self._logits = self._pool = None

    def _recorded(self, inputs: DecodeInputs, size: int, compute: Compute) -> torch.cuda.CUDAGraph:
        """Runs the step once to compile its kernels, then records it; a replay writes the same."""
        assert self._turns is not None
        turns = self._turns[:size]
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            logits = compute(inputs, turns)
        torch.cuda.current_stream().wait_stream(aside)
        if self._logits is None:
            self._logits = logits.new_empty(self._sizes[-1], logits.shape[1])
            self._pool = torch.cuda.graph_pool_handle()
        del logits
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._logits[:size].copy_(compute(inputs, turns))
        return graph

    def _fill(self, batch: Batch, size: int) -> DecodeInputs:
        """Writes the step's arrays side by side and sends them in one copy."""
        layout = batch.groups
        assert isinstance(layout, PagedLayout)
        count, at = len(batch.input_ids), _Places(size)
        # The copy of the step before has ended: its logits have been read.
        host = self._host.numpy()
        wide = host[: at.row_ends].view(np.int64).reshape(3, at.stride)
        wide[:, count:size] = np.array([[0], [0], [NOWHERE]])
        wide[0, :count], wide[1, :count], wide[2, :count] = (
            batch.input_ids,
            batch.positions,
            batch.slots,
        )
        narrow = host[at.row_ends : at.tables].reshape(6, at.stride)
        narrow[:, count:size] = 0
        narrow[3, count:size] = np.arange(count, size)  # a padding row's tile: itself
        narrow[4, count:size] = 1
        narrow[0, :count], narrow[1, :count] = layout.row_ends, layout.table_starts
        narrow[2:, :count] = layout.single_tiles
        used = at.tables + len(layout.tables)
        host[at.tables : used] = layout.tables
        self._device[:used].copy_(self._host[:used], non_blocking=True)
        return self._views(layout, size, at)

    def _views(self, layout: PagedLayout, size: int, at: _Places) -> DecodeInputs:
        wide = self._device[: at.row_ends].view(torch.int64).view(3, at.stride)
        narrow = self._device[at.row_ends : at.tables].view(6, at.stride)
        queries = PagedQueries(
            block_size=layout.block_size,
            tile_queries=layout.tile_queries,
            tables=self._device[at.tables :],
            table_starts=narrow[1, :size],
            row_ends=narrow[0, :size],
            tree_starts=None,
            tree_rows=None,
            tree_bits=None,
            single_tiles=narrow[2:, :size],
            tiles=narrow[2:, :0],
        )
        rows = wide[1, :size]
        return DecodeInputs(
            input_ids=wide[0, :size],
            positions=rows,
            attn=AttentionBatch(
                slots=wide[2, :size], groups=queries, out_rows=wide[0, :0], out_groups=queries
            ),
        )


class _Places:
    """Where the arrays of a step of `size` rows begin, in int32s, at 16-byte boundaries."""

    def __init__(self, size: int) -> None:
        self.stride = -(-size // 4) * 4
        self.row_ends = 3 * 2 * self.stride
        self.tables = self.row_ends + 6 * self.stride
