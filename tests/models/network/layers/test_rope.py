"""Rotary embedding: against the formula written out number by number, and transformers'
frequencies.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from glm_batch.models.checkpoint.model_config import RopeConfig
from glm_batch.models.network.layers.rope import (
    RopeTable,
    axis_of_pair,
    inverse_frequencies,
    rotate_,
)

CPU = torch.device("cpu")
PLAIN = RopeConfig(rope_type="default", rope_theta=1e4, rotary_dim=8)


def turned(x: torch.Tensor, positions: list[int], rope: RopeConfig) -> torch.Tensor:
    return rotate_(
        x.clone(), RopeTable(rope, device=CPU).lookup(torch.tensor(positions), max(positions))
    )


def by_formula(x: torch.Tensor, positions: list[int], rope: RopeConfig) -> torch.Tensor:
    """Pair (2j, 2j + 1) of every head turns by position * theta^(-2j / rotary_dim); the other
    dimensions stay.
    """
    out = x.double()
    for row, position in enumerate(positions):
        for head in range(x.shape[1]):
            for j in range(rope.rotary_dim // 2):
                angle = position * rope.rope_theta ** (-2 * j / rope.rotary_dim)
                a, b = x[row, head, 2 * j].item(), x[row, head, 2 * j + 1].item()
                out[row, head, 2 * j] = a * math.cos(angle) - b * math.sin(angle)
                out[row, head, 2 * j + 1] = b * math.cos(angle) + a * math.sin(angle)
    return out


@pytest.mark.parametrize("rotary_dim", [2, 8, 16])
def test_pairs_turn_by_the_formula(rotary_dim: int) -> None:
    rope = RopeConfig(rope_type="default", rope_theta=5e6, rotary_dim=rotary_dim)
    x = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(0))
    positions = [0, 7, 7, 300, 2]
    torch.testing.assert_close(
        turned(x, positions, rope).double(), by_formula(x, positions, rope), atol=1e-4, rtol=0
    )


def test_position_zero_and_the_other_dimensions_stay_as_they_are() -> None:
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    found = turned(x, [0, 9], PLAIN)
    assert torch.equal(found[0], x[0])
    assert torch.equal(found[1, :, 8:], x[1, :, 8:])
    assert not torch.isclose(found[1, :, :8], x[1, :, :8]).all()


def test_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    scores = [
        float((turned(q, [p], PLAIN) * turned(k, [p - 5], PLAIN)).sum()) for p in (5, 6, 40, 200)
    ]
    assert max(scores) - min(scores) < 1e-4


def test_rotation_is_in_place_through_views() -> None:
    """Queries and keys lie side by side in one projection's output."""
    wide = torch.randn(4, 3 * 16 + 10, generator=torch.Generator().manual_seed(0))
    before = wide.clone()
    heads = wide[:, : 3 * 16].view(4, 3, 16)
    positions = [3, 1, 4, 1]
    expected = turned(heads, positions, PLAIN)
    result = rotate_(heads, RopeTable(PLAIN, device=CPU).lookup(torch.tensor(positions), 4))
    assert torch.equal(result, expected)
    assert torch.equal(wide[:, : 3 * 16].view(4, 3, 16), expected)
    assert torch.equal(wide[:, 3 * 16 :], before[:, 3 * 16 :])


def test_bfloat16_is_turned_in_float32_and_rounded_once() -> None:
    x = torch.randn(20, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    positions = list(range(20))
    assert torch.equal(turned(x, positions, PLAIN), turned(x.float(), positions, PLAIN).bfloat16())


def test_tables_grow_on_demand_and_keep_their_values() -> None:
    table = RopeTable(PLAIN, device=CPU)
    small = table.lookup(torch.arange(10), 9).clone()
    assert small.shape == (10, 1, 4)
    large = table.lookup(torch.arange(5000), 4999)
    assert torch.equal(large[:10], small)
    assert torch.equal(large, RopeTable(PLAIN, device=CPU).lookup(torch.arange(5000), 4999))
    assert torch.equal(table.lookup(torch.tensor([0, 1, 9]), 9), small[[0, 1, 9]])
    for last in (0, 1, 2, 63, 64, 65):  # around the sizes at which a table grows
        assert RopeTable(PLAIN, device=CPU).lookup(torch.tensor([last]), last).shape == (1, 1, 4)


def test_far_positions_keep_their_precision() -> None:
    """float32 angles at 131071 are off by up to 2^-8; the reference has the same, and ours are no
    worse.
    """
    (far,) = RopeTable(PLAIN, device=CPU).lookup(torch.tensor([131071]), 131071)[:, 0]
    exact = torch.polar(
        torch.ones(4).double(), 131071 * 1e4 ** (-torch.arange(0, 8, 2).double() / 8)
    )
    assert (far - exact).abs().max() < 2**-7


SCALED: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "linear 1": {"rope_type": "linear", "factor": 1.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn factor 1": {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 32768},
    "yarn short": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64},
    "yarn tiny": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4},
    "yarn betas": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192, "beta_fast": 8.0,
                   "beta_slow": 4.0},
    "yarn equal betas": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192,
                         "beta_fast": 4.0, "beta_slow": 4.0, "truncate": False},
    "yarn not truncated": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192,
                           "truncate": False},
    "yarn attention factor": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192,
                              "attention_factor": 1.25},
    "yarn mscale": {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.707,
                    "mscale_all_dim": 1.0},
    "yarn one mscale": {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("theta", [1e4, 5e6])
@pytest.mark.parametrize("partial", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("case", SCALED)
def test_scaled_frequencies_equal_transformers(case: str, partial: float, theta: float) -> None:
    scaling = SCALED[case]
    original = scaling.get("original_max_position_embeddings", 4096)
    config = transformers.Glm4Config(
        rope_parameters=scaling | {"rope_theta": theta, "partial_rotary_factor": partial},
        max_position_embeddings=int(original * scaling["factor"]),
        head_dim=128,
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, CPU)
    fields = {"original_max_position_embeddings": original} | scaling
    ours, our_factor = inverse_frequencies(
        RopeConfig(rope_theta=theta, rotary_dim=int(128 * partial), **fields)
    )
    torch.testing.assert_close(ours, frequencies, rtol=1e-6, atol=0)
    assert our_factor == pytest.approx(factor, rel=1e-12)


def test_the_attention_factor_stretches_what_turns() -> None:
    rope = RopeConfig(
        rope_type="yarn", rope_theta=1e4, rotary_dim=8, factor=4.0, original_max_position_embeddings=64,
        attention_factor=1.5,
    )  # fmt: skip
    x = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(0))
    found = turned(x, [0, 5, 70], rope)
    torch.testing.assert_close(found[..., :8].norm(dim=-1), 1.5 * x[..., :8].norm(dim=-1))
    assert torch.equal(found[..., 8:], x[..., 8:])


# M-RoPE


MROPE = RopeConfig(rope_type="default", rope_theta=1e4, rotary_dim=16, mrope_section=(2, 3, 3))


def test_sections_deal_pairs_to_axes_in_turn() -> None:
    assert axis_of_pair((8, 12, 12)) == [0] * 8 + [1] * 12 + [2] * 12
    assert axis_of_pair((1, 2, 1, 3)) == [0, 1, 1, 2, 0, 0, 0]
    assert axis_of_pair(()) == []


def test_each_pair_turns_by_its_own_axis_without_starting_anew() -> None:
    positions = torch.tensor([[3, 0, 900], [3, 7, 902], [3, 2, 905]])
    x = torch.randn(3, 2, 20, generator=torch.Generator().manual_seed(0))
    found = rotate_(x.clone(), RopeTable(MROPE, device=CPU).lookup(positions, 905))
    for row in range(3):
        for j, axis in enumerate([0, 0, 1, 1, 1, 2, 2, 2]):
            angle = int(positions[axis, row]) * 1e4 ** (-2 * j / 16)
            a, b = x[row, :, 2 * j].double(), x[row, :, 2 * j + 1].double()
            torch.testing.assert_close(
                found[row, :, 2 * j].double(),
                a * math.cos(angle) - b * math.sin(angle),
                atol=1e-4,
                rtol=0,
            )
            torch.testing.assert_close(
                found[row, :, 2 * j + 1].double(),
                b * math.cos(angle) + a * math.sin(angle),
                atol=1e-4,
                rtol=0,
            )
    assert torch.equal(found[..., 16:], x[..., 16:])


def test_equal_axes_are_one_axis() -> None:
    table, positions = RopeTable(MROPE, device=CPU), torch.tensor([0, 5, 77])
    assert torch.equal(table.lookup(positions.expand(3, -1), 77), table.lookup(positions, 77))
