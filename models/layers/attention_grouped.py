"""The fast form of attention on any device in plain torch: everything is a batched matrix product.

The G query heads of a kv head are query rows of one product, the shared prefix is read once for all sequences of a
group, and prefix and own scores lie side by side so that one float32 softmax covers both. Same signature and meaning
as attention.attend_reference. Scores leave the product in the cache's dtype, as in the eager form of the reference.
"""

from __future__ import annotations

import torch

from models.layers.attention import AttentionGroup

KeysValues = tuple[torch.Tensor, torch.Tensor]


def attend_grouped(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, groups: tuple[AttentionGroup, ...]
) -> torch.Tensor:
    """q [rows, K * G, D], caches [K, num_slots, D] -> [rows, K * G, D]."""
    num_rows, num_heads, head_dim = q.shape
    kv_heads = k_cache.shape[0]
    by_kv_head = q.view(num_rows, kv_heads, num_heads // kv_heads, head_dim).transpose(0, 1).contiguous()
    out = torch.empty_like(by_kv_head)  # [K, rows, G, D]
    for group in groups:
        prefix = _pick(k_cache, group.prefix_slots), _pick(v_cache, group.prefix_slots)  # each [K, P, D]
        for part in group.parts:
            rows, own = part.rows.flatten(), part.own_slots.flatten()
            result = _attend_part(
                _pick(by_kv_head, rows), prefix, (_pick(k_cache, own), _pick(v_cache, own)), part.visible
            )
            if part.keep is not None:
                rows, result = rows[part.keep], _pick(result, part.keep)
            out.index_copy_(1, rows, result)
    return out.transpose(0, 1).reshape(num_rows, num_heads, head_dim)


def _attend_part(q: torch.Tensor, prefix: KeysValues, own: KeysValues, visible: torch.Tensor) -> torch.Tensor:
    """q [K, R * n, G, D], prefix [K, P, D], own [K, R * L, D], visible [R, n, L] -> [K, R * n, G, D]."""
    kv_heads, _, group_size, head_dim = q.shape
    num_sequences, num_queries, own_len = visible.shape
    prefix_len = prefix[0].shape[1]
    prefix_q = q.view(kv_heads, -1, head_dim)
    own_q = q.view(kv_heads * num_sequences, -1, head_dim)
    own_k, own_v = (part.view(kv_heads * num_sequences, own_len, head_dim) for part in own)

    shape = (kv_heads, num_sequences, num_queries, group_size)
    scores = q.new_empty((*shape, prefix_len + own_len), dtype=torch.float32)
    own_scores = scores[..., prefix_len:]
    own_scores.copy_(_scores(own_q, own_k).view(*shape, own_len))
    own_scores.masked_fill_(~visible[None, :, :, None, :], float("-inf"))
    if prefix_len:
        scores[..., :prefix_len] = _scores(prefix_q, prefix[0]).view(*shape, prefix_len)

    probabilities = torch.softmax(scores, dim=-1).to(q.dtype)
    out = torch.bmm(probabilities[..., prefix_len:].reshape(*own_q.shape[:2], own_len), own_v)
    if prefix_len:
        by_prefix = probabilities[..., :prefix_len].reshape(*prefix_q.shape[:2], prefix_len)
        out = out.view(prefix_q.shape).baddbmm_(by_prefix, prefix[1])
    return out.view(q.shape)


def _scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q [B, rows, D], k [B, keys, D] -> q k^T / sqrt(D) [B, rows, keys], scaled inside the product."""
    unused = q.new_empty(()).expand(q.shape[0], q.shape[1], k.shape[1])
    return torch.baddbmm(unused, q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)


def _pick(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """tensor [K, N, ...], contiguous, index [M] -> [K, M, ...], contiguous.

    On the CPU index_select copies whole rows fast only along dimension 0, so the heads are folded into it.
    """
    heads, count = tensor.shape[:2]
    offsets = torch.arange(heads, device=index.device)[:, None] * count
    flat = (offsets + index).flatten()
    return tensor.view(heads * count, *tensor.shape[2:]).index_select(0, flat).view(heads, -1, *tensor.shape[2:])
