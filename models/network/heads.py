"""Heads over any backbone: what the hidden states of the wanted rows become.

A head knows its checkpoint names and its own shape, nothing of how rows were chosen or what becomes
of the numbers.
"""

from __future__ import annotations

import torch
from torch import nn

from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.checkpoint.weights import Target, Targets
from glm_batch.models.network.glm import Backbone
from glm_batch.models.network.layers.linear import Linear, cut
from glm_batch.models.network.layers.parallel import SINGLE, ParallelGroup


class CausalLMHead(nn.Module):
    """Vocabulary logits; shares the embedding's weight when the checkpoint ties them."""

    def __init__(
        self,
        config: ModelConfig,
        backbone: Backbone,
        *,
        dtype: torch.dtype,
        device: torch.device,
        group: ParallelGroup = SINGLE,
    ) -> None:
        super().__init__()
        self.tied = config.tie_word_embeddings
        rows = -(-config.vocab_size // group.size)
        self.lm_head = Linear(config.hidden_size, rows, bias=False, dtype=dtype, device=device)
        if self.tied:
            self.lm_head.weight = backbone.embed_tokens.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [W, H] -> float32 [W, vocab_size]."""
        return self.lm_head(hidden).float()  # type: ignore[no-any-return]

    def pair_logprobs(
        self, hidden: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """log P(tokens[i]) at hidden[rows[i]], float32 [pairs]: the whole vocabulary counts."""
        logits: torch.Tensor = self(hidden)
        return logits[rows, tokens] - logits.logsumexp(-1)[rows]

    def targets(self) -> Targets:
        return {} if self.tied else {"lm_head.weight": self._target()}

    def copies(self) -> Targets:
        """Some checkpoints store a tied weight a second time."""
        return {"lm_head.weight": self._target()} if self.tied else {}

    def _target(self) -> Target:
        return self.lm_head.weight


class ShardedLMHead(CausalLMHead):
    """Each rank has the logits of some rows of the vocabulary, as of the embedding's."""

    def __init__(
        self,
        config: ModelConfig,
        backbone: Backbone,
        *,
        dtype: torch.dtype,
        device: torch.device,
        group: ParallelGroup,
    ) -> None:
        super().__init__(config, backbone, dtype=dtype, device=device, group=group)
        self.group, self.part = group, group.padded_part(config.vocab_size)
        self.lm_head.weight[self.part.size :] = 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [W, H] -> float32 [W, vocab_size] on rank 0, which asks; [W, 0] on the others."""
        gathered = self.group.gather(self.lm_head(hidden))
        if not gathered:
            return hidden.new_empty(hidden.shape[0], 0, dtype=torch.float32)
        return torch.cat(gathered, dim=-1)[:, : self.part.total].float()

    def pair_logprobs(
        self, hidden: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """As above, on every rank: a few numbers of each row are exchanged, its logits are not."""
        logits = self.lm_head(hidden).float()
        logits[:, self.part.size :] = float("-inf")
        largest = self.group.all_reduce(logits.amax(-1), "max")
        total = self.group.all_reduce((logits - largest[:, None]).exp_().sum(-1))
        own = tokens - self.part.start
        elsewhere = (own < 0) | (own >= self.part.size)
        picked = logits[rows, own.masked_fill_(elsewhere, 0)].masked_fill_(elsewhere, 0.0)
        return self.group.all_reduce(picked) - (largest + total.log_())[rows]

    def _target(self) -> Target:
        return cut(self.lm_head.weight[: self.part.size], self.part)


class ClassificationHead(nn.Module):
    """Class logits for sequence or token classification; only the latter may have a bias."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        bias = config.head == "token_classification" and config.token_classification_bias
        self.score = Linear(
            config.hidden_size, config.num_labels, bias=bias, dtype=dtype, device=device
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [W, H] -> float32 [W, num_labels]."""
        return self.score(hidden).float()  # type: ignore[no-any-return]

    def targets(self) -> Targets:
        return self.score.targets("score")

    def copies(self) -> Targets:
        return {}
