"""The same packed step as models.engine.execution.batch, described by block tables: what the fused
attention on GPUs reads.

Made without a loop over tokens: a step of 256 decodes must cost a millisecond. Which sequences
share a prefix plays no part here: on a GPU the shared keys come out of its cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from glm_batch.models.engine.execution.batch import Batch, Step, media_spans, read_chunks
from glm_batch.models.engine.scheduling.scheduler import Chunk
from glm_batch.models.engine.scheduling.sequence import ChoiceTree
from glm_batch.models.engine.works.readout import Ints, ReadoutBuilder

TILE_ROWS = 128  # query rows of a tile: its queries times the query heads of a kv head


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedQueries:
    """R query rows of S sequences; all int32 but tree_bits. A key is counted from its sequence's
    beginning.

    tables [entries], table_starts [S]: the block tables one after the other and where each begins;
    a block has `block_size` slots. row_ends [R]: a query sees every key before this one.
    tree_starts [S], tree_rows [R], tree_bits uint8 [rows, width]: and key tree_starts[s] + i where
    tree_bits[tree_rows[row], i] is not 0; None for all three where nothing has a tree. single_tiles
    [4, tiles], tiles [4, tiles]: sequence, first row, number of rows (1, at most `tile_queries`)
    and the first key that none of them sees. Every row is in one tile; a tile's rows are
    neighbours.
    """

    block_size: int
    tile_queries: int
    tables: torch.Tensor
    table_starts: torch.Tensor
    row_ends: torch.Tensor
    tree_starts: torch.Tensor | None
    tree_rows: torch.Tensor | None
    tree_bits: torch.Tensor | None
    single_tiles: torch.Tensor
    tiles: torch.Tensor


Int32s = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedLayout:
    """models.engine.cuda.batch_paged.PagedQueries in numpy."""

    block_size: int
    tile_queries: int
    tables: Int32s
    table_starts: Int32s
    row_ends: Int32s
    tree_starts: Int32s | None
    tree_rows: Int32s | None
    tree_bits: NDArray[np.uint8] | None
    single_tiles: Int32s
    tiles: Int32s


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tables:
    """The block tables of a step's sequences, one after the other."""

    entries: Int32s
    starts: Ints


def build_paged_step(
    chunks: list[Chunk], *, block_size: int, tile_queries: int, num_ids: int
) -> Step:
    """As build_step; `groups` and `out_groups` are PagedLayouts."""
    sequences = [chunk.sequence for chunk in chunks]
    readout = ReadoutBuilder()
    wanted = read_chunks(chunks, readout)
    starts = np.array([chunk.start for chunk in chunks], dtype=np.int64)
    counts = np.array([chunk.end for chunk in chunks], dtype=np.int64) - starts
    first_rows = np.cumsum(counts) - counts
    sequence_of_row = np.repeat(np.arange(len(chunks)), counts)
    indices = np.arange(len(sequence_of_row)) + np.repeat(starts - first_rows, counts)

    lengths = np.array([len(sequence.block_table) for sequence in sequences], dtype=np.int64)
    entries = np.fromiter(
        chain.from_iterable(sequence.block_table for sequence in sequences),
        dtype=np.int32,
        count=int(lengths.sum()),
    )
    tables = _Tables(entries=entries, starts=np.cumsum(lengths) - lengths)
    blocks = entries[tables.starts[sequence_of_row] + indices // block_size].astype(np.int64)

    out_indices = np.fromiter(chain.from_iterable(want.indices for want in wanted), dtype=np.int64)
    out_counts = np.array([len(want.indices) for want in wanted], dtype=np.int64)
    out_rows = out_indices + np.repeat(first_rows - starts, out_counts)
    layout = _layout(chunks, indices, counts, tables, block_size, tile_queries)
    all_wanted = len(out_rows) == len(indices)
    batch = Batch(
        input_ids=_input_ids(chunks, len(indices)),
        positions=_positions(chunks, indices, counts),
        slots=blocks * block_size + indices % block_size,
        groups=layout,
        out_rows=out_rows,
        out_groups=(
            layout
            if all_wanted
            else _layout(chunks, out_indices, out_counts, tables, block_size, tile_queries)
        ),
        media=tuple(media_spans(chunks)),
        readout=readout.readout(num_ids),
    )
    return Step(batch, wanted, readout.decodings)


def _input_ids(chunks: list[Chunk], count: int) -> Ints:
    tokens = chain.from_iterable(chunk.sequence.tokens[chunk.start : chunk.end] for chunk in chunks)
    return np.fromiter(tokens, dtype=np.int64, count=count)


def _positions(chunks: list[Chunk], indices: Ints, counts: Ints) -> Ints:
    """Text stands at its index; only trees and media know better."""
    positions = indices
    row = 0
    for chunk, count in zip(chunks, counts.tolist(), strict=True):
        sequence = chunk.sequence
        if sequence.media or (sequence.tree and chunk.end > sequence.num_prompt):
            here = sequence.positions(chunk.start, chunk.end)
            if positions is indices:
                positions = indices.copy()
            if here.ndim > positions.ndim:
                positions = np.stack([positions] * 3)
            positions[..., row : row + count] = here
        row += count
    return positions


def _layout(
    chunks: list[Chunk],
    indices: Ints,
    counts: Ints,
    tables: _Tables,
    block_size: int,
    tile_queries: int,
) -> PagedLayout:
    """indices: the queries' places in their sequences, `counts[i]` neighbours of sequence i."""
    row_ends = (indices + 1).astype(np.int32)
    tree_starts, tree_rows, tree_bits = _trees(chunks, indices, counts, row_ends)
    single_tiles, tiles = _tiles(indices, counts, tile_queries)
    return PagedLayout(
        block_size=block_size,
        tile_queries=tile_queries,
        tables=tables.entries,
        table_starts=tables.starts.astype(np.int32),
        row_ends=row_ends,
        tree_starts=tree_starts,
        tree_rows=tree_rows,
        tree_bits=tree_bits,
        single_tiles=single_tiles,
        tiles=tiles,
    )


def _tiles(indices: Ints, counts: Ints, tile_queries: int) -> tuple[Int32s, Int32s]:
    """(tiles of sequences with one query, tiles of the others), the longest context first."""
    per_sequence = -(-counts // tile_queries)
    sequence = np.repeat(np.arange(len(counts)), per_sequence)
    before = np.cumsum(per_sequence) - per_sequence
    done = (np.arange(len(sequence)) - before[sequence]) * tile_queries
    first_row = (np.cumsum(counts) - counts)[sequence] + done
    count = np.minimum(counts[sequence] - done, tile_queries)
    end = indices[first_row + count - 1] + 1
    tiles = np.stack((sequence, first_row, count, end)).astype(np.int32)
    tiles = tiles[:, np.argsort(-end, kind="stable")]
    single = counts[tiles[0]] == 1
    return np.ascontiguousarray(tiles[:, single]), np.ascontiguousarray(tiles[:, ~single])


def _trees(
    chunks: list[Chunk], indices: Ints, counts: Ints, row_ends: Int32s
) -> tuple[Int32s | None, Int32s | None, NDArray[np.uint8] | None]:
    """(tree_starts, tree_rows, tree_bits); a tree's nodes get their row_ends moved to the end of
    the prompt.

    Requests of one job have one tree: its bits are there once. Row 0 is for all who are no nodes:
    nothing.
    """
    first_bits: dict[int, int] = {}
    trees: list[ChoiceTree] = []
    tree_starts = np.zeros(len(chunks), dtype=np.int32)
    tree_rows = np.zeros(len(indices), dtype=np.int32)
    num_bits, row = 1, 0
    for i, (chunk, count) in enumerate(zip(chunks, counts.tolist(), strict=True)):
        sequence, rows = chunk.sequence, slice(row, row + count)
        row += count
        if sequence.tree is None or not count or indices[rows.stop - 1] < sequence.num_prompt:
            continue
        if id(sequence.tree) not in first_bits:
            first_bits[id(sequence.tree)] = num_bits
            trees.append(sequence.tree)
            num_bits += len(sequence.tree.tokens)
        nodes = indices[rows] - sequence.num_prompt
        tree_starts[i] = sequence.num_prompt
        tree_rows[rows] = np.where(nodes < 0, 0, nodes + first_bits[id(sequence.tree)])
        row_ends[rows] = np.minimum(row_ends[rows], sequence.num_prompt)
    if not trees:
        return None, None, None
    bits = np.zeros((num_bits, max(len(tree.tokens) for tree in trees)), dtype=np.uint8)
    for tree in trees:
        first, size = first_bits[id(tree)], len(tree.tokens)
        bits[first : first + size, :size] = tree.ancestors
    return tree_starts, tree_rows, bits
