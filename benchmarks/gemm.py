"""Measures what bf16 matrix products reach on this machine: the limit every system is held against.

The products are those of one step of the mid model: its layers' matrices in order, each layer with
weights of its own, so that weights come from memory as they do in the model.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.make_mid_model import HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, LAYERS

ROWS = (16, 64, 256, 1024)
SHAPES = (  # (outputs, inputs): fused q/k/v, o, gate and up, down
    ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
    (HIDDEN, HEADS * HEAD_DIM),
    (2 * INTERMEDIATE, HIDDEN),
    (HIDDEN, INTERMEDIATE),
)
Product = Callable[[torch.Tensor], torch.Tensor]


def measure(seconds_each: float = 1.5) -> dict[str, Any]:
    """FLOP/s by number of rows: the better of plain and prepacked weights, the median over repeated
    sweeps.
    """
    weights = [torch.randn(shape, dtype=torch.bfloat16) for _ in range(LAYERS) for shape in SHAPES]
    with torch.inference_mode():
        rates = {}
        for rows in ROWS:
            inputs = {
                size: torch.randn(rows, size, dtype=torch.bfloat16)
                for size in {shape[1] for shape in SHAPES}
            }
            variants = [
                [_plain(weight) for weight in weights],
                [_prepacked(weight, rows) for weight in weights],
            ]
            rates[rows] = max(
                _rate(products, weights, inputs, rows, seconds_each) for products in variants
            )
    return {
        "flops_by_rows": rates,
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
    }


def _plain(weight: torch.Tensor) -> Product:
    return lambda x: F.linear(x, weight)


def _prepacked(weight: torch.Tensor, rows: int) -> Product:
    """The weight in the layout oneDNN prefers for this number of rows."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _rate(
    products: list[Product],
    weights: list[torch.Tensor],
    inputs: dict[int, torch.Tensor],
    rows: int,
    seconds: float,
) -> float:
    flops = sum(2.0 * rows * weight.numel() for weight in weights)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 4:
        begin = time.perf_counter()
        for product, weight in zip(products, weights, strict=True):
            product(inputs[weight.shape[1]])
        times.append(time.perf_counter() - begin)
    return flops / statistics.median(times[1:])  # the first sweep builds the kernels


if __name__ == "__main__":
    print(json.dumps(measure()))
