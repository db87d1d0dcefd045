"""Token embedding: ids to vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from glm_batch.models.checkpoint.weights import Target
from glm_batch.models.network.layers.linear import cut
from glm_batch.models.network.layers.parallel import ParallelGroup


class Embedding(nn.Module):
    """A table [vocab_size, hidden_size]; ids outside it are the caller's mistake."""

    def __init__(
        self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(vocab_size, hidden_size, dtype=dtype, device=device), requires_grad=False
        )

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids: [tokens] int64 -> [tokens, hidden_size]."""
        return F.embedding(input_ids, self.weight)

    def target(self) -> Target:
        """What the stored table fills."""
        return self.weight


class ShardedEmbedding(Embedding):
    """Each rank has equally many rows of the table: those missing at the end are zeros."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        group: ParallelGroup,
    ) -> None:
        super().__init__(-(-vocab_size // group.size), hidden_size, dtype=dtype, device=device)
        self.group, self.part = group, group.padded_part(vocab_size)
        self.weight[self.part.size :] = 0

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids of other ranks' rows give zeros here and their vectors there; the sum is complete."""
        own = input_ids - self.part.start
        elsewhere = (own < 0) | (own >= self.part.size)
        found = F.embedding(own.masked_fill_(elsewhere, 0), self.weight)
        return self.group.all_reduce(found.masked_fill_(elsewhere[:, None], 0))

    def target(self) -> Target:
        return cut(self.weight[: self.part.size], self.part)


def embedding(
    vocab_size: int,
    hidden_size: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    group: ParallelGroup,
) -> Embedding:
    """The table, or this rank's rows of it."""
    if group.size == 1:
        return Embedding(vocab_size, hidden_size, dtype=dtype, device=device)
    return ShardedEmbedding(vocab_size, hidden_size, dtype=dtype, device=device, group=group)
