"""Attention over the paged KV cache: what a step attends to, the plain reference, the fast form.

K kv heads, G query heads per kv head, D head_dim. Query head i belongs to kv head i // G. Which
tokens see which is given; nothing here knows of sequences, blocks or scheduling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPart:
    """R sequences of up to n queries and L own cache slots each.

    rows [R, n]: the queries, as rows of the step's packed tensors; short sequences repeat one of
    their rows. keep [M]: flat places in [R, n] that hold real queries; None when all do. own_slots
    [R, L]: cache slots of each sequence after the group's prefix, padded with slot 0. bias [R, n *
    G, B]: float32, 0 or -inf, for the scores of the last B own slots; all before them are seen by
    all queries. Every query sees at least one slot. Query and query head are folded together. span:
    the rows as a slice where they are the neighbouring rows of a single sequence.
    """

    rows: torch.Tensor
    keep: torch.Tensor | None
    own_slots: torch.Tensor
    bias: torch.Tensor
    span: slice | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionGroup:
    """Sequences with the same cached prefix: every query of every part sees prefix_slots [P]."""

    prefix_slots: torch.Tensor
    parts: tuple[AttentionPart, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBatch:
    """One step's attention: where new keys and values go, and who sees what.

    slots [tokens]: the cache slot of each packed token. groups: all queries. out_rows [W] and
    out_groups: the rows whose final hidden state somebody wants, and the same attention for them
    alone, with rows counted within out_rows; out_groups is groups itself where all rows are wanted.
    """

    slots: torch.Tensor
    groups: Visible
    out_rows: torch.Tensor
    out_groups: Visible


# Who sees what, in the form that the attend function takes: groups, or
# models.engine.cuda.batch_paged.PagedQueries.
Visible = Any
KeysValues = tuple[torch.Tensor, torch.Tensor]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Visible], torch.Tensor]


def store(cache: torch.Tensor, slots: torch.Tensor, values: torch.Tensor) -> None:
    """Writes values [tokens, K, D] into cache [K, num_slots, D] at `slots`."""
    cache.index_copy_(1, slots, values.transpose(0, 1))


def attend_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    groups: tuple[AttentionGroup, ...],
) -> torch.Tensor:
    """q [rows, K * G, D], caches [K, num_slots, D] -> [rows, K * G, D], sequence by sequence."""
    out = torch.empty_like(q)
    for group in groups:
        for part in group.parts:
            for r in range(part.rows.shape[0]):
                _attend_sequence(q, k_cache, v_cache, group.prefix_slots, part, r, out)
    return out


def _attend_sequence(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    prefix_slots: torch.Tensor,
    part: AttentionPart,
    r: int,
    out: torch.Tensor,
) -> None:
    rows = part.rows[r]
    slots = torch.cat([prefix_slots, part.own_slots[r]])
    bias = part.bias[r, :: q.shape[1] // k_cache.shape[0]]  # the same for every query head
    mask = F.pad(bias, (len(slots) - bias.shape[-1], 0)) == 0
    result = F.scaled_dot_product_attention(
        q[rows].transpose(0, 1)[None],
        k_cache[:, slots][None],
        v_cache[:, slots][None],
        attn_mask=mask,
        enable_gqa=True,
    )[0].transpose(0, 1)  # [queries, K * G, D]
    if part.keep is None:
        out[rows] = result
    else:
        real = part.keep[part.keep // len(rows) == r] % len(rows)
        out[rows[real]] = result[real]


def attend_grouped(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    groups: tuple[AttentionGroup, ...],
) -> torch.Tensor:
    """The same on any device as batched matrix products, with the same arguments.

    The G query heads of a kv head are query rows of one product, a shared prefix is read once for
    all sequences of a group, and one float32 softmax covers prefix and own scores. Scores leave the
    product in the cache's dtype, as in the eager form of the reference.
    """
    num_rows, num_heads, head_dim = q.shape
    kv_heads = k_cache.shape[0]
    q = q.view(num_rows, kv_heads, num_heads // kv_heads, head_dim).transpose(0, 1).contiguous()
    out = torch.empty_like(q)  # [K, rows, G, D]
    for group in groups:
        prefix = (
            _keys_values(k_cache, v_cache, group.prefix_slots) if len(group.prefix_slots) else None
        )
        for part in group.parts:
            own = _keys_values(k_cache, v_cache, part.own_slots.flatten())
            if len(part.rows) == 1:
                _attend_one(q, out, prefix, own, part)
            elif prefix:
                _attend_many(q, out, prefix, own, part)
            else:
                _attend_apart(q, out, own, part)
    return out.transpose(0, 1).reshape(num_rows, num_heads, head_dim)


def _attend_one(
    q: torch.Tensor,
    out: torch.Tensor,
    prefix: KeysValues | None,
    own: KeysValues,
    part: AttentionPart,
) -> None:
    """A single sequence, with few keys beside its queries' scores: prefix and own are joined."""
    kv_heads, head_dim = q.shape[0], q.shape[-1]
    k, v = (torch.cat(both, dim=1) for both in zip(prefix, own, strict=True)) if prefix else own
    mine = _pick(q, part.rows[0]) if part.span is None else q[:, part.span]  # [K, n, G, D]
    scores = _scores(mine.reshape(kv_heads, -1, head_dim), k).float()
    scores[..., scores.shape[-1] - part.bias.shape[-1] :] += part.bias
    result = torch.bmm(torch.softmax(scores, dim=-1).to(q.dtype), v).view(mine.shape)
    if part.span is None:
        out.index_copy_(1, part.rows[0], result)
    else:
        out[:, part.span] = result


def _attend_many(
    q: torch.Tensor, out: torch.Tensor, prefix: KeysValues, own: KeysValues, part: AttentionPart
) -> None:
    """Few queries of many sequences: one product with the prefix, one each with the rest."""
    kv_heads, _, group_size, head_dim = q.shape
    num_sequences, own_len = part.own_slots.shape
    prefix_len = prefix[0].shape[1]
    rows = part.rows.flatten()
    prefix_q = _pick(q, rows).view(kv_heads, -1, head_dim)
    own_q = prefix_q.view(kv_heads * num_sequences, -1, head_dim)
    own_k, own_v = (tensor.view(kv_heads * num_sequences, own_len, head_dim) for tensor in own)

    shape = (kv_heads, num_sequences, own_q.shape[1])
    scores = q.new_empty((*shape, prefix_len + own_len), dtype=torch.float32)
    scores[..., :prefix_len] = _scores(prefix_q, prefix[0]).view(*shape, prefix_len)
    scores[..., prefix_len:] = _scores(own_q, own_k).view(*shape, own_len)
    scores[..., scores.shape[-1] - part.bias.shape[-1] :] += part.bias
    probabilities = torch.softmax(scores, dim=-1).to(q.dtype)
    result = torch.bmm(probabilities[..., prefix_len:].reshape(*own_q.shape[:2], own_len), own_v)
    by_prefix = probabilities[..., :prefix_len].reshape(*prefix_q.shape[:2], prefix_len)
    result = torch.baddbmm(result.view(prefix_q.shape), by_prefix, prefix[1]).view(
        kv_heads, -1, group_size, head_dim
    )
    _put(out, part, result)


def _attend_apart(q: torch.Tensor, out: torch.Tensor, own: KeysValues, part: AttentionPart) -> None:
    """Few queries of each of many sequences that share nothing: one product for each."""
    kv_heads, _, group_size, head_dim = q.shape
    num_sequences, own_len = part.own_slots.shape
    own_q = _pick(q, part.rows.flatten()).view(kv_heads * num_sequences, -1, head_dim)
    own_k, own_v = (tensor.view(kv_heads * num_sequences, own_len, head_dim) for tensor in own)
    scores = _scores(own_q, own_k).float()
    scores.view(kv_heads, num_sequences, -1, own_len)[..., own_len - part.bias.shape[-1] :] += (
        part.bias
    )
    result = torch.bmm(torch.softmax(scores, dim=-1).to(q.dtype), own_v)
    _put(out, part, result.view(kv_heads, -1, group_size, head_dim))


def _put(out: torch.Tensor, part: AttentionPart, result: torch.Tensor) -> None:
    """result [K, R * n, G, D]: its real queries go to their rows of out [K, rows, G, D]."""
    rows = part.rows.flatten()
    if part.keep is not None:
        rows, result = rows[part.keep], _pick(result, part.keep)
    out.index_copy_(1, rows, result)


def _scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q [B, rows, D], k [B, keys, D] -> q k^T / sqrt(D) [B, rows, keys]."""
    unused = q.new_empty(()).expand(q.shape[0], q.shape[1], k.shape[1])
    return torch.baddbmm(unused, q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)


def _keys_values(k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor) -> KeysValues:
    """Caches [K, num_slots, D], slots [M] -> each [K, M, D]."""
    flat = _fold(slots, *k_cache.shape[:2])
    return _pick_folded(k_cache, flat), _pick_folded(v_cache, flat)


def _pick(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """tensor [K, N, ...], contiguous, index [M] -> [K, M, ...], contiguous."""
    return _pick_folded(tensor, _fold(index, *tensor.shape[:2]))


def _fold(index: torch.Tensor, heads: int, count: int) -> torch.Tensor:
    """index [M] -> [heads * M]: the same places in each of `heads` rows of `count`.

    On the CPU index_select copies whole rows fast only along dimension 0, so the heads are folded
    into it.
    """
    return torch.cat([index + head * count for head in range(heads)])


def _pick_folded(tensor: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """tensor [K, N, ...], flat [K * M] as from _fold -> [K, M, ...]."""
    heads, count = tensor.shape[:2]
    return (
        tensor.view(heads * count, *tensor.shape[2:])
        .index_select(0, flat)
        .view(heads, -1, *tensor.shape[2:])
    )
