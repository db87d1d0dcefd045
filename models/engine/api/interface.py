"""What every engine does, and how one is configured. An engine sees token ids and arrays, never a
file, a URL or a row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, Protocol, get_args

from glm_batch.models.engine.api.request import Completion, Delta, Request

Auto = Literal["auto"]
Kind = Literal["auto", "torch", "vllm", "echo"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Task = Literal["choose", "generate", "extract", "classify", "tag", "embed"]
SIZES = (
    "max_step_tokens", "batch_step_tokens", "max_num_seqs", "max_model_len", "kv_cache_tokens",
    "block_size", "media_cache_bytes",
)  # fmt: skip


class Engine(Protocol):
    """Takes requests, is stepped, and gives back exactly one Completion for each of them.

    Which of them it works at first is its own business; answers do not depend on it. TorchEngine
    and VllmEngine do ONLINE requests before BATCH ones; EchoEngine makes no difference between
    them.
    """

    def submit(self, requests: list[Request]) -> None:
        """Queues requests. What can never run ends in an error Completion of the next step."""
        ...

    def step(self) -> list[Completion]:
        """Does a bounded piece of work; returns what finished. EngineError when it cannot go on."""
        ...

    def deltas(self) -> list[Delta]:
        """What streaming requests have gained since the last call, in order; to be asked for after
        each step.

        All deltas of a request are out once they have been asked for after the step that completed
        it.
        """
        ...

    def abort(self, ids: list[str]) -> None:
        """Ends requests early (finish_reason "abort"); unknown ids are ignored."""
        ...

    def has_work(self) -> bool:
        """True while a submitted request has not come back."""
        ...

    def close(self) -> None:
        """Frees the engine's memory; it cannot be used afterwards."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How to run a model: what a job's or server's `engine:` section and `load` in Python take.

    models.engine.execution.settings resolves "auto" from the device and the checkpoint. Raises
    ValueError for what is none of these.
    """

    # auto: torch, but vllm on a GPU where it is installed and all requests ask for one thing that
    # it can do; echo is a dry run without a model
    kind: Kind = "auto"
    dtype: Dtype = "auto"  # float16: glm alone
    device: str = "auto"  # auto, cpu or cuda
    tensor_parallel_size: int = 1  # ranks that hold one model together, each on a GPU of its own
    # on an NVIDIA GPU: fused kernels and recorded decode steps instead of plain torch
    cuda_kernels: bool = False
    max_step_tokens: int | Auto = "auto"  # tokens of one forward pass
    # of one with rows of a batch job in it: an online request waits for no more than that
    batch_step_tokens: int | Auto = "auto"
    max_num_seqs: int | Auto = "auto"  # sequences in flight
    # prompt and answer together, in tokens; auto: what the checkpoint was made for
    max_model_len: int | Auto = "auto"
    kv_cache_tokens: int | Auto = "auto"  # tokens that the paged cache of keys and values holds
    block_size: int | Auto = "auto"  # tokens of one block of it
    media_cache_bytes: int | Auto = "auto"  # features of images and videos that are remembered
    prefix_caching: bool = True  # compute what prompts have in common once

    def __post_init__(self) -> None:
        for name, known in (("kind", get_args(Kind)), ("dtype", get_args(Dtype))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"engine.{name}={getattr(self, name)!r}: it must be one of {', '.join(known)}"
                )
        for name in SIZES:
            value = getattr(self, name)
            if value != "auto" and (not isinstance(value, int) or value < 1):
                raise ValueError(
                    f'engine.{name}={value!r}: it must be a positive integer or "auto"'
                )
        if self.tensor_parallel_size < 1:
            raise ValueError(
                f"engine.tensor_parallel_size={self.tensor_parallel_size}: it must be at least 1"
            )

    def of(self, model: str, task: Task | None = None) -> EngineConfig:
        """These options for one checkpoint."""
        options = {field.name: getattr(self, field.name) for field in fields(EngineOptions)}
        return EngineConfig(model=model, task=task, **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(EngineOptions):
    """One checkpoint and how to run it.

    `task` tells what all requests will ask for, where that is known: kind "auto" goes by it, and
    vllm loads the model for nothing else.
    """

    model: str
    task: Task | None = None
