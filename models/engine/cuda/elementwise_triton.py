"""What lies between a layer's matrix products on NVIDIA GPUs, in Triton: one kernel each where
torch needs several.

Same values as RMSNorm, rotate_ with store, and GatedLinear's activation, rounded at the same
places.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

GATE_COLUMNS = 1024  # of a program


def add_norm(
    x: torch.Tensor,
    y: torch.Tensor | None,
    y_weight: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, y [rows, H] -> (x + y, norm(x + y) * weight); y is normed first where it has a weight."""
    normed = torch.empty_like(x)
    added = x if y is None else torch.empty_like(x)
    if x.shape[0]:
        _add_norm[(x.shape[0],)](
            x,
            x if y is None else y,
            weight if y_weight is None else y_weight,
            weight,
            added,
            normed,
            eps,
            SIZE=x.shape[1],
            BLOCK=triton.next_power_of_2(x.shape[1]),
            HAS_Y=y is not None,
            NORM_Y=y_weight is not None,
            num_warps=8,
        )
    return added, normed


def rotate_and_store(
    qkv: torch.Tensor,
    turns: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> torch.Tensor:
    """Turns queries and keys and puts keys and values into the cache; returns the queries [T,
    heads, D], a view.

    qkv [T, (heads + 2 K) * D] is changed; turns: complex64 [T, 1, rotary_dim / 2]; caches [K,
    num_slots, D]; slots: int64 [T], negative for a token whose keys and values nobody wants.
    """
    num_tokens, width = qkv.shape
    kv_heads, _, head_dim = k_cache.shape
    heads = width // head_dim - 2 * kv_heads
    if num_tokens:
        _rotate_and_store[(num_tokens,)](
            qkv,
            torch.view_as_real(turns),
            slots,
            k_cache,
            v_cache,
            qkv.stride(0),
            k_cache.stride(0),
            HEADS=heads,
            HEADS_BLOCK=triton.next_power_of_2(heads),
            KV_HEADS=kv_heads,
            KV_BLOCK=triton.next_power_of_2(kv_heads),
            DIM=head_dim,
            DIM_BLOCK=triton.next_power_of_2(head_dim),
            PAIRS=turns.shape[-1],
            PAIRS_BLOCK=triton.next_power_of_2(turns.shape[-1]),
            num_warps=4,
        )
    return qkv[:, : heads * head_dim].view(num_tokens, heads, head_dim)


def gate(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [rows, 2 I] -> silu(its first half) * its second half, [rows, I]."""
    rows, width = gate_up.shape
    out = gate_up.new_empty(rows, width // 2)
    if rows:
        _gate[(rows, triton.cdiv(width // 2, GATE_COLUMNS))](
            gate_up, out, SIZE=width // 2, BLOCK=GATE_COLUMNS, num_warps=4
        )
    return out


@triton.jit
def _norm(wide, weight, eps, SIZE: tl.constexpr):
    """wide float32 [BLOCK], 0 beyond SIZE -> normalised in the weight's dtype, weighted."""
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    rounded = (wide * scale).to(weight.dtype).to(tl.float32)
    return (rounded * weight.to(tl.float32)).to(weight.dtype)


@triton.jit
def _add_norm(
    x,
    y,
    y_weight,
    weight,
    added,
    normed,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_Y: tl.constexpr,
    NORM_Y: tl.constexpr,
):
    at = tl.arange(0, BLOCK)
    here = tl.program_id(0).to(tl.int64) * SIZE + at
    real = at < SIZE
    total = tl.load(x + here, mask=real, other=0.0)
    if HAS_Y:
        addend = tl.load(y + here, mask=real, other=0.0)
        if NORM_Y:
            addend = _norm(
                addend.to(tl.float32), tl.load(y_weight + at, mask=real, other=0.0), eps, SIZE
            )
        total = (total.to(tl.float32) + addend.to(tl.float32)).to(total.dtype)
        tl.store(added + here, total, mask=real)
    result = _norm(total.to(tl.float32), tl.load(weight + at, mask=real, other=0.0), eps, SIZE)
    tl.store(normed + here, result, mask=real)


@triton.jit
def _rotate_and_store(
    qkv,
    turns,
    slots,
    k_cache,
    v_cache,
    qkv_stride,
    cache_stride,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    KV_HEADS: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIRS_BLOCK: tl.constexpr,
):
    """One token. The same thread reads and writes a pair: nobody reads what another has turned."""
    token = tl.program_id(0).to(tl.int64)
    here = qkv + token * qkv_stride
    slot = tl.load(slots + token)
    wanted = slot >= 0

    pair = tl.arange(0, PAIRS_BLOCK)
    turn = turns + (token * PAIRS + pair) * 2
    cos = tl.load(turn, mask=pair < PAIRS, other=0.0)[None, :]
    sin = tl.load(turn + 1, mask=pair < PAIRS, other=0.0)[None, :]

    head = tl.arange(0, HEADS_BLOCK)
    at = here + head[:, None] * DIM + 2 * pair[None, :]
    real = (head < HEADS)[:, None] & (pair < PAIRS)[None, :]
    even = tl.load(at, mask=real, other=0.0)
    odd = tl.load(at + 1, mask=real, other=0.0)
    a = even.to(tl.float32)
    b = odd.to(tl.float32)
    tl.store(at, (a * cos - b * sin).to(even.dtype), mask=real)
    tl.store(at + 1, (b * cos + a * sin).to(even.dtype), mask=real)

    kv_head = tl.arange(0, KV_BLOCK)
    known = (kv_head < KV_HEADS)[:, None]
    keys = here + HEADS * DIM
    target = kv_head.to(tl.int64)[:, None] * cache_stride + slot * DIM
    at = keys + kv_head[:, None] * DIM + 2 * pair[None, :]
    real = known & (pair < PAIRS)[None, :]
    even = tl.load(at, mask=real, other=0.0)
    odd = tl.load(at + 1, mask=real, other=0.0)
    a = even.to(tl.float32)
    b = odd.to(tl.float32)
    tl.store(
        k_cache + target + 2 * pair[None, :], (a * cos - b * sin).to(even.dtype), mask=real & wanted
    )
    tl.store(
        k_cache + target + 2 * pair[None, :] + 1,
        (b * cos + a * sin).to(even.dtype),
        mask=real & wanted,
    )

    dim = tl.arange(0, DIM_BLOCK)[None, :]
    rest = known & (dim >= 2 * PAIRS) & (dim < DIM) & wanted
    tl.store(
        k_cache + target + dim,
        tl.load(keys + kv_head[:, None] * DIM + dim, mask=rest, other=0.0),
        mask=rest,
    )
    all_of_it = known & (dim < DIM) & wanted
    values = tl.load(keys + (KV_HEADS + kv_head)[:, None] * DIM + dim, mask=all_of_it, other=0.0)
    tl.store(v_cache + target + dim, values, mask=all_of_it)


@triton.jit
def _gate(gate_up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = at < SIZE
    opened = tl.load(gate_up + row * 2 * SIZE + at, mask=real, other=0.0)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + at, mask=real, other=0.0)
    wide = opened.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(opened.dtype).to(tl.float32)
    tl.store(out + row * SIZE + at, (silu * up.to(tl.float32)).to(out.dtype.element_ty), mask=real)
