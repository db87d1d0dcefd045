"""What "auto" means: engine, device, dtype and sizes, from an EngineConfig and the checkpoint;
how large the KV cache is made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import psutil
import torch

from glm_batch.models import rooms
from glm_batch.models.checkpoint.config_reader import load_config
from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.engine.api.interface import Auto, EngineConfig
from glm_batch.models.errors import ConfigError
from glm_batch.models.network.layers.parallel import SINGLE, ParallelGroup
from glm_batch.models.processing.tokenizer import Tokenizer

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


# Throughput settings: on a CPU activations of a step should stay near the caches, and small blocks
# waste few shared tokens; a GPU wants many rows in flight.
STEP_TOKENS = {"cpu": 1024, "cuda": 8192}
BATCH_STEP_TOKENS = {"cpu": 192, "cuda": 1024}  # beside online requests: nearly as fast, and short
NUM_SEQS = {"cpu": 256, "cuda": 512}
BLOCK_SIZE = {"cpu": 4, "cuda": 16}
MEDIA_CACHE_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
# Rows that repeat come close to each other. What was computed this many full steps ago and not
# found again gives its memory to new rows, so that a long stream of rows of their own needs no more
# of it than a short one.
UNPROVEN_STEPS = 64
DTYPE_NAMES: dict[torch.dtype, Literal["float32", "bfloat16", "float16"]] = {
    torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The resolved "auto"s of an EngineConfig."""

    max_model_len: int
    max_step_tokens: int
    batch_step_tokens: int
    max_num_seqs: int
    num_blocks: int
    block_size: int
    prefix_caching: bool
    media_cache_bytes: int
    tile_queries: int = 0  # of the fused attention; 0 where attention is plain torch


def resolve_end_ids(tokenizer: Tokenizer, config: ModelConfig) -> tuple[int, ...]:
    """The checkpoint's, else the family's. ConfigError for ids that the model cannot write."""
    ids = tokenizer.eos_token_ids or tuple(i for i in config.eos_token_ids if i < config.vocab_size)
    if any(not 0 <= i < config.vocab_size for i in ids):
        raise ConfigError(
            f"generation_config.json: eos_token_id {list(ids)} exceeds vocab_size "
            f"{config.vocab_size} of config.json; correct it"
        )
    return ids


def resolve_device(device: str, group: ParallelGroup = SINGLE) -> torch.device:
    """ "auto" is CUDA where there is one; of several ranks each has a GPU of its own number.

    Raises ConfigError for a device that this machine has not.
    """
    found = _resolve_device(device)
    if group.size == 1 or found.type != "cuda":
        return found
    if ":" in device:
        raise ConfigError(f"engine.device={device!r}: {group.size} ranks have a GPU each; use cuda")
    if group.rank >= torch.cuda.device_count():
        raise ConfigError(
            f"engine.tensor_parallel_size={group.size}: this process sees "
            f"{torch.cuda.device_count()} GPUs; use at most as many ranks"
        )
    return torch.device("cuda", group.rank)


def _resolve_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"engine.device={device!r}: no such kind of device; use auto, cpu or cuda"
        ) from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"engine.device={device!r}: torch finds no CUDA device here; use auto or cpu"
        )
    return resolved


def resolve_dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    """ "auto" is the checkpoint's own dtype, but float32 where bfloat16 products would be slow."""
    if config.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
            config.dtype
        ]
    stored = load_config(config.model).dtype
    if stored == "float32" or (device.type == "cpu" and not _cpu_has_bfloat16()):
        return torch.float32
    return torch.bfloat16


def _cpu_has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def resolve_limits(
    config: EngineConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    group: ParallelGroup = SINGLE,
) -> Limits:
    """Numbers for every "auto". ConfigError for more than the checkpoint was made for."""
    longest = model.longest_context
    max_model_len = longest if config.max_model_len == "auto" else config.max_model_len
    if max_model_len > longest:
        raise ConfigError(
            f"engine.max_model_len={max_model_len}: the checkpoint takes at most {longest} tokens"
        )
    block_size = BLOCK_SIZE[device.type] if config.block_size == "auto" else config.block_size
    max_num_seqs = NUM_SEQS[device.type] if config.max_num_seqs == "auto" else config.max_num_seqs
    kv_tokens = config.kv_cache_tokens
    if kv_tokens == "auto":
        kv_tokens = default_kv_tokens(
            model, dtype, device, max_useful=max_num_seqs * max_model_len, group=group
        )
    return Limits(
        max_model_len=max_model_len,
        max_step_tokens=_given(config.max_step_tokens, STEP_TOKENS[device.type]),
        batch_step_tokens=_given(config.batch_step_tokens, BATCH_STEP_TOKENS[device.type]),
        max_num_seqs=max_num_seqs,
        num_blocks=max(1, -(-kv_tokens // block_size)),
        block_size=block_size,
        prefix_caching=config.prefix_caching,
        media_cache_bytes=(
            MEDIA_CACHE_BYTES[device.type]
            if config.media_cache_bytes == "auto"
            else config.media_cache_bytes
        ),
        tile_queries=(
            rooms.load("models.engine.cuda.kernels").resolve_tile_queries(config, model, device)
            if config.cuda_kernels
            else 0
        ),
    )


def resolve_auto(config: EngineConfig, model: ModelConfig) -> EngineConfig:
    """The rule behind "auto": engine, device, dtype, sequences in flight, step size and block size,
    by device, model and task.

    On a CPU the engine is torch, which is the faster one there, and on several ranks too, and where
    requests of any kind may come, all of which it alone answers; on one GPU vllm where it is
    installed and can do the task, else torch. Raises ConfigError for a device
    that this machine has not.
    """
    if config.kind == "echo":
        return config
    device = resolve_device(config.device)
    kind = config.kind
    if kind == "auto":
        kind = "vllm" if _vllm_is_better(config, model, device) else "torch"
    step_tokens, block_size = STEP_TOKENS, BLOCK_SIZE
    if kind == "vllm":
        limits = rooms.load("models.engine.vllm.vllm_limits")
        step_tokens, block_size = limits.STEP_TOKENS, limits.BLOCK_SIZE
    return replace(
        config,
        kind=kind,
        device=str(device),
        dtype=DTYPE_NAMES[resolve_dtype(config, device)],
        max_num_seqs=_given(config.max_num_seqs, NUM_SEQS[device.type]),
        max_step_tokens=_given(config.max_step_tokens, step_tokens[device.type]),
        block_size=_given(config.block_size, block_size[device.type]),
    )


def _vllm_is_better(config: EngineConfig, model: ModelConfig, device: torch.device) -> bool:
    is_torch_alone = config.task is None or config.tensor_parallel_size > 1
    if device.type != "cuda" or is_torch_alone or not rooms.is_here("vllm"):
        return False
    limits = rooms.load("models.engine.vllm.vllm_limits")
    return limits.is_installed() and not limits.checkpoint_problem(model, config.task)


def _given(value: int | Auto, default: int) -> int:
    return default if value == "auto" else value
