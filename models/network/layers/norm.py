"""RMSNorm as the reference rounds: in float32, to the input's dtype, then times the weight."""

from __future__ import annotations

import torch
from torch import nn


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps) over the last dimension (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.empty(size, dtype=dtype, device=device), requires_grad=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., size] -> [..., size], same dtype."""
        wide = x.float()
        # The norm reads once and writes one number a row; a squared copy of the activations would
        # leave the caches.
        mean_square: torch.Tensor = (
            torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        )
        scale: torch.Tensor = mean_square.add_(self.eps).rsqrt_()
        if wide is x:
            return torch.mul(x, scale).mul_(self.weight)
        return wide.mul_(scale).to(x.dtype).mul_(self.weight)
