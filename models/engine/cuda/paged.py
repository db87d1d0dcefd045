"""What a step attends to, by block tables: the form that the fused attention of
models.engine.cuda.attention_triton reads.

Owns the layout alone, as tensors. Who builds it and which kernel reads it is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
