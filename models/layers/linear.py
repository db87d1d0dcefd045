"""Linear layers, each of which knows which checkpoint tensors fill which part of its weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from models.layers import linear_packed
from models.weights import Targets


class Linear(nn.Module):
    """y = x W^T (+ b), W: [out_features, in_features]."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, dtype=dtype, device=device), requires_grad=False
        )
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False)
        self.packed: torch.Tensor | None = None

    def pack(self) -> None:
        """Once loaded: exchanges the weight for its packed form. Nothing can be loaded afterwards."""
        self.packed = linear_packed.pack(self.weight)
        self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)

    def targets(self, name: str) -> Targets:
        """Checkpoint names under `name` and the views that they fill."""
        found: Targets = {f"{name}.weight": self.weight}
        if self.bias is not None:
            found[f"{name}.bias"] = self.bias
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [rows, in_features] -> [rows, out_features]."""
        if self.packed is not None:
            return linear_packed.linear(x, self.packed, self.bias)
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


class GatedLinear(Linear):
    """silu(x G^T) * (x U^T) from one weight: its first half is the gate G, the second is U."""

    def __init__(self, in_features: int, out_features: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(in_features, 2 * out_features, bias=False, dtype=dtype, device=device)
        self.packed_up: torch.Tensor | None = None

    def pack(self) -> None:
        gate, up = self.weight.chunk(2)
        self.packed, self.packed_up = linear_packed.pack(gate), linear_packed.pack(up)
        self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [rows, in_features] -> [rows, out_features]."""
        if self.packed is not None and self.packed_up is not None:
            return linear_packed.gated(x, self.packed, self.packed_up)
        gate, up = F.linear(x, self.weight).chunk(2, dim=-1)
        return F.silu(gate).mul_(up)


def pack_linears(module: nn.Module) -> None:
    """Packs every linear layer below a loaded module, one weight at a time."""
    for layer in module.modules():
        if isinstance(layer, Linear):
            layer.pack()
