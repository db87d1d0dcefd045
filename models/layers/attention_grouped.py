"""The fast form of attention on any device in plain torch: everything is a batched matrix product.

The G query heads of a kv head are query rows of one product, the shared prefix is read once for all sequences of a
group, and prefix and own scores lie side by side so that one float32 softmax covers both. Same signature and meaning
as attention.attend_reference. Scores leave the product in the cache's dtype, as in the eager form of the reference.
"""

from __future__ import annotations

import torch

from models.layers.attention import AttentionGroup


def attend_grouped(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, groups: tuple[AttentionGroup, ...]
) -> torch.Tensor:
    """q [rows, K * G, D], caches [K, num_slots, D] -> [rows, K * G, D]."""
    num_rows, num_heads, head_dim = q.shape
    kv_heads = k_cache.shape[0]
    by_kv_head = q.view(num_rows, kv_heads, num_heads // kv_heads, head_dim).transpose(0, 1).contiguous()
    out = torch.empty_like(by_kv_head)  # [K, rows, G, D]
    for group in groups:
        rows = group.rows.flatten()
        result = _attend_group(_pick(by_kv_head, rows), k_cache, v_cache, group)  # [K, R * n, G, D]
        if group.keep is not None:
            rows, result = rows[group.keep], _pick(result, group.keep)
        out.index_copy_(1, rows, result)
    return out.transpose(0, 1).reshape(num_rows, num_heads, head_dim)


def _attend_group(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, group: AttentionGroup
) -> torch.Tensor:
    """q [K, R * n, G, D] -> [K, R * n, G, D]."""
    kv_heads, _, group_size, head_dim = q.shape
    num_sequences, num_queries, own_len = group.visible.shape
    prefix_len = len(group.prefix_slots)
    own = group.own_slots.flatten()
    own_q = q.view(kv_heads * num_sequences, num_queries * group_size, head_dim)
    own_shape = (kv_heads * num_sequences, own_len, head_dim)

    scores = q.new_empty(
        (kv_heads, num_sequences, num_queries, group_size, prefix_len + own_len), dtype=torch.float32
    )
    own_scores = _scores(own_q, _pick(k_cache, own).view(own_shape))
    scores[..., prefix_len:] = own_scores.view(*scores.shape[:-1], own_len)
    scores[..., prefix_len:].masked_fill_(~group.visible[None, :, :, None, :], float("-inf"))
    if prefix_len:
        prefix_q = q.view(kv_heads, -1, head_dim)
        prefix_scores = _scores(prefix_q, _pick(k_cache, group.prefix_slots))
        scores[..., :prefix_len] = prefix_scores.view(*scores.shape[:-1], prefix_len)

    probabilities = torch.softmax(scores, dim=-1).to(q.dtype)
    own_probabilities = probabilities[..., prefix_len:].reshape(*own_q.shape[:2], own_len)
    out = torch.bmm(own_probabilities, _pick(v_cache, own).view(own_shape)).view(kv_heads, -1, head_dim)
    if prefix_len:
        prefix_probabilities = probabilities[..., :prefix_len].view(kv_heads, -1, prefix_len)
        out = out.baddbmm_(prefix_probabilities, _pick(v_cache, group.prefix_slots))
    return out.view(q.shape)


def _scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q [B, rows, D], k [B, keys, D] -> q k^T / sqrt(D) [B, rows, keys], scaled inside the product."""
    empty = q.new_empty(()).expand(q.shape[0], q.shape[1], k.shape[1])
    return torch.baddbmm(empty, q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)


def _pick(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """tensor [K, N, ...] -> [K, len(index), ...], contiguous.

    On the CPU index_select copies whole rows fast only along dimension 0, so the heads are folded into it.
    """
    if index.numel() == 1:
        return tensor.index_select(1, index)
    heads, count = tensor.shape[:2]
    offsets = torch.arange(heads, device=index.device)[:, None] * count
    flat = (offsets + index).flatten()
    return tensor.view(heads * count, *tensor.shape[2:]).index_select(0, flat).view(heads, -1, *tensor.shape[2:])
