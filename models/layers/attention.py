"""Attention over the paged KV cache: what a step attends to (AttentionBatch), and the plain reference computation.

K kv heads, G query heads per kv head, D head_dim. Query head i belongs to kv head i // G. Which tokens see which is
given; nothing here knows of sequences, blocks or scheduling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionGroup:
    """R sequences that see one shared prefix and, each for itself, up to L further cache slots.

    rows [R, n]: the queries, as rows of the step's packed tensors; short sequences repeat their first row.
    keep [M]: flat places in [R, n] that hold real queries; None when all do.
    prefix_slots [P]: cache slots that every query of the group sees (P may be 0).
    own_slots [R, L]: cache slots of each sequence after the prefix, padded with slot 0.
    visible [R, n, L]: bool, which of its own slots a query sees; at least one slot is visible to every query.
    """

    rows: torch.Tensor
    keep: torch.Tensor | None
    prefix_slots: torch.Tensor
    own_slots: torch.Tensor
    visible: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBatch:
    """One step's attention: where new keys and values go, and who sees what.

    slots [tokens]: the cache slot of each packed token. groups: all queries. out_rows [W] and out_groups: the rows
    whose final hidden state somebody wants, and the same attention for them alone, with rows counted within out_rows.
    """

    slots: torch.Tensor
    groups: tuple[AttentionGroup, ...]
    out_rows: torch.Tensor
    out_groups: tuple[AttentionGroup, ...]


Attend = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, tuple[AttentionGroup, ...]],
    torch.Tensor,
]


def store(cache: torch.Tensor, slots: torch.Tensor, values: torch.Tensor) -> None:
    """Writes values [tokens, K, D] into cache [K, num_slots, D] at `slots`."""
    cache.index_copy_(1, slots, values.transpose(0, 1))


def attend_reference(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, groups: tuple[AttentionGroup, ...]
) -> torch.Tensor:
    """q [rows, K * G, D], caches [K, num_slots, D] -> [rows, K * G, D]: one query sequence after the other."""
    out = torch.empty_like(q)
    for group in groups:
        num_sequences, num_queries = group.rows.shape
        keep = torch.ones(num_sequences * num_queries, dtype=torch.bool, device=q.device)
        if group.keep is not None:
            keep = torch.zeros_like(keep).index_fill_(0, group.keep, True)
        prefix_visible = group.visible.new_ones(num_queries, len(group.prefix_slots))
        for r in range(num_sequences):
            slots = torch.cat([group.prefix_slots, group.own_slots[r]])
            mask = torch.cat([prefix_visible, group.visible[r]], dim=1)
            result = F.scaled_dot_product_attention(
                q[group.rows[r]].transpose(0, 1)[None],
                k_cache[:, slots][None],
                v_cache[:, slots][None],
                attn_mask=mask,
                enable_gqa=True,
            )[0].transpose(0, 1)  # [queries, K * G, D]
            real = keep[r * num_queries : (r + 1) * num_queries]
            out[group.rows[r][real]] = result[real]
    return out
