"""Attention over the paged KV cache: what a step attends to (AttentionBatch), and the plain
reference computation.

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
    """Sequences that begin with the same cached prefix: prefix_slots [P] are seen by every query of
    every part.
    """

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
# models.engine.cuda.paged.PagedQueries.
Visible = Any
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
    """q [rows, K * G, D], caches [K, num_slots, D] -> [rows, K * G, D]: one query sequence after
    the other.
    """
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
