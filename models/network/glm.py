"""GLM and GLM-4 (0414, Z1, 4.1V) over packed tokens and a paged KV cache.

Legend: T packed tokens, W wanted rows, H hidden_size, K kv heads, G query heads per kv head, D
head_dim. In a parallel group K and G count this rank's heads; what passes from layer to layer is
complete on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.checkpoint.weights import Targets
from glm_batch.models.network.layers.attention import (
    Attend,
    AttentionBatch,
    AttentionGroup,
    attend_grouped,
    store,
)
from glm_batch.models.network.layers.embedding import Embedding, embedding
from glm_batch.models.network.layers.linear import GatedLinear, QKVLinear, RowLinear
from glm_batch.models.network.layers.norm import RMSNorm
from glm_batch.models.network.layers.parallel import SINGLE, ParallelGroup
from glm_batch.models.network.layers.rope import RopeTable, rotate_

Pages = tuple[torch.Tensor, torch.Tensor]  # one layer's keys and values, each [K, num_slots, D]


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaRows:
    """Rows of a step that are not text: rows [M] int64 and the features [M, H] for them."""

    rows: torch.Tensor
    features: torch.Tensor

    def __post_init__(self) -> None:
        if len(self.rows) != len(self.features):
            raise ValueError(
                f"{len(self.rows)} placeholder tokens, but {len(self.features)} features for them"
            )


class Attention(nn.Module):
    """Grouped-query attention with partial rotary embedding; the output never has a bias."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        attend: Attend,
        group: ParallelGroup,
    ) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.attend = attend
        self.qkv_proj = QKVLinear(
            config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            bias=config.attention_bias,
            dtype=dtype,
            device=device,
            group=group,
        )
        self.num_heads, self.num_kv_heads = self.qkv_proj.heads.size, self.qkv_proj.kv_heads.size
        all_heads = config.num_attention_heads * config.head_dim
        self.o_proj = RowLinear(
            all_heads, config.hidden_size, dtype=dtype, device=device, group=group
        )

    def forward(
        self, x: torch.Tensor, turns: torch.Tensor, pages: Pages, attn: AttentionBatch
    ) -> torch.Tensor:
        """x [T, H] -> [T, H]; writes the keys and values of all T tokens first."""
        return self._output(self._project(x, turns, pages, attn), pages, attn.groups)

    def forward_wanted(
        self, x: torch.Tensor, turns: torch.Tensor, pages: Pages, attn: AttentionBatch
    ) -> torch.Tensor:
        """x [T, H] -> [W, H]: attention and output of the wanted rows alone."""
        q = self._project(x, turns, pages, attn)
        return self._output(q[attn.out_rows], pages, attn.out_groups)

    def _project(
        self, x: torch.Tensor, turns: torch.Tensor, pages: Pages, attn: AttentionBatch
    ) -> torch.Tensor:
        """x [T, H] -> queries [T, K * G, D]; keys and values go to the cache."""
        qk, v = self.qkv_proj.forward_qk_v(x)
        q, k = torch.split(
            rotate_(self._heads(qk), turns), [self.num_heads, self.num_kv_heads], dim=1
        )
        store(pages[0], attn.slots, k)
        store(pages[1], attn.slots, self._heads(v))
        return q

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        # [T, heads, D]; T may be 0
        return x.view(x.shape[0], x.shape[1] // self.head_dim, self.head_dim)

    def _output(
        self, q: torch.Tensor, pages: Pages, groups: tuple[AttentionGroup, ...]
    ) -> torch.Tensor:
        return self.o_proj(self.attend(q, *pages, groups).flatten(1))  # type: ignore[no-any-return]

    def targets(self, name: str) -> Targets:
        return self.qkv_proj.targets(name) | self.o_proj.targets(f"{name}.o_proj")


class MLP(nn.Module):
    """down(up * silu(gate)); rows 0..I-1 of the fused gate_up weight are the gate."""

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device, group: ParallelGroup
    ) -> None:
        super().__init__()
        inner = config.intermediate_size
        self.gate_up_proj = GatedLinear(
            config.hidden_size, inner, dtype=dtype, device=device, group=group
        )
        self.down_proj = RowLinear(
            inner, config.hidden_size, dtype=dtype, device=device, group=group
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_up_proj(x))  # type: ignore[no-any-return]

    def targets(self, name: str) -> Targets:
        return self.gate_up_proj.targets(f"{name}.gate_up_proj") | self.down_proj.targets(
            f"{name}.down_proj"
        )


class DecoderLayer(nn.Module):
    """Pre-norm: x += attention(norm(x)); x += mlp(norm(x)). Subclasses may norm more."""

    norm_names: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    input_layernorm: RMSNorm
    post_attention_layernorm: RMSNorm

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        attend: Attend,
        group: ParallelGroup,
    ) -> None:
        super().__init__()
        self.self_attn = Attention(config, dtype=dtype, device=device, attend=attend, group=group)
        self.mlp = MLP(config, dtype=dtype, device=device, group=group)
        for name in self.norm_names:
            setattr(
                self,
                name,
                RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device),
            )

    def forward(
        self,
        x: torch.Tensor,
        turns: torch.Tensor,
        pages: Pages,
        attn: AttentionBatch,
        *,
        wanted_only: bool,
    ) -> torch.Tensor:
        """x [T, H] -> [T, H], or with `wanted_only` [W, H]: all that the last layer owes."""
        attention = self.self_attn.forward_wanted if wanted_only else self.self_attn.forward
        attended = attention(self.input_layernorm(x), turns, pages, attn)
        if wanted_only:
            x = x[attn.out_rows]
        x = x + self.after_attention(attended)
        return x + self.after_mlp(self.mlp(self.post_attention_layernorm(x)))

    def after_attention(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def after_mlp(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def targets(self, name: str) -> Targets:
        norms = {f"{name}.{norm}.weight": getattr(self, norm).weight for norm in self.norm_names}
        return norms | self.self_attn.targets(f"{name}.self_attn") | self.mlp.targets(f"{name}.mlp")


class Backbone(nn.Module):
    """Embedding -> layers -> final norm."""

    layer_class: type[DecoderLayer] = DecoderLayer
    prefix = "model"  # of the checkpoint's names

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        attend: Attend = attend_grouped,
        group: ParallelGroup = SINGLE,
    ) -> None:
        super().__init__()
        self.embed_tokens: Embedding = embedding(
            config.vocab_size, config.hidden_size, dtype=dtype, device=device, group=group
        )
        self.layers = nn.ModuleList(
            self.layer_class(config, dtype=dtype, device=device, attend=attend, group=group)
            for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        self.rope = RopeTable(config.rope, device=device)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        max_position: int,
        pages: Sequence[Pages],
        attn: AttentionBatch,
        media: MediaRows | None = None,
    ) -> torch.Tensor:
        """input_ids, positions [T] int64 -> the wanted rows' hidden states after the norm [W, H].

        positions may be [3, T] where the rotary embedding has three axes. The rows of `media` take
        its features for their embeddings.
        """
        turns = self.rope.lookup(positions, max_position)
        x = self.embed_tokens(input_ids)
        if media is not None:
            x.index_copy_(0, media.rows, media.features)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            x = layer(x, turns, pages[i], attn, wanted_only=i == last)
        return self.norm(x)  # type: ignore[no-any-return]

    def targets(self) -> Targets:
        """Checkpoint names of the whole backbone and the views that they fill."""
        found: Targets = {
            f"{self.prefix}.embed_tokens.weight": self.embed_tokens.target(),
            f"{self.prefix}.norm.weight": self.norm.weight,
        }
        for i, layer in enumerate(self.layers):
            found |= layer.targets(f"{self.prefix}.layers.{i}")  # type: ignore[operator]
        return found


class Glm4DecoderLayer(DecoderLayer):
    """x += norm(attention(norm(x))); x += norm(mlp(norm(x)))."""

    post_self_attn_layernorm: RMSNorm
    post_mlp_layernorm: RMSNorm
    norm_names = (*DecoderLayer.norm_names, "post_self_attn_layernorm", "post_mlp_layernorm")

    def after_attention(self, x: torch.Tensor) -> torch.Tensor:
        return self.post_self_attn_layernorm(x)  # type: ignore[no-any-return]

    def after_mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self.post_mlp_layernorm(x)  # type: ignore[no-any-return]


class Glm4Backbone(Backbone):
    """The GLM backbone with sandwich norms."""

    layer_class = Glm4DecoderLayer


class Glm4vBackbone(Glm4Backbone):
    """The language model of a GLM-4.1V: positions [3, T] and features come with the step."""

    prefix = "model.language_model"
