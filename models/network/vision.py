"""The vision tower of GLM-4.1V, packed over all media of a step.

Legend: N patches, F frames (an image is one, a video has one for each temporal group), D
hidden_size, C channels, T temporal_patch_size, p patch_size, m spatial_merge_size. Patches stand in
storage order: frame by frame, within a frame merge block by merge block (m x m patches each, row by
row).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import nn

from glm_batch.models.byte_cache import ByteCache
from glm_batch.models.checkpoint.media_config import Normalization
from glm_batch.models.checkpoint.model_config import VisionConfig
from glm_batch.models.checkpoint.weights import Targets
from glm_batch.models.network.layers.linear import GatedLinear, Linear
from glm_batch.models.network.layers.norm import RMSNorm

Grid = tuple[int, int, int]  # frames, rows of patches, columns of patches
TABLE_BYTES = 128 << 20  # position tables of the grids seen lately
LAYER_NORM_EPS = 1e-5
MIDDLE = 128  # of uint8: pixels are shifted by it, so that low precision rounds numbers around 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameRun:
    """`frames` neighbouring frames of h x w patches each; their rows begin at `start`."""

    start: int
    frames: int
    h: int
    w: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.frames * self.h * self.w)


@dataclass(frozen=True, slots=True, kw_only=True)
class GridTables:
    """What depends on a frame's grid alone, in storage order.

    positions: [h * w, D], to be added. cos, sin: float32 [h * w, head_dim / 2].
    """

    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    @property
    def num_bytes(self) -> int:
        return self.positions.nbytes + self.cos.nbytes + self.sin.nbytes


Turns = tuple[torch.Tensor, torch.Tensor]  # cos and sin, each float32 [N, 1, 1, head_dim / 2]


class PatchEmbed(nn.Module):
    """A patch of T frames to a vector: the checkpoint's convolution as a matrix product."""

    def __init__(self, config: VisionConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.shape = (
            config.hidden_size,
            config.in_channels,
            config.temporal_patch_size,
            config.patch_size**2,
        )
        values = config.temporal_patch_size * config.frame_values
        self.proj = Linear(values, config.hidden_size, bias=True, dtype=dtype, device=device)
        self.kernel = (*self.shape[:3], config.patch_size, config.patch_size)
        self.dtype = dtype
        # values of a patch -> float32 weight, bias
        self.folded: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalised pixel_values [N, C * T * p * p] -> [N, D]."""
        return self.proj(pixel_values.to(self.dtype))  # type: ignore[no-any-return]

    def forward_uint8(self, patches: torch.Tensor) -> torch.Tensor:
        """uint8 [N, C * p * p] (a frame for all T) or [N, C * T * p * p] -> [N, D], once folded."""
        weight, bias = self.folded[patches.shape[1]]
        return F.linear(patches.to(torch.float32).sub_(MIDDLE), weight, bias).to(self.dtype)

    def fold(self, image: Normalization, video: Normalization) -> None:
        """Once loaded: makes the weights that take uint8, in float32, for they cost nothing."""
        weight, bias = self.proj.weight.view(self.shape), self.proj.bias
        assert bias is not None
        video_weight, video_bias = fold_normalization(weight, bias, video)
        image_weight, image_bias = fold_normalization(weight, bias, image)
        self.folded = {
            video_weight[0].numel(): (video_weight.flatten(1).float(), video_bias.float()),
            image_weight[0, :, 0].numel(): (
                image_weight.sum(dim=2).flatten(1).float(),
                image_bias.float(),
            ),
        }

    def targets(self, name: str) -> Targets:
        return {
            f"{name}.proj.weight": self.proj.weight.view(self.kernel),
            f"{name}.proj.bias": _bias(self.proj),
        }


def fold_normalization(
    weight: torch.Tensor, bias: torch.Tensor, normalization: Normalization
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [D, C, T, p * p], bias [D] for normalised pixels -> float64 for pixels minus MIDDLE.

    (x * r - mean) / std = (x - MIDDLE) * r / std + (MIDDLE * r - mean) / std, and the second part
    goes to the bias.
    """
    std = torch.tensor(normalization.std, dtype=torch.float64, device=weight.device).view(-1, 1, 1)
    mean = torch.tensor(normalization.mean, dtype=torch.float64, device=weight.device).view(
        -1, 1, 1
    )
    wide = weight.double() / std
    shift = wide * (MIDDLE * normalization.rescale_factor - mean)
    return wide * normalization.rescale_factor, bias.double() + shift.sum(dim=(1, 2, 3))


class VisionAttention(nn.Module):
    """Every patch of a frame sees every other one of that frame and nothing else."""

    def __init__(self, config: VisionConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_heads, self.head_dim = config.num_heads, hidden // config.num_heads
        self.qkv = Linear(
            hidden, 3 * hidden, bias=config.attention_bias, dtype=dtype, device=device
        )
        self.proj = Linear(hidden, hidden, bias=False, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor, turns: Turns, runs: Sequence[FrameRun]) -> torch.Tensor:
        """x [N, D] -> [N, D]."""
        qkv = self.qkv(x).view(-1, 3, self.num_heads, self.head_dim)
        q, k = rotate_halves(qkv[:, :2], turns).unbind(1)  # each [N, heads, head_dim]
        v = qkv[:, 2]
        out = torch.empty_like(q)
        for run in runs:
            shape = (run.frames, run.h * run.w, self.num_heads, self.head_dim)
            frame_q, frame_k, frame_v = (
                tensor[run.rows].view(shape).transpose(1, 2) for tensor in (q, k, v)
            )
            # [frames, heads, h * w, head_dim]
            seen = F.scaled_dot_product_attention(frame_q, frame_k, frame_v)
            out[run.rows].view(shape).copy_(seen.transpose(1, 2))
        return self.proj(out.flatten(1))  # type: ignore[no-any-return]

    def targets(self, name: str) -> Targets:
        return self.qkv.targets(f"{name}.qkv") | self.proj.targets(f"{name}.proj")


def rotate_halves(x: torch.Tensor, turns: Turns) -> torch.Tensor:
    """x [N, 2, heads, head_dim]: dimension j turns with j + head_dim / 2, in float32."""
    cos, sin = turns
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class VisionMLP(nn.Module):
    """down(silu(gate(x)) * up(x)); the checkpoint stores gate and up apart."""

    def __init__(self, size: int, inner: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.gate_up = GatedLinear(size, inner, dtype=dtype, device=device)
        self.down_proj = Linear(inner, size, bias=False, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_up(x))  # type: ignore[no-any-return]

    def targets(self, name: str) -> Targets:
        gate, up = self.gate_up.weight.chunk(2)
        found: Targets = {f"{name}.gate_proj.weight": gate, f"{name}.up_proj.weight": up}
        return found | self.down_proj.targets(f"{name}.down_proj")


class VisionBlock(nn.Module):
    """Pre-norm: x += attention(norm1(x)); x += mlp(norm2(x))."""

    def __init__(self, config: VisionConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.norm1 = RMSNorm(hidden, eps, dtype=dtype, device=device)
        self.norm2 = RMSNorm(hidden, eps, dtype=dtype, device=device)
        self.attn = VisionAttention(config, dtype=dtype, device=device)
        self.mlp = VisionMLP(hidden, config.out_hidden_size, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor, turns: Turns, runs: Sequence[FrameRun]) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), turns, runs)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]

    def targets(self, name: str) -> Targets:
        norms = {f"{name}.{norm}.weight": getattr(self, norm).weight for norm in ("norm1", "norm2")}
        return norms | self.attn.targets(f"{name}.attn") | self.mlp.targets(f"{name}.mlp")


class Merger(nn.Module):
    """A merge block's vector to the language model's space; no residual."""

    def __init__(self, config: VisionConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        size = config.out_hidden_size
        self.proj = Linear(size, size, bias=False, dtype=dtype, device=device)
        self.norm = nn.LayerNorm(
            size, eps=LAYER_NORM_EPS, dtype=dtype, device=device
        ).requires_grad_(False)
        self.mlp = VisionMLP(size, config.intermediate_size, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(F.gelu(self.norm(self.proj(x))))  # type: ignore[no-any-return]

    def targets(self, name: str) -> Targets:
        norm = f"{name}.post_projection_norm"
        found: Targets = {f"{norm}.weight": self.norm.weight, f"{norm}.bias": self.norm.bias}
        return found | self.proj.targets(f"{name}.proj") | self.mlp.targets(name)


class VisionTower(nn.Module):
    """Patches of any media -> one feature for each merge block, in the same order."""

    prefix = "model.visual"  # of the checkpoint's names

    def __init__(self, config: VisionConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        hidden, merge = config.hidden_size, config.spatial_merge_size
        self.config = config
        self.patch_embed = PatchEmbed(config, dtype=dtype, device=device)
        self.position_embedding = nn.Parameter(
            torch.empty(config.grid_size**2, hidden, dtype=dtype, device=device),
            requires_grad=False,
        )
        self.post_conv_layernorm = RMSNorm(hidden, config.rms_norm_eps, dtype=dtype, device=device)
        self.blocks = nn.ModuleList(
            VisionBlock(config, dtype=dtype, device=device) for _ in range(config.depth)
        )
        self.post_layernorm = RMSNorm(hidden, config.rms_norm_eps, dtype=dtype, device=device)
        self.downsample = Linear(
            merge**2 * hidden, config.out_hidden_size, bias=True, dtype=dtype, device=device
        )
        self.merger = Merger(config, dtype=dtype, device=device)
        self._tables: ByteCache[GridTables] = ByteCache(TABLE_BYTES)

    def forward(self, pixel_values: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Normalised pixel_values [N, C * T * p * p] of these grids -> [N / m^2, out_hidden]."""
        return self.encode(self.patch_embed(pixel_values), grids)

    def forward_uint8(self, patches: Sequence[torch.Tensor], grids: Sequence[Grid]) -> torch.Tensor:
        """The same from uint8 patches; see PatchEmbed.forward_uint8 for their widths."""
        return self.encode(
            torch.cat([self.patch_embed.forward_uint8(tensor) for tensor in patches]), grids
        )

    def encode(self, x: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Embedded patches [N, D] -> [N / m^2, out_hidden]. Raises ValueError for other grids."""
        runs = frame_runs(grids)
        if len(x) != (runs[-1].rows.stop if runs else 0):
            raise ValueError(f"{len(x)} patches do not fill the grids {list(grids)}")
        tables = [self._grid_tables(run.h, run.w) for run in runs]
        x = self.post_conv_layernorm(x)
        for run, table in zip(runs, tables, strict=True):
            x[run.rows].view(run.frames, -1, x.shape[1]).add_(table.positions)
        turns = (
            _repeated(runs, [table.cos for table in tables]),
            _repeated(runs, [table.sin for table in tables]),
        )
        for block in self.blocks:
            x = block(x, turns, runs)
        x = self.post_layernorm(x).view(-1, self.downsample.in_features)
        return self.merger(self.downsample(x))  # type: ignore[no-any-return]

    def _grid_tables(self, h: int, w: int) -> GridTables:
        tables = self._tables.get((h, w))
        if tables is None:
            tables = self._make_tables(h, w)
            self._tables.put((h, w), tables, tables.num_bytes)
        return tables

    def _make_tables(self, h: int, w: int) -> GridTables:
        config, device = self.config, self.position_embedding.device
        size, merge = config.grid_size, config.spatial_merge_size
        table = self.position_embedding.float().view(size, size, -1)
        positions = in_storage_order(interpolate(table, h, w), merge).to(
            self.position_embedding.dtype
        )
        angles = axial_angles(h, w, config.hidden_size // config.num_heads, config.rope_theta)
        angles = in_storage_order(angles, merge).to(device)
        return GridTables(positions=positions, cos=angles.cos(), sin=angles.sin())

    def targets(self) -> Targets:
        """Checkpoint names of the whole tower and the views that they fill."""
        config, name = self.config, self.prefix
        merge = config.spatial_merge_size
        downsample = self.downsample.weight.view(-1, merge, merge, config.hidden_size).permute(
            0, 3, 1, 2
        )
        found: Targets = {
            f"{name}.embeddings.position_embedding.weight": self.position_embedding,
            f"{name}.post_conv_layernorm.weight": self.post_conv_layernorm.weight,
            f"{name}.post_layernorm.weight": self.post_layernorm.weight,
            f"{name}.downsample.weight": downsample,
            f"{name}.downsample.bias": _bias(self.downsample),
        }
        found |= self.patch_embed.targets(f"{name}.patch_embed") | self.merger.targets(
            f"{name}.merger"
        )
        for i, block in enumerate(self.blocks):
            found |= block.targets(f"{name}.blocks.{i}")  # type: ignore[operator]
        return found


def frame_runs(grids: Iterable[Grid]) -> list[FrameRun]:
    """Neighbouring frames of one size, of whatever media, as runs: each is one attention."""
    runs: list[FrameRun] = []
    start = 0
    for (h, w), group in groupby(grids, key=lambda grid: grid[1:]):
        run = FrameRun(start=start, frames=sum(grid[0] for grid in group), h=h, w=w)
        start = run.rows.stop
        runs.append(run)
    return runs


def interpolate(table: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """table float32 [size, size, D] -> [h, w, D] at the patches' centres, bicubic."""
    planes = table.permute(2, 0, 1)[None]
    return F.interpolate(planes, size=(h, w), mode="bicubic", align_corners=False)[0].permute(
        1, 2, 0
    )


def axial_angles(h: int, w: int, head_dim: int, theta: float) -> torch.Tensor:
    """float32 [h, w, head_dim / 2]: the row, then the column, times the same frequencies."""
    half = head_dim // 2
    frequencies = 1.0 / theta ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
    rows = torch.arange(h, dtype=torch.float32)[:, None, None] * frequencies
    columns = torch.arange(w, dtype=torch.float32)[None, :, None] * frequencies
    return torch.cat((rows.expand(h, w, -1), columns.expand(h, w, -1)), dim=-1)


def in_storage_order(grid: torch.Tensor, merge: int) -> torch.Tensor:
    """[h, w, size] by rows and columns -> [h * w, size] merge block by merge block."""
    h, w, size = grid.shape
    blocks = grid.reshape(h // merge, merge, w // merge, merge, size)
    return blocks.transpose(1, 2).reshape(h * w, size)


def _repeated(runs: Sequence[FrameRun], tables: Sequence[torch.Tensor]) -> torch.Tensor:
    """Each run's table [h * w, size] once for each of its frames -> [N, 1, 1, size]."""
    rows = [table.repeat(run.frames, 1) for run, table in zip(runs, tables, strict=True)]
    return torch.cat(rows)[:, None, None]


def _bias(layer: Linear) -> torch.Tensor:
    assert layer.bias is not None
    return layer.bias
