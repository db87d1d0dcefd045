"""The fast form of attention on any device in plain torch: everything is a batched matrix product.

The G query heads of a kv head are query rows of one product, the shared prefix is read once for all
sequences of a group, and prefix and own scores lie side by side so that one float32 softmax covers
both. Same signature and meaning as attention.attend_reference. Scores leave the product in the
cache's dtype, as in the eager form of the reference.
"""

from __future__ import annotations

import torch

from glm_batch.models.network.layers.attention import AttentionGroup, AttentionPart

KeysValues = tuple[torch.Tensor, torch.Tensor]


def attend_grouped(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    groups: tuple[AttentionGroup, ...],
) -> torch.Tensor:
    """q [rows, K * G, D], caches [K, num_slots, D] -> [rows, K * G, D]."""
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
    """A single sequence: its keys are few beside its queries' scores, so prefix and own keys are
    simply joined.
    """
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
    """Few queries of each of many sequences: the prefix is one product for all of them, the rest
    one for each.
    """
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
    """result [K, R * n, G, D], of which the part's real queries go to their rows of out [K, rows,
    G, D].
    """
    rows = part.rows.flatten()
    if part.keep is not None:
        rows, result = rows[part.keep], _pick(result, part.keep)
    out.index_copy_(1, rows, result)


def _scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q [B, rows, D], k [B, keys, D] -> q k^T / sqrt(D) [B, rows, keys], scaled inside the product."""
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
    """index [M] -> [heads * M]: the same places in each of `heads` rows of `count` that stand one
    behind the other.

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
