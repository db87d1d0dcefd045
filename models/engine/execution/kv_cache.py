"""The KV cache's tensors: how large they are made and what one token costs."""

from __future__ import annotations

import psutil
import torch

from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.network.layers.parallel import SINGLE, ParallelGroup

CPU_BYTES = 2 << 30
CPU_SHARE = 0.25  # of what is free, at most CPU_BYTES
CUDA_SHARE = 0.9  # of what is free once the weights are loaded


def bytes_per_token(config: ModelConfig, num_kv_heads: int, dtype: torch.dtype) -> int:
    """Keys and values of all layers, where so many kv heads are in one place."""
    return 2 * config.num_hidden_layers * num_kv_heads * config.head_dim * dtype.itemsize


def default_kv_tokens(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_useful: int,
    group: ParallelGroup = SINGLE,
) -> int:
    """What free memory allows, at most `max_useful` tokens. Ranks on CPUs share one memory."""
    if device.type == "cuda":
        budget = int(torch.cuda.mem_get_info(device)[0] * CUDA_SHARE)
    else:
        budget = min(CPU_BYTES, int(psutil.virtual_memory().available * CPU_SHARE)) // group.size
    num_kv_heads = group.kv_part(config.num_key_value_heads).size
    return max(1, min(max_useful, budget // bytes_per_token(config, num_kv_heads, dtype)))


class KVCache:
    """Per layer one tensor of keys and one of values, each [num_kv_heads, num_slots, head_dim]."""

    def __init__(
        self,
        config: ModelConfig,
        num_kv_heads: int,
        num_slots: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_kv_heads, num_slots, config.head_dim)
        self.pages = tuple(
            (_pages(shape, dtype, device), _pages(shape, dtype, device))
            for _ in range(config.num_hidden_layers)
        )


def _pages(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory that costs nothing before it is used; a slot is always written before it is read.

    Slot 0 stands in for padding, and a NaN there would survive a softmax weight of 0.
    """
    pages = torch.empty(shape, dtype=dtype, device=device)
    pages[:, 0] = 0
    return pages
