"""Which kernels TorchEngine runs on: plain torch anywhere, or the fused ones on NVIDIA GPUs; and
the runner for each.

Imports triton only where it is asked for.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch

from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.engine.api.interface import EngineConfig
from glm_batch.models.engine.cuda.paged import TILE_ROWS
from glm_batch.models.engine.execution.media_encoder import MediaEncoder
from glm_batch.models.engine.execution.runner import TorchRunner
from glm_batch.models.errors import ConfigError
from glm_batch.models.network.registry import Model

if TYPE_CHECKING:
    from glm_batch.models.engine.settings import Limits


def resolve_tile_queries(config: EngineConfig, model: ModelConfig, device: torch.device) -> int:
    """Queries of a tile of the fused attention; 0 where it is not asked for. Raises ConfigError
    where it cannot run.
    """
    if not config.cuda_kernels:
        return 0
    if device.type != "cuda":
        raise ConfigError(
            f"engine.cuda_kernels: they run on NVIDIA GPUs, not on {device.type}; leave it out"
        )
    if config.tensor_parallel_size > 1:
        raise ConfigError(
            "engine.cuda_kernels: they run on one rank; set engine.tensor_parallel_size to 1"
        )
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "engine.cuda_kernels: triton is not installed; install torch's CUDA build, which brings it"
        )
    return max(1, TILE_ROWS // (model.num_attention_heads // model.num_key_value_heads))


def make_runner(model: Model, limits: Limits, encoder: MediaEncoder | None) -> TorchRunner:
    """The runner of a single process that reads batches as `limits.tile_queries` says."""
    num_slots = limits.num_blocks * limits.block_size
    if not limits.tile_queries:
        return TorchRunner(model, num_slots=num_slots, encoder=encoder)
    from glm_batch.models.engine.cuda.runner_cuda import CudaRunner  # needs triton

    max_blocks = -(-limits.max_model_len // limits.block_size)
    return CudaRunner(
        model,
        num_slots=num_slots,
        max_seqs=limits.max_num_seqs,
        max_blocks=max_blocks,
        encoder=encoder,
    )
