"""Where tests of the Triton kernels run: on the GPU, or in Triton's interpreter on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from glm_batch.models.engine.api.interface import EngineConfig
from glm_batch.models.engine.cuda.batch_paged import TILE_ROWS
from glm_batch.models.engine.cuda.kernels import make_runner
from glm_batch.models.engine.execution.media_encoder import MediaEncoder
from glm_batch.models.engine.execution.settings import Limits
from glm_batch.models.engine.torch_engine import TorchEngine
from glm_batch.models.network.registry import build_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fused_engine(path: Path, limits: dict[str, Any]) -> TorchEngine:
    """An engine with the fused kernels, on the CPU too."""
    if DEVICE.type == "cuda":
        return TorchEngine.from_checkpoint(
            EngineConfig(model=str(path), cuda_kernels=True, **limits)
        )
    plain = TorchEngine.from_checkpoint(EngineConfig(model=str(path), device="cpu", **limits))
    config = plain.config
    fused: Limits = replace(
        plain.limits,
        tile_queries=TILE_ROWS // (config.num_attention_heads // config.num_key_value_heads),
    )
    # packed weights are for CPUs
    with mock.patch("glm_batch.models.network.registry.can_pack", return_value=False):
        model = build_model(path, dtype=getattr(torch, limits["dtype"]), device=DEVICE)
    encoder = None
    if model.vision:
        encoder = MediaEncoder(model.vision, device=DEVICE, max_bytes=fused.media_cache_bytes)
    return TorchEngine(make_runner(model, fused, encoder), plain.tokenizer, fused)
