"""Rotary position embedding of GLM: partial and interleaved.

Only the first `rotary_dim` dimensions of a head turn, and they turn in neighbouring pairs (2j, 2j+1), unlike the
half-split form of most other models. Knows nothing of M-RoPE's position ids.
"""

from __future__ import annotations

import math

import torch

from models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig) -> tuple[torch.Tensor, float]:
    """float32 [rotary_dim / 2] radians per position, and the factor on cos and sin.

    default: theta^(-2j / rotary_dim). linear: the same over `factor`. yarn: arXiv 2309.00071, section 3.2 (NTK by
    parts) with the attention factor of section 3.4.
    """
    half = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
    plain = 1.0 / rope.rope_theta**half
    if rope.rope_type == "default":
        return plain, 1.0
    if rope.rope_type == "linear":
        return plain / rope.factor, 1.0
    low, high = _correction_range(rope)
    ramp = ((torch.arange(rope.rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp), _attention_factor(rope)


def _correction_range(rope: RopeConfig) -> tuple[float, float]:
    """Between these pair indices YaRN blends from extrapolation to interpolation."""

    def pair_with(rotations: float) -> float:
        wavelengths = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return rope.rotary_dim * math.log(wavelengths) / (2 * math.log(rope.rope_theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    return low, high if high != low else high + 0.001


def _attention_factor(rope: RopeConfig) -> float:
    def scale(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


class RopeTable:
    """cos and sin by position, grown on demand in float32 and handed out in the activations' dtype."""

    def __init__(self, rope: RopeConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        self._inv_freq, self._factor = inverse_frequencies(rope)
        self._dtype, self._device = dtype, device
        self._cos = self._sin = torch.empty(0, rope.rotary_dim // 2, dtype=dtype, device=device)

    def lookup(self, positions: torch.Tensor, max_position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """positions: [tokens] int64, none above `max_position` -> cos, sin: [tokens, 1, rotary_dim / 2]."""
        if max_position >= self._cos.shape[0]:
            self._grow(max_position + 1)
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)

    def _grow(self, length: int) -> None:
        length = 1 << (length - 1).bit_length()
        angles = torch.arange(length, dtype=torch.float32)[:, None] * self._inv_freq
        self._cos = (angles.cos() * self._factor).to(self._device, self._dtype)
        self._sin = (angles.sin() * self._factor).to(self._device, self._dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the leading dimensions of every head of x [tokens, heads, head_dim]; cos, sin: [tokens, 1, rotary / 2]."""
    rotary_dim = 2 * cos.shape[-1]
    even, odd = x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2]
    out = torch.empty_like(x)
    out[..., 0:rotary_dim:2] = even * cos - odd * sin
    out[..., 1:rotary_dim:2] = odd * cos + even * sin
    out[..., rotary_dim:] = x[..., rotary_dim:]
    return out
