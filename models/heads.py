"""Heads over any backbone: what the hidden states of the wanted rows become.

A head knows its checkpoint names and its own shape, nothing of how rows were chosen or what becomes of the numbers.
"""

from __future__ import annotations

import torch
from torch import nn

from models.config import ModelConfig
from models.glm import Backbone
from models.layers.linear import Linear
from models.weights import Targets


class CausalLMHead(nn.Module):
    """Vocabulary logits; shares the embedding's weight when the checkpoint ties them."""

    def __init__(self, config: ModelConfig, backbone: Backbone, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.tied = config.tie_word_embeddings
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype, device=device)
        if self.tied:
            self.lm_head.weight = backbone.embed_tokens.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [W, H] -> float32 [W, vocab_size]."""
        return self.lm_head(hidden).float()  # type: ignore[no-any-return]

    def targets(self) -> Targets:
        return {} if self.tied else {"lm_head.weight": self.lm_head.weight}

    def copies(self) -> Targets:
        """Some checkpoints store a tied weight a second time."""
        return {"lm_head.weight": self.lm_head.weight} if self.tied else {}


class ClassificationHead(nn.Module):
    """Class logits for sequence or token classification; only the latter may have a bias."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        bias = config.head == "token_classification" and config.token_classification_bias
        self.score = Linear(config.hidden_size, config.num_labels, bias=bias, dtype=dtype, device=device)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [W, H] -> float32 [W, num_labels]."""
        return self.score(hidden).float()  # type: ignore[no-any-return]

    def targets(self) -> Targets:
        return self.score.targets("score")

    def copies(self) -> Targets:
        return {}
