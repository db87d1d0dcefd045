"""One running vLLM engine in this process: its arguments, building and closing;
and what of vLLM's own is replaced for that.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from vllm import ModelRegistry
from vllm.model_executor.models.glm4_1v import (
    Glm4vDummyInputsBuilder,
    Glm4vForConditionalGeneration,
    Glm4vMultiModalProcessor,
    Glm4vProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.v1.structured_output.backend_guidance import GuidanceBackend

from glm_batch.models.checkpoint.media_config import ImageProcessorConfig, VideoProcessorConfig
from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.engine.api.interface import EngineConfig
from glm_batch.models.engine.api.request import Priority
from glm_batch.models.engine.decoding.constraints import ll_tokenizer
from glm_batch.models.engine.execution.settings import (
    bytes_per_token,
    default_kv_tokens,
    resolve_auto,
)
from glm_batch.models.engine.vllm.vllm_limits import set_environment
from glm_batch.models.errors import ConfigError
from glm_batch.models.processing.tokenizer import Tokenizer

Runner = Literal["generate", "pooling"]

CPU_BLOCK_MULTIPLE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmSettings:
    """The resolved "auto"s of an EngineConfig. `max_model_len` bounds prompt and output."""

    model: ModelConfig
    device: torch.device
    # of normalised pixels; None where vLLM normalises bytes on the device
    pixel_dtype: torch.dtype | None
    max_model_len: int
    max_engine_len: int  # as vLLM is told, which demands room for a token even where none is wanted
    arguments: Mapping[str, Any]


def resolve_settings(
    config: EngineConfig, model: ModelConfig, extra: Mapping[str, Any]
) -> VllmSettings:
    """vLLM's arguments for a config, `extra` ones first. ConfigError for what cannot run."""
    config = resolve_auto(replace(config, kind="vllm"), model)
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)
    cache = _cache_arguments(config, model, dtype, device)
    max_model_len = _max_model_len(config, model, cache)
    max_engine_len = min(max_model_len + 1, model.longest_context)
    arguments: dict[str, Any] = {
        "model": config.model,
        "dtype": config.dtype,
        "tensor_parallel_size": config.tensor_parallel_size,
        # The model's actor holds the GPUs of all ranks; vLLM's Ray executor would ask for them once
        # more.
        "distributed_executor_backend": "uni" if config.tensor_parallel_size == 1 else "mp",
        "max_model_len": max_engine_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": max(int(config.max_step_tokens), int(config.max_num_seqs)),
        "enable_prefix_caching": config.prefix_caching,
        "scheduling_policy": "priority",
        "generation_config": "vllm",  # every sampling parameter comes with its request
        "logprobs_mode": "raw_logprobs",
        "max_logprobs": -1,
        "structured_outputs_config": {"backend": "guidance"},
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "seed": 0,
    }
    if device.type == "cpu":
        arguments |= {
            # Compiling 243 M parameters takes 38 CPU seconds and saves 6 % of a labelling step,
            # nothing in generating.
            "enforce_eager": True,
            # A prompt cut over steps ends vLLM 0.32 where samples have seeds: it rewinds generators
            # as only CUDA's can.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(arguments["max_num_batched_tokens"], max_engine_len),
        }
    pixel_dtype = None if _device_normalizes(config.model) else dtype
    if model.vision is not None:
        arguments |= {
            "mm_processor_cache_gb": 0,
            "mm_device_do_normalize": pixel_dtype is None,
            "skip_mm_profiling": True,  # which would run the processors
            "hf_overrides": _with_biases,
        }
    return VllmSettings(
        model=model,
        device=device,
        pixel_dtype=pixel_dtype,
        max_model_len=max_model_len,
        max_engine_len=max_engine_len,
        arguments=arguments | cache | dict(extra),
    )


def _cache_arguments(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Block size and, where it is not what vLLM finds free on a GPU, the number of blocks."""
    block_size, tokens = config.block_size, config.kv_cache_tokens
    assert block_size != "auto"
    if device.type == "cpu" and block_size % CPU_BLOCK_MULTIPLE:
        raise ConfigError(
            f"engine.block_size={block_size}: vLLM on a CPU takes multiples of {CPU_BLOCK_MULTIPLE}"
        )
    if tokens == "auto" and device.type == "cuda":
        return {"block_size": block_size}
    if tokens == "auto":
        max_useful = int(config.max_num_seqs) * model.longest_context
        tokens = default_kv_tokens(model, dtype, device, max_useful=max_useful)
    blocks = 1 - (-tokens // block_size)  # it keeps one for itself
    kv_heads = max(1, model.num_key_value_heads // config.tensor_parallel_size)  # of each rank
    return {
        "block_size": block_size,
        "num_gpu_blocks_override": blocks,
        "kv_cache_memory_bytes": blocks * block_size * bytes_per_token(model, kv_heads, dtype),
    }


def _max_model_len(config: EngineConfig, model: ModelConfig, cache: Mapping[str, Any]) -> int:
    """ "auto" is what the checkpoint takes and the cache holds."""
    longest = model.longest_context
    if config.max_model_len == "auto":
        blocks = cache.get("num_gpu_blocks_override")
        return longest if blocks is None else min(longest, (blocks - 1) * cache["block_size"])
    if config.max_model_len > longest:
        raise ConfigError(
            f"engine.max_model_len={config.max_model_len}: the checkpoint takes at most "
            f"{longest} tokens"
        )
    return config.max_model_len


def _device_normalizes(model_dir: str) -> bool:
    """Whether vLLM's normalisation, which it reads for images, is right for videos too."""
    image, video = (
        ImageProcessorConfig.from_dir(model_dir),
        VideoProcessorConfig.from_dir(model_dir),
    )
    return image.normalization == video.normalization


def _with_biases(hf_config: Any) -> Any:
    """GLM-4.1V's queries, keys and values always have biases; without this key, vLLM leaves them
    out and says nothing.

    Published files have it, files that a newer transformers has saved have not.
    """
    # vLLM also tries this on a config without parts
    hf_config.get_text_config().attention_bias = True
    return hf_config


_alive: set[VllmCore] = set()
_closed: list[Any] = []


class VllmCore:
    """vLLM's LLMEngine, its scheduler in this process and in the thread that calls."""

    def __init__(self, settings: VllmSettings, runner: Runner, tokenizer: Tokenizer) -> None:
        """Loads the model. Raises ConfigError when vLLM refuses the checkpoint or an argument."""
        set_environment(settings.device.type)
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.executor import Executor

        self.runner = runner
        if settings.model.vision is not None:
            from glm_batch.models.engine.vllm.vllm_core import register

            register()
        # while vLLM builds it collects garbage five times: none of it among its own modules
        gc.freeze()
        try:
            engine_config = EngineArgs(**settings.arguments, runner=runner).create_engine_config()
            self._llm = LLMEngine(
                vllm_config=engine_config,
                executor_class=Executor.get_class(engine_config),
                log_stats=False,
                multiprocess_mode=False,
            )
        except ValueError as error:  # pydantic's and vLLM's own refusals are both ValueErrors
            raise ConfigError(
                f"engine.kind=vllm: vLLM cannot run {settings.arguments['model']}: {error}"
            ) from error
        _alive.add(self)
        if runner == "generate":
            self._share_tokenizer(tokenizer)

    def add(self, id: str, prompt: Any, params: Any, priority: Priority) -> None:
        """Queues a prompt in vLLM's own form. Raises ValueError for what vLLM refuses."""
        from vllm.exceptions import VLLMValidationError

        try:
            self._llm.add_request(id, prompt, params, priority=priority)
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
        # Shutting down, and being forgotten too, ends what all engines of a process share: the last
        # one may.
        while _closed and not _alive:
            _closed.pop().engine_core.shutdown()

    def _share_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Constraints see the tokens as TorchEngine does: see OwnGuidance."""
        from glm_batch.models.engine.vllm.vllm_core import OwnGuidance

        manager = self._llm.engine_core.engine_core.structured_output_manager
        if tokenizer.eos_token_ids:
            manager.backend = OwnGuidance(
                vllm_config=self._llm.vllm_config,
                tokenizer=tokenizer,
                vocab_size=self._llm.vllm_config.model_config.get_vocab_size(),
            )


class OwnProcessingInfo(Glm4vProcessingInfo):  # type: ignore[misc]  # vllm has no types here
    """As many images and videos as fit; each may fill the context."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None, "video": None}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        return {modality: seq_len for modality, count in mm_counts.items() if count}


@MULTIMODAL_REGISTRY.register_processor(
    Glm4vMultiModalProcessor, info=OwnProcessingInfo, dummy_inputs=Glm4vDummyInputsBuilder
)
class OwnGlm4v(Glm4vForConditionalGeneration):  # type: ignore[misc]  # vllm has no types here
    """The same network."""


def register() -> None:
    """From now on this process's engines build OwnGlm4v."""
    ModelRegistry.register_model("Glm4vForConditionalGeneration", OwnGlm4v)


class OwnGuidance(GuidanceBackend):  # type: ignore[misc]  # vllm has no types here
    """Masks allow what TorchEngine's allow: any of the end ids where a text may end, and no control
    token inside.

    `tokenizer` is a models.processing.tokenizer.Tokenizer.
    """

    def __post_init__(self) -> None:
        self.disable_any_whitespace = self.disable_additional_properties = False
        self.ll_tokenizer = ll_tokenizer(self.tokenizer, self.vocab_size)
