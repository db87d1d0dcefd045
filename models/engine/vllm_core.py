"""One running vLLM engine in this process, made from an EngineConfig.

Owns vLLM's arguments and environment variables, building and closing. Knows nothing of Requests and Completions.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch

from models.config import ModelConfig
from models.engine.interface import EngineConfig
from models.engine.kv_cache import bytes_per_token, default_kv_tokens
from models.engine.settings import resolve_auto
from models.engine.vllm_limits import check_installed
from models.errors import ConfigError
from models.processing.tokenizer import Tokenizer

Runner = Literal["generate", "pooling"]

# Switched off where vLLM has them: its own normalisation of pixels, which come normalised.
NEWER_ARGUMENTS = ("mm_device_do_normalize",)
CPU_BLOCK_MULTIPLE = 32
# Read by vLLM when it is imported or built. All of these are what an engine inside a worker process needs; a user's own
# values stay.
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # its own binding leaves one of two cores unused
    "VLLM_LOGGING_LEVEL": "ERROR",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmSettings:
    """The resolved "auto"s of an EngineConfig. `max_model_len` bounds a request's prompt and output together."""

    model: ModelConfig
    device: torch.device
    dtype: torch.dtype
    max_model_len: int
    max_engine_len: int  # as vLLM is told, which demands room for a token even where none is wanted
    arguments: Mapping[str, Any]


def resolve_settings(config: EngineConfig, model: ModelConfig, extra: Mapping[str, Any]) -> VllmSettings:
    """vLLM's arguments for a config; those in `extra` win. Raises ConfigError for what cannot run."""
    check_installed()
    config = resolve_auto(replace(config, kind="vllm"), model)
    device = torch.device(config.device)
    dtype = getattr(torch, config.dtype)
    longest = model.longest_context
    max_model_len = longest if config.max_model_len == "auto" else config.max_model_len
    if max_model_len > longest:
        raise ConfigError(f"engine.max_model_len={max_model_len}: the checkpoint takes at most {longest} tokens")
    max_num_seqs, step_tokens, block_size = config.max_num_seqs, config.max_step_tokens, config.block_size
    assert max_num_seqs != "auto"
    assert step_tokens != "auto"
    assert block_size != "auto"
    if device.type == "cpu" and block_size % CPU_BLOCK_MULTIPLE:
        raise ConfigError(f"engine.block_size={block_size}: vLLM on a CPU takes multiples of {CPU_BLOCK_MULTIPLE}")
    max_engine_len = min(max_model_len + 1, longest)
    arguments: dict[str, Any] = {
        "model": config.model,
        "dtype": str(dtype).removeprefix("torch."),
        "tensor_parallel_size": config.tensor_parallel_size,
        "distributed_executor_backend": _executor(config, device),
        "max_model_len": max_engine_len,
        "max_num_seqs": min(max_num_seqs, step_tokens),  # it refuses more sequences than tokens in a step
        "max_num_batched_tokens": step_tokens,
        "block_size": block_size,
        "enable_prefix_caching": config.prefix_caching,
        "generation_config": "vllm",  # every sampling parameter comes with its request
        "logprobs_mode": "raw_logprobs",
        "max_logprobs": -1,
        "structured_outputs_config": {"backend": "guidance"},
        "disable_log_stats": True,
        "seed": 0,
    }
    if config.kv_cache_tokens != "auto" or device.type == "cpu":
        tokens = config.kv_cache_tokens
        if tokens == "auto":
            tokens = default_kv_tokens(model, dtype, device, max_useful=max_num_seqs * max_model_len)
        blocks = max(2, -(-tokens // block_size))  # it keeps one for itself
        arguments["num_gpu_blocks_override"] = blocks
        ranks = min(config.tensor_parallel_size, model.num_key_value_heads)
        arguments["kv_cache_memory_bytes"] = blocks * block_size * bytes_per_token(model, dtype) // ranks
    if device.type == "cpu":
        # Compiling takes most of a minute on two cores, longer than many a job.
        arguments["enforce_eager"] = True
        # A prompt cut over steps ends vLLM 0.32 where samples have seeds: it rewinds a generator as only CUDA's can be.
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(step_tokens, max_engine_len)
    if model.vision is not None:
        # Media come rendered: nothing of vLLM's looks at them before its model does, and profiling would.
        arguments |= {"skip_mm_profiling": True, "mm_processor_cache_gb": 0, "hf_overrides": _with_biases}
        arguments |= dict.fromkeys(NEWER_ARGUMENTS, False)
    return VllmSettings(
        model=model,
        device=device,
        dtype=dtype,
        max_model_len=max_model_len,
        max_engine_len=max_engine_len,
        arguments=arguments | dict(extra),
    )


def _with_biases(hf_config: Any) -> Any:
    """GLM-4.1V's queries, keys and values always have biases; without this key, vLLM leaves them out and says nothing.

    Published files have it, files that a newer transformers has saved have not.
    """
    hf_config.get_text_config().attention_bias = True  # vLLM also tries this on a config without parts
    return hf_config


def _executor(config: EngineConfig, device: torch.device) -> str:
    if config.tensor_parallel_size == 1:
        return "uni"
    return "ray" if device.type == "cuda" else "mp"


_alive: set[VllmCore] = set()
_closed: list[Any] = []


class VllmCore:
    """vLLM's LLMEngine, its scheduler in this process and in the thread that calls."""

    def __init__(self, settings: VllmSettings, runner: Runner, tokenizer: Tokenizer) -> None:
        """Loads the model. Raises ConfigError when vLLM refuses the checkpoint or an argument."""
        _set_environment()
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.executor import Executor

        self.runner = runner
        if settings.model.vision is not None:
            from models.engine.vllm_glm4v import register

            register()
        try:
            engine_config = EngineArgs(**_known(settings.arguments, EngineArgs), runner=runner).create_engine_config()
            self._llm = LLMEngine(
                vllm_config=engine_config,
                executor_class=Executor.get_class(engine_config),
                log_stats=False,
                multiprocess_mode=False,
            )
        except ValueError as error:  # pydantic's and vLLM's own refusals are both ValueErrors
            raise ConfigError(f"engine.kind=vllm: vLLM cannot run {settings.arguments['model']}: {error}") from error
        _alive.add(self)
        if runner == "generate":
            self._share_tokenizer(tokenizer)

    def add(self, id: str, prompt: Any, params: Any) -> None:
        """Queues a prompt in vLLM's own form. Raises ValueError for what vLLM refuses."""
        from vllm.exceptions import VLLMValidationError

        try:
            self._llm.add_request(id, prompt, params)
        except VLLMValidationError as error:  # a ValueError in some versions only
            raise ValueError(str(error)) from error

    def step(self) -> list[Any]:
        """One step; the outputs that are due (of most requests the last one only)."""
        return self._llm.step() if self._llm.has_unfinished_requests() else []

    def abort(self, ids: list[str]) -> None:
        """Forgets requests; nothing comes back for them."""
        if ids:
            self._llm.abort_request(ids)

    def close(self) -> None:
        """Frees model and cache. Once more does nothing."""
        if self in _alive:
            _alive.remove(self)
            _closed.append(self.__dict__.pop("_llm"))
        # Shutting down, and being forgotten too, ends what all engines of a process share: the last one may.
        while _closed and not _alive:
            _closed.pop().engine_core.shutdown()

    def _share_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Constraints see the tokens as TorchEngine does: every end id, and no control token inside a text."""
        from models.engine.vllm_constraints import OwnGuidance

        manager = self._llm.engine_core.engine_core.structured_output_manager
        if tokenizer.eos_token_ids:
            manager.backend = OwnGuidance(
                vllm_config=self._llm.vllm_config,
                tokenizer=tokenizer,
                vocab_size=self._llm.vllm_config.model_config.get_vocab_size(),
            )


def _known(arguments: Mapping[str, Any], engine_args: Any) -> dict[str, Any]:
    """Without the newer arguments that the installed version has not."""
    names = {field.name for field in fields(engine_args)}
    return {name: value for name, value in arguments.items() if name in names or name not in NEWER_ARGUMENTS}


def _set_environment() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the CPU platform would start a process for the model
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
