"""Linear layers, each of which knows which checkpoint tensors fill which part of its weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from models.weights import Targets


class Linear(nn.Module):
    """y = x W^T (+ b), W: [out_features, in_features]."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, dtype=dtype, device=device), requires_grad=False
        )
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False)

    def targets(self, name: str) -> Targets:
        """Checkpoint names under `name` and the views that they fill."""
        found: Targets = {f"{name}.weight": self.weight}
        if self.bias is not None:
            found[f"{name}.bias"] = self.bias
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in_features] -> [..., out_features]."""
        return F.linear(x, self.weight, self.bias)


class QKVLinear(Linear):
    """The query, key and value projections as one product: rows are [all q heads | all k heads | all v heads]."""

    def __init__(
        self,
        in_features: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
        super().__init__(in_features, sum(self.sizes), bias=bias, dtype=dtype, device=device)

    def targets(self, name: str) -> Targets:
        """`name` is the attention module: its q_proj, k_proj and v_proj each fill their rows."""
        found: Targets = {}
        for kind in ("weight", "bias"):
            fused = getattr(self, kind)
            if fused is not None:
                for part, view in zip(("q_proj", "k_proj", "v_proj"), torch.split(fused, self.sizes), strict=True):
                    found[f"{name}.{part}.{kind}"] = view
        return found

    def forward_qk_v(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [tokens, in_features] -> q and k side by side [tokens, q + kv size], v [tokens, kv size]."""
        q_size, k_size, v_size = self.sizes
        qk, v = torch.split(self(x), [q_size + k_size, v_size], dim=-1)
        return qk, v

    def forward_kv(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values alone, for rows whose output nobody wants."""
        q_size = self.sizes[0]
        bias = None if self.bias is None else self.bias[q_size:]
        k, v = torch.split(F.linear(x, self.weight[q_size:], bias), self.sizes[1:], dim=-1)
        return k, v

    def forward_q(self, x: torch.Tensor) -> torch.Tensor:
        """Queries alone."""
        q_size = self.sizes[0]
        return F.linear(x, self.weight[:q_size], None if self.bias is None else self.bias[:q_size])
