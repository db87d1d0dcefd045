"""A GLM backbone's forward pass on NVIDIA GPUs, with fused kernels between the products.

A residual addition, the norm before it (GLM-4) and the norm after it are one kernel, so the loop
carries what the next sublayer reads beside the residual stream. Same meaning as Backbone.forward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from glm_batch.models.engine.cuda.attention_triton import attend_paged
from glm_batch.models.engine.cuda.elementwise_triton import add_norm, gate, rotate_and_store
from glm_batch.models.network.glm import Backbone, DecoderLayer, MediaRows, Pages
from glm_batch.models.network.layers.attention import AttentionBatch


def fused_forward(
    backbone: Backbone,
    input_ids: torch.Tensor,
    turns: torch.Tensor,
    pages: Sequence[Pages],
    attn: AttentionBatch,
    media: MediaRows | None = None,
) -> torch.Tensor:
    """input_ids [T] int64, turns as of RopeTable.lookup -> hidden states of wanted rows [W, H]."""
    x = backbone.embed_tokens(input_ids)
    if media is not None:
        x.index_copy_(0, media.rows, media.features)
    layers: list[DecoderLayer] = list(backbone.layers)  # type: ignore[arg-type]
    first = layers[0].input_layernorm
    x, normed = add_norm(x, None, None, first.weight, first.eps)
    norms = [layer.input_layernorm for layer in layers[1:]] + [backbone.norm]
    some_wanted = attn.out_groups is not attn.groups
    for layer, page, norm in zip(layers, pages, norms, strict=True):
        wanted_only = some_wanted and norm is backbone.norm
        attended = _attend(layer, normed, turns, page, attn, wanted_only=wanted_only)
        if wanted_only:
            x = x[attn.out_rows]
        before_mlp = layer.post_attention_layernorm
        x, normed = add_norm(
            x, attended, _weight(layer, "post_self_attn_layernorm"), before_mlp.weight, norm.eps
        )
        gate_up = F.linear(normed, layer.mlp.gate_up_proj.weight)
        x, normed = add_norm(
            x,
            layer.mlp.down_proj(gate(gate_up)),
            _weight(layer, "post_mlp_layernorm"),
            norm.weight,
            norm.eps,
        )
    return normed


def _attend(
    layer: DecoderLayer,
    x: torch.Tensor,
    turns: torch.Tensor,
    pages: Pages,
    attn: AttentionBatch,
    *,
    wanted_only: bool,
) -> torch.Tensor:
    attention = layer.self_attn
    q = rotate_and_store(attention.qkv_proj(x), turns, attn.slots, *pages)
    if wanted_only:
        q = q[attn.out_rows]
    attended = attend_paged(q, *pages, attn.out_groups if wanted_only else attn.groups)
    return attention.o_proj(attended.flatten(1))  # type: ignore[no-any-return]


def _weight(layer: DecoderLayer, name: str) -> torch.Tensor | None:
    """Of a norm that GLM-4 has and GLM has not."""
    norm = getattr(layer, name, None)
    return None if norm is None else norm.weight
