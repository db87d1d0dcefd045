"""Fused attention over the paged KV cache for NVIDIA GPUs, in Triton: flash attention over block
tables.

One program takes a tile of neighbouring queries of one sequence and one kv head: the G query heads
of that head are rows of the same matrix products, so that a decode reads its keys and values once.
Scores and sums are float32 (online softmax: Milakov and Gimelshein 2018). Where there are fewer
tiles than the GPU has room for, each tile's keys are split among several programs and a second
kernel merges their results. Same meaning as attention.attend_reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from glm_batch.models.engine.cuda.batch_paged import PagedQueries

MAX_SPLITS = 32
PROGRAMS = 264  # enough for two programs on each multiprocessor of an H100 or H200


def attend_paged(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, queries: PagedQueries
) -> torch.Tensor:
    """q [rows, K * G, D] (rows may be apart), caches [K, num_slots, D] -> [rows, K * G, D]."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if queries.single_tiles.shape[1]:
        _launch(q, k_cache, v_cache, queries, queries.single_tiles, 1, out)
    if queries.tiles.shape[1]:
        _launch(q, k_cache, v_cache, queries, queries.tiles, queries.tile_queries, out)
    return out


def num_splits(num_programs: int) -> int:
    """How many programs share a tile's keys: a power of two that fills the GPU."""
    wanted = min(PROGRAMS // max(num_programs, 1), MAX_SPLITS)
    return 1 << (max(wanted, 1).bit_length() - 1)


def _launch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    queries: PagedQueries,
    tiles: torch.Tensor,
    tile_queries: int,
    out: torch.Tensor,
) -> None:
    _, num_heads, head_dim = q.shape
    kv_heads, num_tiles = k_cache.shape[0], tiles.shape[1]
    group_size = num_heads // kv_heads
    assert q.stride()[1:] == (head_dim, 1), "the heads of a query lie side by side"
    splits = num_splits(num_tiles * kv_heads)
    wide = q.dtype == torch.float32
    block_m = max(16, triton.next_power_of_2(tile_queries * group_size))
    parts = (splits if splits > 1 else 0, num_tiles * tile_queries, num_heads)
    partial = torch.empty((*parts, head_dim), dtype=torch.float32, device=q.device)
    log_sums = torch.empty(parts, dtype=torch.float32, device=q.device)
    tree = queries.tree_bits
    _attend[(num_tiles, kv_heads, splits)](
        q,
        k_cache,
        v_cache,
        out if splits == 1 else partial,
        log_sums,
        tiles,
        queries.tables,
        queries.table_starts,
        queries.row_ends,
        queries.row_ends if tree is None else queries.tree_starts,
        queries.row_ends if tree is None else queries.tree_rows,
        queries.row_ends if tree is None else tree,
        q.stride(0),
        k_cache.stride(0),
        tiles.stride(0),
        0 if tree is None else tree.shape[1],
        head_dim**-0.5 * 1.4426950408889634,
        HEADS=num_heads,
        GROUP=group_size,
        QUERIES=tile_queries,
        DIM=head_dim,
        DIM_BLOCK=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_SIZE=queries.block_size,
        ROWS=block_m,
        # more of them would not fit into the registers
        KEYS=32 if wide or tree is not None else 64,
        SPLITS=splits,
        HAS_TREE=tree is not None,
        PRECISION="ieee" if wide else "tf32",  # of float32 products; others have one precision only
        num_warps=4 if block_m <= 64 else 8,
        num_stages=2 if wide else 3,
    )
    if splits > 1:
        _merge[(num_tiles * tile_queries, num_heads)](
            partial,
            log_sums,
            out,
            tiles,
            tiles.stride(0),
            HEADS=num_heads,
            DIM=head_dim,
            DIM_BLOCK=triton.next_power_of_2(head_dim),
            QUERIES=tile_queries,
            SPLITS=splits,
            num_warps=4,
        )


@triton.jit(do_not_specialize=["tile_stride", "tree_width"])
def _attend(
    q,
    k_cache,
    v_cache,
    out,
    log_sums,
    tiles,
    tables,
    table_starts,
    row_ends,
    tree_starts,
    tree_rows,
    tree_bits,
    q_stride,
    cache_stride,
    tile_stride,
    tree_width,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_TREE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile, one kv head, one part of its keys. `scale` holds log2(e): exponents are of two."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    sequence = tl.load(tiles + tile)
    first_row = tl.load(tiles + tile_stride + tile)
    count = tl.load(tiles + 2 * tile_stride + tile)
    tile_end = tl.load(tiles + 3 * tile_stride + tile)

    within = tl.arange(0, ROWS)
    row = first_row + within // GROUP
    head = kv_head * GROUP + within % GROUP
    real = within // GROUP < count
    dim = tl.arange(0, DIM_BLOCK)
    cell = real[:, None] & (dim < DIM)[None, :]
    queries = tl.load(
        q + row.to(tl.int64)[:, None] * q_stride + head[:, None] * DIM + dim[None, :],
        mask=cell,
        other=0.0,
    )
    ends = tl.load(row_ends + row, mask=real, other=0)
    if HAS_TREE:
        tree_start = tl.load(tree_starts + sequence)
        tree_row = tl.load(tree_rows + row, mask=real, other=0)

    table = tables + tl.load(table_starts + sequence)
    keys_here = k_cache + kv_head.to(tl.int64) * cache_stride
    values_here = v_cache + kv_head.to(tl.int64) * cache_stride
    share = tl.cdiv(tl.cdiv(tile_end, KEYS), SPLITS) * KEYS
    begin = split * share
    end = tl.minimum(begin + share, tile_end)

    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, DIM_BLOCK], tl.float32)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        inside = key < end
        block = tl.load(table + key // BLOCK_SIZE, mask=inside, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE
        keys = tl.load(
            keys_here + slot[None, :] * DIM + dim[:, None],
            mask=inside[None, :] & (dim < DIM)[:, None],
            other=0.0,
        )
        scores = tl.dot(queries, keys, input_precision=PRECISION) * scale
        seen = key[None, :] < ends[:, None]
        if HAS_TREE:
            node = key - tree_start
            in_tree = (node >= 0) & (node < tree_width)
            bits = tl.load(
                tree_bits + tree_row[:, None] * tree_width + node[None, :],
                mask=in_tree[None, :] & real[:, None],
                other=0,
            )
            seen = seen | (bits != 0)
        scores = tl.where(seen & inside[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        # nothing seen so far: no NaN from inf - inf
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(highest - shift)
        values = tl.load(
            values_here + slot[:, None] * DIM + dim[None, :],
            mask=inside[:, None] & (dim < DIM)[None, :],
            other=0.0,
        )
        total = total * fade + tl.sum(weights, 1)
        result = result * fade[:, None]
        result = tl.dot(weights.to(values.dtype), values, result, input_precision=PRECISION)
        highest = higher

    result = result / tl.where(total == 0.0, 1.0, total)[:, None]
    if SPLITS == 1:
        place = row.to(tl.int64) * HEADS + head
    else:
        place = ((split * tl.num_programs(0) + tile) * QUERIES + within // GROUP).to(
            tl.int64
        ) * HEADS + head
    tl.store(out + place[:, None] * DIM + dim[None, :], result.to(out.dtype.element_ty), mask=cell)
    if SPLITS > 1:
        tl.store(log_sums + place, highest + tl.log2(total), mask=real)


@triton.jit(do_not_specialize=["tile_stride"])
def _merge(
    partial,
    log_sums,
    out,
    tiles,
    tile_stride,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One query and head: the parts weighted by their share of the softmax's sum."""
    tile = tl.program_id(0) // QUERIES
    query = tl.program_id(0) % QUERIES
    head = tl.program_id(1)
    real = query < tl.load(tiles + 2 * tile_stride + tile)
    row = tl.load(tiles + tile_stride + tile) + query
    place = tl.program_id(0).to(tl.int64) * HEADS + head
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, DIM_BLOCK)
    apart = tl.num_programs(0).to(tl.int64) * HEADS
    log_sum = tl.load(log_sums + split * apart + place, mask=real, other=float("-inf"))
    highest = tl.max(log_sum, 0)
    weight = tl.exp2(log_sum - tl.where(highest == float("-inf"), 0.0, highest))
    weight = weight / tl.maximum(tl.sum(weight, 0), 1e-30)
    parts = tl.load(
        partial + (split * apart + place)[:, None] * DIM + dim[None, :],
        mask=real & (dim < DIM)[None, :],
        other=0.0,
    )
    merged = tl.sum(parts * weight[:, None], 0)
    target = out + (row.to(tl.int64) * HEADS + head) * DIM + dim
    tl.store(target, merged.to(out.dtype.element_ty), mask=real & (dim < DIM))
