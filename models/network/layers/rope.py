"""Rotary position embedding of GLM: partial and interleaved.

Only the first `rotary_dim` dimensions of a head turn, and they turn in neighbouring pairs (2j,
2j+1), unlike the half-split form of most other models. With M-RoPE each pair follows one of three
position axes; where the positions come from is not known here.
"""

from __future__ import annotations

import math

import torch

from glm_batch.models.checkpoint.model_config import RopeConfig


def inverse_frequencies(rope: RopeConfig) -> tuple[torch.Tensor, float]:
    """float32 [rotary_dim / 2] radians per position, and the factor on cos and sin.

    default: theta^(-2j / rotary_dim). linear: the same over `factor`. yarn: arXiv 2309.00071,
    section 3.2 (NTK by parts) with the attention factor of section 3.4.
    """
    half = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
    plain = 1.0 / rope.rope_theta**half
    if rope.rope_type == "default":
        return plain, 1.0
    if rope.rope_type == "linear":
        return plain / rope.factor, 1.0
    low, high = _correction_range(rope)
    ramp = ((torch.arange(rope.rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(
        0, 1
    )
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


def axis_of_pair(mrope_section: tuple[int, ...]) -> list[int]:
    """The position axis (0 time, 1 height, 2 width) of each pair: i % 3 for section i."""
    return [i % 3 for i, count in enumerate(mrope_section) for _ in range(count)]


class RopeTable:
    """Turns by position as complex numbers cos + i sin, grown on demand."""

    def __init__(self, rope: RopeConfig, *, device: torch.device) -> None:
        self._inv_freq, self._factor = inverse_frequencies(rope)
        self._turns = torch.empty(0, rope.rotary_dim // 2, dtype=torch.complex64, device=device)
        self._axes = torch.tensor(
            axis_of_pair(rope.mrope_section), dtype=torch.int64, device=device
        )
        self._pairs = torch.arange(rope.rotary_dim // 2, device=device)

    def lookup(self, positions: torch.Tensor, max_position: int) -> torch.Tensor:
        """positions int64 [tokens] or [3, tokens] -> complex64 [tokens, 1, rotary_dim / 2].

        None is above `max_position`.
        Frequencies do not start anew with each section: three equal axes are the same as one.
        """
        if max_position >= self._turns.shape[0]:
            length = 1 << max_position.bit_length()
            angles = torch.arange(length, dtype=torch.float32)[:, None] * self._inv_freq
            turns = torch.complex(angles.cos() * self._factor, angles.sin() * self._factor)
            self._turns = turns.to(self._turns.device)
        if positions.ndim == 1:
            return self._turns[positions].unsqueeze(1)
        return self._turns[positions.T[:, self._axes], self._pairs].unsqueeze(1)


def rotate_(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turns the leading dimensions of each head of x [tokens, heads, D] in place, in float32.

    turns: complex64 [tokens, 1, rotary_dim / 2]. A neighbouring pair is one complex number: (a +
    ib)(cos + i sin).
    """
    leading = x[..., : 2 * turns.shape[-1]]
    pairs = torch.view_as_complex(leading.float().reshape(*x.shape[:-1], turns.shape[-1], 2))
    leading.copy_(torch.view_as_real(pairs * turns).flatten(-2))
    return x
