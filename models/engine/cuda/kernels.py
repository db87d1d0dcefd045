"""Where the fused kernels can run, and the runner that does; imports triton only to build that."""

from __future__ import annotations

import importlib.util

import torch

from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.engine.api.interface import EngineConfig
from glm_batch.models.engine.cuda.batch_paged import TILE_ROWS
from glm_batch.models.engine.execution.media_encoder import MediaEncoder
from glm_batch.models.engine.execution.runner import TorchRunner
from glm_batch.models.engine.execution.settings import Limits
from glm_batch.models.errors import ConfigError
from glm_batch.models.network.registry import Model


def resolve_tile_queries(config: EngineConfig, model: ModelConfig, device: torch.device) -> int:
    """Queries of a tile of the fused attention; 0 without it. ConfigError if it cannot run."""
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
            "engine.cuda_kernels: triton is not installed; install torch's CUDA build, which "
            "brings it"
        )
    return max(1, TILE_ROWS // (model.num_attention_heads // model.num_key_value_heads))


def make_runner(model: Model, limits: Limits, encoder: MediaEncoder | None) -> TorchRunner:
    """The runner of a single process with the fused kernels."""
    from glm_batch.models.engine.cuda.runner_cuda import CudaRunner  # needs triton

    max_blocks = -(-limits.max_model_len // limits.block_size)
    return CudaRunner(
        model,
        num_slots=limits.num_blocks * limits.block_size,
        max_seqs=limits.max_num_seqs,
        max_blocks=max_blocks,
        encoder=encoder,
    )
