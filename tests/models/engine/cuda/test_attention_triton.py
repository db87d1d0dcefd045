"""The fused attention against one query at a time, over the batches that the scheduler really
makes.

Needs a CUDA device; with TRITON_INTERPRET=1 and triton installed it runs without one, slowly.
"""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from tests.models.engine.cuda.test_paged import paged_batch
from tests.models.network.layers.test_attention import (
    HEAD_DIM,
    NUM_BLOCKS,
    NUM_HEADS,
    NUM_KV_HEADS,
    SEEDS,
    attend_one_by_one,
    steps,
    visible_slots,
)
from tests.models.triton_device import DEVICE

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("seed", SEEDS[: 24 if DEVICE.type == "cuda" else 3])
def test_attention_is_that_of_one_query_at_a_time(
    monkeypatch: pytest.MonkeyPatch, seed: int, splits: int
) -> None:
    from glm_batch.models.engine.cuda import attention_triton
    from glm_batch.models.engine.cuda.runner_cuda import paged_queries

    monkeypatch.setattr(attention_triton, "num_splits", lambda num_programs: splits)
    generator = torch.Generator().manual_seed(seed)
    for step in islice(steps(seed), 12 if DEVICE.type == "cuda" else 2):
        batch = paged_batch(step)
        shape = (NUM_KV_HEADS, NUM_BLOCKS * step.block_size, HEAD_DIM)
        q = 2 * torch.randn(len(batch.input_ids), NUM_HEADS, HEAD_DIM, generator=generator)
        k, v = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        expected = attend_one_by_one(q, k, v, visible_slots(step)).float()
        q, k, v = q.to(DEVICE), k.to(DEVICE), v.to(DEVICE)
        whole = attention_triton.attend_paged(q, k, v, paged_queries(batch.groups, DEVICE))
        torch.testing.assert_close(whole.cpu(), expected, atol=1e-5, rtol=0)
        rows = torch.from_numpy(batch.out_rows)
        wanted = attention_triton.attend_paged(
            q[rows.to(DEVICE)], k, v, paged_queries(batch.out_groups, DEVICE)
        )
        torch.testing.assert_close(wanted.cpu(), expected[rows], atol=1e-5, rtol=0)
