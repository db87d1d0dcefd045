"""Whether a model can be run as an `engine:` section says, of a job, a sweep or a server."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from glm_batch.jobs.files.sections import Problem
from glm_batch.models import rooms
from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.engine.api.interface import EngineOptions, Task
from glm_batch.models.errors import ConfigError
from glm_batch.models.network.layers.parallel import check_parts


def num_gpus() -> int:
    """The device files that NVIDIA's driver made, which costs no import of torch to see."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def engine_problems(
    engine: EngineOptions, key: str, *, plans_gpus: bool = False
) -> Iterator[Problem]:
    """What is wrong with the options by themselves, or on this machine.

    The workers of a cluster at RAY_ADDRESS may have what this machine has not; so may, with
    `plans_gpus`, those that are only planned for.
    """
    is_elsewhere = "RAY_ADDRESS" in os.environ
    if engine.kind == "vllm":
        try:
            limits = rooms.load("models.engine.vllm.vllm_limits")
            if not is_elsewhere:
                limits.check_installed()
        except ConfigError as error:
            yield Problem(key=f"{key}.kind", message=str(error).removeprefix("engine.kind: "))
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", engine.device):
        message = f'it is "{engine.device}", but it must be auto, cpu or cuda'
        yield Problem(key=f"{key}.device", message=message)
    elif engine.device.startswith("cuda") and not (num_gpus() or plans_gpus or is_elsewhere):
        message = "this machine has no NVIDIA device; use auto or cpu"
        yield Problem(key=f"{key}.device", message=message)
    if engine.tensor_parallel_size > 1 and re.fullmatch(r"cuda:\d+", engine.device):
        message = f"{engine.tensor_parallel_size} ranks have a GPU each; use cuda"
        yield Problem(key=f"{key}.device", message=message)


def checkpoint_problems(
    engine: EngineOptions, config: ModelConfig, task: Task | None, key: str
) -> Iterator[Problem]:
    """Options that this checkpoint does not take, for requests of one task, or None for any."""
    if engine.kind == "vllm":
        limits = rooms.load("models.engine.vllm.vllm_limits")
        if refusal := limits.checkpoint_problem(config, task):
            yield Problem(key=f"{key}.kind", message=refusal)
    limit, longest = engine.max_model_len, config.longest_context
    if limit != "auto" and limit > longest:
        message = (
            f"it is {limit}, but the checkpoint takes at most {longest} tokens; lower it or leave "
            "it out"
        )
        yield Problem(key=f"{key}.max_model_len", message=message)
    try:
        check_parts(config, engine.tensor_parallel_size)
    except ConfigError as error:
        message = str(error).partition(": ")[2]
        yield Problem(key=f"{key}.tensor_parallel_size", message=message)
    if engine.dtype == "float16" and config.family != "glm":
        message = "GLM-4 outgrows the numbers that float16 can hold; use bfloat16 or float32"
        yield Problem(key=f"{key}.dtype", message=message)
