"""GLM-4-0414, GLM-Z1 and GLM-4.1V: GLM whose sublayers' outputs are normed before they are added.

`post_attention_layernorm` is the norm before the MLP, as in GLM; `post_self_attn_layernorm` is the
one after attention.
"""

from __future__ import annotations

import torch

from glm_batch.models.network.glm import Backbone, DecoderLayer
from glm_batch.models.network.layers.norm import RMSNorm


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
