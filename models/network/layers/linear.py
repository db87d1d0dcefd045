"""Linear layers, each of which knows which checkpoint tensors fill which part of its weight.

In a parallel group a layer has its rank's rows (columns, heads) of the stored weight; sizes are
given as stored. On CPUs weights can be packed: in oneDNN's own layout, with the gate's activation
inside the products. Measured with bfloat16 on 2 cores (Zen 5) against F.linear: 1.05 to 1.25 times
as fast at 256 rows and more, 1.2 to 1.6 times at 16 and 64, because the weight need not be
rearranged in every call. Same values; the gated product rounds less often.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from glm_batch.models.checkpoint.weights import Cut, Target, Targets
from glm_batch.models.network.layers.parallel import SINGLE, ParallelGroup, Part


class Linear(nn.Module):
    """y = x W^T (+ b), W: [out_features, in_features]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, dtype=dtype, device=device), requires_grad=False
        )
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(
                torch.empty(out_features, dtype=dtype, device=device), requires_grad=False
            )
        self.packed: torch.Tensor | None = None

    def pack(self) -> None:
        """Once loaded: exchanges the weight for its packed form; nothing can be loaded then."""
        self.packed = _pack(self.weight)
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
            return _packed_linear(x, self.packed, self.bias)
        return F.linear(x, self.weight, self.bias)


class RowLinear(Linear):
    """A linear layer whose input is dealt to the ranks, which add up their products."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        group: ParallelGroup = SINGLE,
    ) -> None:
        self.part, self.group = group.part(in_features), group
        super().__init__(self.part.size, out_features, bias=False, dtype=dtype, device=device)

    def targets(self, name: str) -> Targets:
        return {f"{name}.weight": cut(self.weight, self.part, dim=1)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: this rank's columns [rows, its share of in_features] -> [rows, out_features]."""
        return self.group.all_reduce(super().forward(x))


class QKVLinear(Linear):
    """Queries, keys and values as one product: rows are [all q heads | k heads | v heads].

    A rank has the rows of its own heads; where there are more ranks than kv heads, several have the
    same one.
    """

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
        group: ParallelGroup = SINGLE,
    ) -> None:
        self.heads, self.kv_heads = group.part(num_heads), group.kv_part(num_kv_heads)
        self.parts = [heads.times(head_dim) for heads in (self.heads, self.kv_heads, self.kv_heads)]
        self.sizes = [part.size for part in self.parts]
        super().__init__(in_features, sum(self.sizes), bias=bias, dtype=dtype, device=device)

    def targets(self, name: str) -> Targets:
        """`name` is the attention module: its q_proj, k_proj and v_proj each fill their rows."""
        found: Targets = {}
        for kind in ("weight", "bias"):
            fused = getattr(self, kind)
            if fused is not None:
                views = torch.split(fused, self.sizes)
                for stored, view, part in zip(
                    ("q_proj", "k_proj", "v_proj"), views, self.parts, strict=True
                ):
                    found[f"{name}.{stored}.{kind}"] = cut(view, part)
        return found

    def forward_qk_v(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [tokens, in_features] -> q and k side by side, and v: [tokens, their sizes]."""
        q_size, k_size, v_size = self.sizes
        qk, v = torch.split(self(x), [q_size + k_size, v_size], dim=-1)
        return qk, v


class GatedLinear(Linear):
    """silu(x G^T) * (x U^T), G and U being the halves of one weight. A rank has rows of both."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        group: ParallelGroup = SINGLE,
    ) -> None:
        self.part = group.part(out_features)
        super().__init__(in_features, 2 * self.part.size, bias=False, dtype=dtype, device=device)
        self.packed_up: torch.Tensor | None = None

    def targets(self, name: str) -> Targets:
        """Rows 0 to out_features - 1 of the stored weight are the gate, the rest is U."""
        part = self.part
        if part.size == part.total:
            return {f"{name}.weight": self.weight}
        gate, up = self.weight.chunk(2)
        places = (
            slice(start, start + part.size) for start in (part.start, part.total + part.start)
        )
        pieces = tuple(zip(((place,) for place in places), (gate, up), strict=True))
        return {f"{name}.weight": Cut(shape=(2 * part.total, self.in_features), pieces=pieces)}

    def pack(self) -> None:
        gate, up = self.weight.chunk(2)
        self.packed, self.packed_up = _pack(gate), _pack(up)
        self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [rows, in_features] -> [rows, out_features]."""
        if self.packed is not None and self.packed_up is not None:
            return _packed_gated(x, self.packed, self.packed_up)
        gate, up = F.linear(x, self.weight).chunk(2, dim=-1)
        return F.silu(gate).mul_(up)


def cut(view: torch.Tensor, part: Part, dim: int = 0) -> Target:
    """What fills `view`: the stored tensor, or in dimension `dim` this part of it."""
    if part.size == part.total:
        return view
    shape = (*view.shape[:dim], part.total, *view.shape[dim + 1 :])
    place = (*[slice(None)] * dim, slice(part.start, part.start + part.size))
    return Cut(shape=shape, pieces=((place, view),))


def pack_linears(module: nn.Module) -> None:
    """Packs every linear layer below a loaded module, one weight at a time."""
    for layer in module.modules():
        if isinstance(layer, Linear):
            layer.pack()


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """True where packing pays: low precision on a CPU whose oneDNN has products of it."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _pack(weight: torch.Tensor) -> torch.Tensor:
    """weight [out_features, in_features] -> an opaque copy in oneDNN's own layout."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return packed


def _packed_linear(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [rows, in_features] -> [rows, out_features]."""
    if not x.shape[0]:
        return x.new_empty(0, packed.shape[0])
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


def _packed_gated(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(x gate^T) * (x up^T), both packed; x [rows, in_features] -> [rows, out_features]."""
    if not x.shape[0]:
        return x.new_empty(0, gate.shape[0])
    activated = torch.ops.mkldnn._linear_pointwise(x, gate, None, "swish", [], "")
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, activated, up, None, "mul")
    return y
