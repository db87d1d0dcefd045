"""Two layers of the 9B shape on the GPU against transformers there, with plain torch and with the
fused kernels.

Needs a CUDA device; with TRITON_INTERPRET=1 and triton installed a narrow model runs without one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.make_large_model import Shape, make_large_model
from glm_batch.models.engine import EngineConfig, Inspect, Request
from glm_batch.models.engine.torch_engine import TorchEngine
from tests.models.conftest import load_oracle, random_ids
from tests.models.triton_device import DEVICE, fused_engine

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
LENGTHS = (300, 17, 1) if DEVICE.type == "cuda" else (20, 3)
NARROW = Shape(
    num_hidden_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    head_dim=16,
    intermediate_size=96,
    vocab_size=2048,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = Shape(num_hidden_layers=2) if DEVICE.type == "cuda" else NARROW
    return make_large_model(tmp_path_factory.mktemp("large"), shape, str(DEVICE))


@pytest.fixture(scope="module")
def expected(path: Path) -> list[np.ndarray]:
    """float32 logits of each prompt."""
    oracle = load_oracle(path).to(DEVICE)
    with torch.no_grad():
        return [
            oracle(torch.tensor([ids], device=DEVICE)).logits[0].cpu().numpy() for ids in prompts()
        ]


def prompts() -> list[list[int]]:
    return [random_ids(i, length) for i, length in enumerate(LENGTHS)]


def logits(path: Path, dtype: str, kernels: bool) -> list[np.ndarray]:
    limits: dict[str, Any] = {"dtype": dtype, "kv_cache_tokens": 4096, "max_step_tokens": 128}
    if kernels:
        engine = fused_engine(path, limits)
    else:
        engine = TorchEngine.from_checkpoint(
            EngineConfig(model=str(path), device=str(DEVICE), **limits)
        )
    engine.submit(
        [Request(id=str(i), input_ids=ids, work=Inspect()) for i, ids in enumerate(prompts())]
    )
    done = {}
    while engine.has_work():
        done.update({completion.id: completion for completion in engine.step()})
    engine.close()
    return [done[str(i)].array for i in range(len(done))]  # type: ignore[misc]


@pytest.mark.parametrize("kernels", [False, True])
def test_float32_logits_equal_transformers(
    path: Path, expected: list[np.ndarray], kernels: bool
) -> None:
    for ours, theirs in zip(logits(path, "float32", kernels), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-5, rtol=1e-4)


# The interpreter multiplies the bits of bfloat16 numbers, not the numbers.
@pytest.mark.parametrize("kernels", [False] + [True] * (DEVICE.type == "cuda"))
def test_bfloat16_logits_stay_near_float32(
    path: Path, expected: list[np.ndarray], kernels: bool
) -> None:
    for ours, theirs in zip(logits(path, "bfloat16", kernels), expected, strict=True):
        assert np.linalg.norm(ours - theirs) <= 0.03 * np.linalg.norm(theirs)
